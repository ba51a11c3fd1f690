"""Terms of a loss that are numbers of one token: computed together, in one sweep over the lm head.

  fn(tokens) -> [n],  tokens: logits of student and teacher, targets, and what else the batch knows of each token

A term never sees its weight, mask or schedule: `recipes.distill` folds them into what the sweep sums.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from srm_jax import schema
from srm_jax.losses import cross_entropy, top_k
from srm_jax.losses.distillation import DIVERGENCES
from srm_jax.recipes import schedules


class Tokens(NamedTuple):
  """A chunk of n tokens. student_logits, teacher_logits (None without a teacher): [n, V]. targets: int [n].

  numbers: scheduled options of the term. known: {name: [n, ...]} of a cached teacher. axis_name: splits V, or None.
  """

  student_logits: Any
  teacher_logits: Any
  targets: Any
  numbers: Mapping[str, Any]
  known: Mapping[str, Any]
  axis_name: str | None


class TokenTerm(NamedTuple):
  """fn(Tokens) -> [n]; numbers: its scheduled options; teacher: whether it reads the teacher's logits."""

  fn: Callable[[Tokens], Any]
  numbers: Mapping[str, schedules.Schedule]
  teacher: bool
  spoken: str


@dataclasses.dataclass(frozen=True)
class DivergenceConfig:
  """name: from DIVERGENCES, its options in `options`; they and the temperature may be schedules.

  scale_by_squared_temperature: multiplies by T^2, which keeps gradients of one size over temperatures (Hinton et al.).
  """

  name: str
  options: Mapping[str, Any]
  temperature: Any
  scale_by_squared_temperature: bool


@dataclasses.dataclass(frozen=True)
class TopKConfig:
  """A divergence to a cached teacher. name: from top_k.TOP_K_DIVERGENCES; policy: what becomes of the missing mass."""

  name: str
  policy: str
  options: Mapping[str, Any]


def _cross_entropy(options, where) -> TokenTerm:
  if options:
    raise schema.unknown(f'option of {where}', next(iter(options)), ())

  def fn(tokens):
    return cross_entropy.cross_entropy(tokens.student_logits, tokens.targets, axis_name=tokens.axis_name)

  return TokenTerm(fn, {}, False, 'cross-entropy')


def _split_schedules(options: Mapping[str, Any], where: str):
  """(plain numbers, schedules) of a term's options."""
  changing = {key: value for key, value in options.items() if isinstance(value, Mapping)}
  plain = {key: value for key, value in options.items() if key not in changing}
  return plain, {key: schedules.schedule(value, f'{where}.{key}') for key, value in changing.items()}


def _divergence(options, where) -> TokenTerm:
  config = schema.parse(DivergenceConfig, options, where)
  plain, changing = _split_schedules({**config.options, 'temperature': config.temperature}, where)
  schema.bind('divergence', config.name, {**config.options, 'temperature': config.temperature}, DIVERGENCES)
  divergence = DIVERGENCES[config.name]
  _try(divergence, np.zeros((1, 4), np.float32), plain, where)

  def fn(tokens):
    given = {**plain, **tokens.numbers}
    value = divergence(tokens.student_logits, tokens.teacher_logits, axis_name=tokens.axis_name, **given)
    return given['temperature'] ** 2 * value if config.scale_by_squared_temperature else value

  said = ''.join(f', {key}={schedules.spoken(value)}' for key, value in config.options.items())
  spoken = f'{config.name}(T={schedules.spoken(config.temperature)}{said})'
  if config.scale_by_squared_temperature:
    spoken = f'T^2 {spoken}'
  return TokenTerm(fn, changing, True, spoken)


def _top_k(options, where) -> TokenTerm:
  config = schema.parse(TopKConfig, options, where)
  plain, changing = _split_schedules({**config.options, 'policy': config.policy}, where)
  schema.bind('top-k divergence', config.name, {**config.options, 'policy': config.policy}, top_k.TOP_K)
  divergence = top_k.TOP_K[config.name]
  known = top_k.TopK(np.arange(4)[None], np.full((1, 4), np.log(0.25), np.float32), np.zeros(1, np.float32))
  _try(divergence, known, plain, where)

  def fn(tokens):
    teacher = top_k.TopK(tokens.known['ids'], tokens.known['logprobs'], tokens.known['tail'])
    return divergence(tokens.student_logits, teacher, axis_name=tokens.axis_name, **plain, **tokens.numbers)

  said = ''.join(f', {key}={schedules.spoken(value)}' for key, value in config.options.items())
  return TokenTerm(fn, changing, False, f'{config.name} to the cached teacher ({config.policy}{said})')


def _try(divergence, teacher, plain, where):
  """Traces a divergence on a few numbers, so that an impossible option is found when the config is opened."""
  try:
    jax.eval_shape(functools.partial(divergence, **plain), np.zeros((1, 4), np.float32), teacher)
  except ValueError as error:
    raise schema.ConfigError(f'{where}: {error}') from error


TOKEN_TERMS: dict[str, Callable[[Mapping[str, Any], str], TokenTerm]] = {
    'cross_entropy': _cross_entropy,
    'divergence': _divergence,
    'top_k': _top_k,
}
