"""How the lm head lies on a mesh: which axes split tokens, features and vocabulary, and which of them travel."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from srm_jax import sharding

# Tokens travel up to so many times the vocabulary's entries: twice the traffic, which a step hardly feels, for the room
# of W and dW.
_WORTH = 2


class Layout(NamedTuple):
  """Mesh axes that split the rows, the features of each kernel (name or None) and the vocabulary.

  Kernels are gathered over the axes of their features. tokens: the axis over which tokens are gathered instead, or
  None.
  """

  rows: tuple[str, ...]
  embeds: tuple[str | None, ...]
  vocab: tuple[str, ...] = ()
  tokens: str | None = None

  @property
  def axis_name(self) -> str | tuple[str, ...] | None:
    """Of the vocabulary, as collectives take it."""
    return self.vocab[0] if len(self.vocab) == 1 else self.vocab or None


def choose(mesh, tokens: Sequence[int], *kernels: Sequence[int], split: bool = False) -> Layout:
  """By the rules of `sharding`; what does not divide stays whole.

  Args:
    mesh: device mesh, or None.
    tokens: (B, T).
    kernels: (D, V) of each head, the student's first.
    split: the tokens may travel in the place of the kernels.
  """
  if mesh is None or mesh.size == 1:
    return Layout((), (None,) * len(kernels))
  rows = sharding.spec(('batch',), tokens[:1], mesh)[0] or ()
  alone = lambda axis: axis is not None and mesh.shape[axis] == 1  # splits nothing, and must not forbid whole rows
  places = [sharding.spec(('embed', 'vocab'), kernel, mesh) for kernel in kernels]
  embeds, vocabs = zip(*([None if alone(axis) else axis for axis in place] for place in places))
  vocab = (vocabs[0],) if all(vocabs) else ()  # One axis_name serves all.
  if not rows:  # Every device holds all rows: gathering W by hand would make equal results count as different ones.
    embeds = (None,) * len(kernels)
  layout = Layout(rows, embeds, vocab)
  return _with_travelling_tokens(layout, mesh, tokens, kernels) if split else layout


def _with_travelling_tokens(layout: Layout, mesh, tokens, kernels) -> Layout:
  """Where each device can take a part of the vocabulary, and tokens to gather are not too many."""
  axis, sizes = layout.embeds[0], [size for _, size in kernels]
  count = lambda names: math.prod(mesh.shape[name] for name in names)
  vocab = (axis, *layout.vocab)
  if axis is None or any(size % count(vocab) for size in sizes):
    return layout
  if math.prod(tokens) // count(set(layout.rows) - {axis}) > _WORTH * min(sizes) // count(layout.vocab):
    return layout
  return Layout(layout.rows, (None,) * len(kernels), vocab, axis)
