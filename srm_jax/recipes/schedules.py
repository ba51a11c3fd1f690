"""Numbers that may change over a run: the weight of a term, a temperature, the share of on-policy batches.

In a config such a number is 0.5, or {'name': 'linear', 'start': 0.5, 'end': 0.0, 'steps': 200}.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import optax

from srm_jax import schema

Schedule = Callable[[Any], Any]  # step -> number; steps and numbers may be traced


def _linear(*, start, end, steps, delay=0):
  return optax.linear_schedule(start, end, steps, delay)


def _cosine(*, start, end, steps, delay=0):
  rise = optax.cosine_decay_schedule(1.0, steps)
  wait = optax.constant_schedule(start)
  return optax.join_schedules([wait, lambda step: end + (start - end) * rise(step)], [delay])


def _switch(*, start, end, steps):
  return optax.join_schedules([optax.constant_schedule(start), optax.constant_schedule(end)], [steps])


SCHEDULES: dict[str, Callable[..., Schedule]] = {'linear': _linear, 'cosine': _cosine, 'switch': _switch}

LOWEST = {'steps': 1, 'delay': 0}  # of the options that count steps


def is_number(value) -> bool:
  """Whether a config's value is a plain finite number rather than a schedule."""
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def schedule(value: Any, where: str) -> Schedule:
  """A config's number as a function of the step.

  Raises:
    ConfigError: neither a number nor the name and options of one of SCHEDULES, or an option out of its range.
  """
  if is_number(value):
    return lambda step: float(value)
  if not isinstance(value, Mapping) or 'name' not in value:
    raise schema.ConfigError(
        f"{where} is {value!r}; give a number, or a schedule such as "
        "{'name': 'linear', 'start': 1.0, 'end': 0.0, 'steps': 100}"
    )
  options = {key: number for key, number in value.items() if key != 'name'}
  made = schema.bind(f'schedule of {where}', value['name'], options, SCHEDULES)
  for key, number in options.items():
    lowest = LOWEST.get(key)
    if not is_number(number) or (lowest is not None and (not isinstance(number, int) or number < lowest)):
      expected = 'a number' if lowest is None else f'a whole number, at least {lowest}'
      raise schema.ConfigError(f'{where}.{key} is {number!r}; expected {expected}')
  return made()


def ends(value: Any) -> tuple[float, float]:
  """The first and the last of a config's number or schedule; all others lie between them."""
  return (value, value) if is_number(value) else (value['start'], value['end'])


def spoken(value: Any) -> str:
  """The number or schedule in a few words, for what a run prints."""
  if is_number(value):
    return f'{value:g}'
  return f'{value["start"]:g} to {value["end"]:g} ({value["name"]}, {value["steps"]} steps)'
