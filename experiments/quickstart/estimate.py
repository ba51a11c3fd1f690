"""Seconds that each stage of a line will take, from what was measured, and how far to shorten it to fit a budget."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from experiments.quickstart.calibrate import PROMPT_TOKENS, Speed

ANSWER_SHARE = 0.45  # of max_new_tokens that a batch decodes until its last row is done, about
ROW_SHARE = 0.5  # of a rollout's row length that the longest answer of a step needs, mostly: rows are cut to it
OVERHEAD = 1.5  # seconds a stage for data, checkpoints and programs from the cache
TOKENIZER = 4.0  # seconds
SMALLEST = 0.05


def seconds(config: Mapping[str, Any], speed: Speed) -> dict[str, float]:
  """{stage: estimated seconds} of a quickstart config."""
  seen: set[str] = set()
  return {name: _stage(name, config['stages'][name], speed, seen) for name in config['order']}


def _stage(name: str, section, speed: Speed, seen: set[str]) -> float:
  config = section['config']
  if section['run'] == 'tokenizer':
    return TOKENIZER
  if section['run'] == 'train':
    return OVERHEAD + speed.compile + config['num_steps'] * _step(config['recipe'], _who(name), speed)
  if section['run'] == 'annotate':
    answers = config['data']['count'] * config['sampling']['samples']
    return OVERHEAD + speed.compile + answers * _answer(config['sampling'], 'teacher', speed)
  if section['run'] == 'evaluate':
    return OVERHEAD + _evaluation(config, speed, seen)
  return 0.0


def _who(name: str) -> str:
  return 'teacher' if name.strip('{}') == 'teacher' else 'student'


def _answer(sampling, who: str, speed: Speed) -> float:
  return ANSWER_SHARE * sampling['max_new_tokens'] * speed.decode[who]


def _step(recipe, who: str, speed: Speed) -> float:
  """One step: forward and backward, the teacher's forward pass (a third of its training), and sampling."""
  if 'batch' in recipe:
    tokens, sampled = recipe['batch']['size'] * recipe['batch']['length'], 0.0
  else:
    rows = recipe['rollouts']['prompts'] * recipe['rollouts']['samples']
    tokens, sampled = ROW_SHARE * rows * recipe['rollouts']['length'], rows * _answer(recipe['rollouts'], who, speed)
  return tokens * (speed.train[who] + ('teacher' in recipe) * speed.train['teacher'] / 3) + sampled


def _evaluation(config, speed: Speed, seen: set[str]) -> float:
  """Samples that rows of one temperature share are drawn once; the first evaluation of a shape compiles."""
  who, rows = _who(config['model']), config['strategies'].values()
  drawn: dict[float, int] = {}
  for row in rows:
    if row['name'] != 'direct':
      drawn[row['temperature']] = max(drawn.get(row['temperature'], 0), row['samples'])
  scored = max((row['samples'] for row in rows if row['name'] == 'best_of_n'), default=0)
  tokens = PROMPT_TOKENS + ANSWER_SHARE * config['max_new_tokens']
  each = sum(drawn.values()) * _answer(config, who, speed) + scored * tokens * speed.train['teacher'] / 3
  compiling = 0.0 if who in seen else speed.compile
  seen.add(who)
  return compiling + config['data']['count'] * each


def fit(make: Callable[[float], Mapping[str, Any]], speed: Speed, budget: float) -> tuple[float, dict[str, float]]:
  """The largest factor on steps, at most 1, with which the estimate is within the budget.

  Args:
    make: factor -> config.
    budget: seconds.

  Returns:
    (factor, {stage: seconds} with it). The factor is never below SMALLEST: such an estimate may exceed the budget.
  """
  whole = seconds(make(1.0), speed)
  if sum(whole.values()) <= budget:
    return 1.0, whole
  least = seconds(make(SMALLEST), speed)
  slope = (sum(whole.values()) - sum(least.values())) / (1 - SMALLEST)
  factor = max(SMALLEST, math.floor(100 * (SMALLEST + (budget - sum(least.values())) / slope)) / 100)
  return factor, seconds(make(factor), speed)
