"""Who teaches: nobody, one model, or several whose next-token distributions are mixed, by domain where data are a mix.

  config.recipe.teacher = 'runs/teacher'
  config.recipe.teacher = {'algebra': {'folder': 'runs/a', 'weight': 1.0},
                           'law': {'folder': 'runs/b', 'weight': {'contracts': 1.0, 'sums': 0.0}}}

Weights are of the mixture sum_k w_k p_k / sum_k w_k. A section of weights names the parts of the data's mix: with zeros
and ones it routes every example to its teacher.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from srm_jax import schema
from srm_jax.losses.teacher_mixture import mixture_logprobs
from srm_jax.models.config import TransformerConfig

ONE = 'teacher'  # its name among the frozen models


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
  """folder: a run or a published model. weight: a number, or {part of the mix: number}."""

  folder: str
  weight: Any


class Teachers(NamedTuple):
  """configs: {name among the frozen models: TransformerConfig}; empty where nobody teaches.

  weights: float32 [sources or 1, K] in their order, or None where there are fewer than two.
  """

  configs: Mapping[str, TransformerConfig]
  weights: np.ndarray | None = None

  @property
  def one(self) -> TransformerConfig | None:
    """The only teacher there is; None where there is none, or more than one."""
    return next(iter(self.configs.values())) if len(self.configs) == 1 else None


def alone(config: TransformerConfig | None) -> Teachers:
  """One teacher, or none."""
  return Teachers({} if config is None else {ONE: config})


def folders(section: Any) -> dict[str, str]:
  """{name among the frozen models: folder} of a section `recipe.teacher`.

  Raises:
    ConfigError: it is neither a folder nor a section of teachers.
  """
  if isinstance(section, str):
    return {ONE: section} if section else {}
  return {f'{ONE}/{name}': one.folder for name, one in _several(section).items()}


def weights(section: Any, sources: Sequence[str]) -> np.ndarray | None:
  """float32 [sources or 1, K], or None where there are no several teachers.

  Args:
    section: `recipe.teacher`.
    sources: names of the parts of the data's mix, in their order; () where it is one data set.

  Raises:
    ConfigError: a weight is negative or of a part that is not there, or a part has no teacher.
  """
  if isinstance(section, str):
    return None
  table = np.array([_row(f'teacher.{name}.weight', one.weight, sources) for name, one in _several(section).items()]).T
  for source, row in zip(sources or ('the data',), table):
    if row.sum() == 0:
      raise schema.ConfigError(f'no teacher has a weight on {source}; fix: teacher.NAME.weight')
  return table.astype(np.float32)


def _several(section) -> dict[str, TeacherConfig]:
  if not isinstance(section, Mapping) or not section:
    raise schema.ConfigError(f'config.recipe.teacher is {section!r}; expected a folder, or {{name: folder and weight}}')
  return {name: schema.parse(TeacherConfig, section[name], f'teacher.{name}') for name in sorted(section)}


def _row(where: str, weight, sources: Sequence[str]) -> list[float]:
  """A teacher's weight on every source."""
  given = dict(weight) if isinstance(weight, Mapping) else dict.fromkeys(sources or ('',), weight)
  for source in given:
    if source not in (sources or ('',)):
      raise schema.unknown(f'{where}: part of data.mix', source, sources)
  for value in given.values():
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float('inf'):
      raise schema.ConfigError(f'{where} is {weight!r}; expected numbers from 0 on')
  return [float(given.get(source, 0.0)) for source in (sources or ('',))]


def by_token(teachers: Teachers, batch):
  """float32 [B, T, K]: the weights of every token; None where there are no several teachers."""
  if teachers.weights is None:
    return None
  table = jnp.asarray(teachers.weights)
  source = jnp.zeros_like(batch.inputs) if len(table) == 1 else batch.sources
  return table[jnp.maximum(source, 0)]


def combined(logits, token_weights, *, axis_name):
  """What losses take for the teacher's logits. logits: tuple of [n, V]; token_weights: [n, K], or None for one."""
  if not logits:
    return None
  return logits[0] if token_weights is None else mixture_logprobs(logits, token_weights, axis_name=axis_name)
