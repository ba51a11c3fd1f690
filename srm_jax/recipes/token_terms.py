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
from srm_jax.losses.distillation import DIVERGENCES, WHOLE_VOCABULARY
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
  axis_name: str | tuple[str, ...] | None


class TokenTerm(NamedTuple):
  """fn(Tokens) -> [n]; numbers: its scheduled options; teacher: whether it reads the teacher's logits; whole: needs the
  vocabulary on one device.
  """

  fn: Callable[[Tokens], Any]
  numbers: Mapping[str, schedules.Schedule]
  teacher: bool
  spoken: str
  whole: bool = False


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


def _open_numbers(numbers: Mapping[str, Any], where: str):
  """(plain numbers, schedules) of a term's options."""
  opened = {key: schedules.schedule(value, f'{where}.{key}') for key, value in numbers.items()}
  plain = {key: value for key, value in numbers.items() if schedules.is_number(value)}
  return plain, {key: changing for key, changing in opened.items() if key not in plain}


def _divergence(options, where) -> TokenTerm:
  config = schema.parse(DivergenceConfig, options, where)
  schema.bind(f'divergence of {where}', config.name, config.options, DIVERGENCES, given=('temperature', 'axis_name'))
  numbers = {**config.options, 'temperature': config.temperature}
  plain, changing = _open_numbers(numbers, where)
  divergence = DIVERGENCES[config.name]
  _try(divergence, np.zeros((1, 4), np.float32), numbers, where)

  def fn(tokens):
    given = {**plain, **tokens.numbers}
    value = divergence(tokens.student_logits, tokens.teacher_logits, axis_name=tokens.axis_name, **given)
    return given['temperature'] ** 2 * value if config.scale_by_squared_temperature else value

  said = ''.join(f', {key}={schedules.spoken(value)}' for key, value in config.options.items())
  spoken = f'{config.name}(T={schedules.spoken(config.temperature)}{said})'
  if config.scale_by_squared_temperature:
    spoken = f'T^2 {spoken}'
  return TokenTerm(fn, changing, True, spoken, config.name in WHOLE_VOCABULARY)


def _top_k(options, where) -> TokenTerm:
  config = schema.parse(TopKConfig, options, where)
  schema.bind(f'top-k divergence of {where}', config.name, config.options, top_k.TOP_K, given=('policy', 'axis_name'))
  plain, changing = _open_numbers(config.options, where)
  divergence = functools.partial(top_k.TOP_K[config.name], policy=config.policy)
  known = top_k.TopK(np.arange(2)[None], np.full((1, 2), np.log(0.25), np.float32), np.full(1, 0.5, np.float32))
  _try(divergence, known, config.options, where)

  def fn(tokens):
    teacher = top_k.TopK(tokens.known['ids'], tokens.known['logprobs'], tokens.known['tail'])
    return divergence(tokens.student_logits, teacher, axis_name=tokens.axis_name, **plain, **tokens.numbers)

  said = ''.join(f', {key}={schedules.spoken(value)}' for key, value in config.options.items())
  return TokenTerm(fn, changing, False, f'{config.name} to the cached teacher ({config.policy}{said})')


def _try(divergence, teacher, numbers, where):
  """Traces a divergence at both ends of its schedules, so that an impossible option is found when a config is opened:
  traced numbers are not looked at.
  """
  for end in (0, 1):
    given = {key: schedules.ends(value)[end] for key, value in numbers.items()}
    try:
      jax.eval_shape(functools.partial(divergence, **given), np.zeros((1, 4), np.float32), teacher)
    except ValueError as error:
      raise schema.ConfigError(f'{where}: {error}') from error


TOKEN_TERMS: dict[str, Callable[[Mapping[str, Any], str], TokenTerm]] = {
    'cross_entropy': _cross_entropy,
    'divergence': _divergence,
    'top_k': _top_k,
}
