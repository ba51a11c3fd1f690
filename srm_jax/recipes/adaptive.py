"""Shares of the domains of a mix that follow the student: more rows where it lags further behind its teacher.

  share_i = (1 - s) softmax_i(r) + s / N,   r_i = exp(L_student,i - L_teacher,i)

L_i is the cross-entropy a token on held-out examples of domain i, and r_i the ratio of perplexities; s smooths.
Left out: averaging over measurements.
Reference: Liu et al., DDK: Distilling Domain Knowledge for Efficient Large Language Models, arXiv:2407.16154.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from srm_jax import schema, sharding
from srm_jax.data import mixing, packing
from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import sft
from srm_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class AdaptiveConfig:
  """every: steps from one measurement to the next. held_out: examples of every domain that are measured, not learnt.
  smoothing: s in [0, 1]; 1 keeps the shares equal.
  """

  every: int
  held_out: int
  smoothing: float

  def __post_init__(self):
    if self.every < 1 or self.held_out < 1 or not 0 <= self.smoothing <= 1:
      raise ValueError(f'{self} is out of range: every and held_out start at 1, smoothing lies between 0 and 1')


def gap_shares(student: Sequence[float], teacher: Sequence[float], *, smoothing: float) -> np.ndarray:
  """Shares of N domains from cross-entropies a token, in nats: float [N], summing to 1."""
  ratio = np.exp(np.asarray(student, np.float64) - np.asarray(teacher, np.float64))
  weights = np.exp(ratio - ratio.max())
  return (1 - smoothing) * weights / weights.sum() + smoothing / len(ratio)


def hold_out(parts: Mapping[str, Sequence[packing.Example]], count: int, *, seed: int):
  """({name: examples to learn}, {name: `count` examples to measure}).

  Raises:
    ConfigError: a part has too few examples.
  """
  learnt, measured = {}, {}
  for number, name in enumerate(sorted(parts)):
    examples = parts[name]
    if len(examples) <= count:
      raise schema.ConfigError(
          f'data.mix.{name} has {len(examples)} examples; fix: adaptive.held_out={count} must leave some to learn'
      )
    order = packing.permutation(len(examples), seed, number)
    measured[name] = [examples[i] for i in order[:count]]
    learnt[name] = [examples[i] for i in sorted(order[count:])]
  return learnt, measured


def cross_entropy(model: TransformerConfig) -> Callable[[Any, Batch], Any]:
  """(params, batch) -> cross-entropy a supervised token, compiled."""
  objective = sft.objective(model, head_chunk=None)

  @jax.jit
  def mean(params, batch):
    terms, _ = objective.terms({'model': params}, batch, {}, None)
    return terms['cross_entropy'][1] / sft.count_tokens(batch)

  return mean


def shares(
    config: AdaptiveConfig, measured: Mapping[str, Sequence[packing.Example]], *, length: int,
    student: TransformerConfig, teacher: TransformerConfig, teacher_params: Any,
) -> mixing.Shares:
  """Shares that are measured anew every `config.every` steps, from the first on; in between they stay.

  measured: {domain: held-out examples}. The teacher is asked once, at the first measurement.
  """
  batches = [packing.pad_batch(examples, length) for _, examples in sorted(measured.items())]
  of_student, of_teacher, known = cross_entropy(student), cross_entropy(teacher), []

  def at(params, step: int, last: Sequence[float]) -> Sequence[float]:
    if step % config.every:
      return last
    mesh = sharding.current_mesh()
    placed = [batch if mesh is None else jax.device_put(batch, sharding.replicated(mesh)) for batch in batches]
    if not known:
      theirs = teacher_params if mesh is None else jax.device_put(
          teacher_params, sharding.shardings(transformer.param_names(teacher), teacher_params, mesh)
      )
      known.extend(float(of_teacher(theirs, batch)) for batch in placed)
    ours = [float(of_student(params['model'], batch)) for batch in placed]
    return gap_shares(ours, known, smoothing=config.smoothing).tolist()

  return at
