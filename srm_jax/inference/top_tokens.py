"""The likeliest next tokens of a model at every supervised position, without the [B, T, V] logits.

The supervised positions of a device stand in front, and a loop takes as many chunks as they fill: prompts and padding
cost a forward pass and no logits. Under a mesh the tokens are split over all of its axes and the unembedding is whole
on every device, since the k largest of a row need all of it; the loop then has no collective, and devices may take
different numbers of chunks.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from srm_jax import sharding
from srm_jax.losses import lm_head, top_k
from srm_jax.models import heads, transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.types import Batch, Params


class TopTokens(NamedTuple):
  """What `make_top_tokens` makes, for the n supervised positions of a Batch [B, T] of numpy, row by row.

  top(batch) -> ids int32 [n, k] and float32 [n, k] log-probabilities, likeliest first.
  logits(batch, count) -> float32 [min(n, count), V] dense logits of the first `count` of them.
  """

  top: Callable[[Batch], tuple[np.ndarray, np.ndarray]]
  logits: Callable[[Batch, int], np.ndarray]


def make_top_tokens(
    config: TransformerConfig, params: Params, *, vocab_size: int, k: int, temperature: float = 1.0,
    chunk: int | None = None,
) -> TopTokens:
  """Opens a model for one set of parameters, under the current mesh.

  Args:
    params: the model's parameters; a copy in the compute dtype is taken.
    vocab_size: rows of the unembedding that count, the tokenizer's; those behind it pad, and get no probability.
    k: how many tokens of each distribution.
    temperature: divides the logits.
    chunk: positions of a device whose logits are formed at once; None as the lm head chooses.

  Raises:
    ValueError: k is not within 1 and vocab_size, or the temperature not positive (when `top` is called).
  """
  cast = jax.jit(transformer.cast, static_argnums=1)(params, config.dtype)

  @jax.jit
  def hidden_states(params, batch):
    return transformer.Transformer(config).apply(
        transformer.variables(params), batch.inputs, positions=batch.positions, segment_ids=batch.segment_ids,
        logits_at=(),
    ).hidden

  def top(batch):
    hidden, kernel = hidden_states(cast, _placed(batch)), _unembedding(cast, vocab_size)
    options = dict(k=k, temperature=temperature, chunk=chunk or _chunk(batch, vocab_size))
    found = _top(hidden, _placed(batch.loss_mask), kernel, **options)
    supervised = batch.loss_mask > 0
    return tuple(np.asarray(field)[supervised] for field in jax.device_get(found))

  def logits(batch, count):
    rows, columns = (places[:count] for places in np.nonzero(batch.loss_mask))
    chosen = hidden_states(cast, _placed(batch))[rows, columns]
    return np.asarray(_logits(chosen, _unembedding(cast, vocab_size)))

  return TopTokens(top, logits)


def _placed(tree: Any):
  mesh = jax.sharding.get_mesh()
  return tree if mesh.empty else sharding.shard_rows(tree, mesh)


def _chunk(batch: Batch, vocab_size: int) -> int:
  mesh = sharding.current_mesh()
  tokens = batch.inputs.size // (1 if mesh is None else mesh.size)
  return lm_head.default_chunk(tokens, vocab_size, platform=jax.default_backend())


@functools.partial(jax.jit, static_argnums=1)
def _unembedding(params, vocab_size):
  return heads.unembedding(params, vocab_size)


def _logits(hidden, kernel):
  return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnames=('k', 'temperature', 'chunk'))
def _top(hidden, mask, kernel, *, k, temperature, chunk):
  """hidden [B, T, D], mask [B, T], kernel [D, V] -> ids and log-probabilities [B, T, k], 0 beyond the last chunk."""
  rows, length, dim = hidden.shape
  sweep = functools.partial(_sweep, k=k, temperature=temperature, chunk=chunk)
  mesh = sharding.current_mesh()
  if mesh is not None and rows * length % mesh.size == 0:
    tokens = PartitionSpec(mesh.axis_names)
    sweep = jax.shard_map(
        functools.partial(sweep, axes=mesh.axis_names), mesh=mesh, in_specs=(tokens, tokens, PartitionSpec()),
        out_specs=(tokens, tokens),
    )
  found = sweep(hidden.reshape(-1, dim), mask.reshape(-1), kernel)
  return jax.tree.map(lambda x: x.reshape(rows, length, k), found)


def _sweep(hidden, mask, kernel, *, k, temperature, chunk, axes=()):
  """The tokens of one device: hidden [n, D], mask [n] -> [n, k] twice."""
  size = hidden.shape[0]
  order = jnp.argsort(mask == 0, stable=True)
  order = jnp.pad(order, (0, -size % chunk), constant_values=size)  # out of bounds is dropped below
  used = jnp.sum(mask > 0)

  def one(index, found):
    places = jax.lax.dynamic_slice_in_dim(order, index * chunk, chunk)
    logits = _logits(hidden.at[places].get(mode='fill', fill_value=0), kernel)
    best = top_k.truncate(logits, k=k, temperature=temperature)
    return tuple(x.at[places].set(new, mode='drop') for x, new in zip(found, (best.ids, best.logprobs), strict=True))

  start = tuple(jnp.zeros((size, k), dtype) for dtype in (jnp.int32, jnp.float32))
  start = jax.lax.pcast(start, axes, to='varying') if axes else start
  return jax.lax.fori_loop(0, (used + chunk - 1) // chunk, one, start)
