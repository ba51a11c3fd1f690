"""Grades of completions: the reward of RL, the filter of annotation and the score of evaluation are one number.

RL may add shaping to it. `REWARDS` are fn(seen, ...) -> float or None, of one completion; a run's reward is their
weighted sum, with what models say of a group, and each is reported apart. None says that a completion cannot be scored:
it is left out of baselines and counted. So is one whose reward is not finite, raises or takes longer than it may.
"""

import contextlib
import functools
import logging
import math
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from srm_jax.tasks.task import Task
from srm_jax.types import Completion, Problem

_LOG = logging.getLogger(__name__)
BUDGET = 'budget'  # of a problem's metadata: the tokens that its prompt asks for


class Graded(NamedTuple):
  """One completion with its grade. reward is None where it cannot be scored.

  correct: the task's own grade. parts: {name: value} of a weighted sum.
  """

  problem: Problem
  completion: Completion
  reward: float | None
  correct: float | None = None
  parts: Mapping[str, float | None] = {}


class Seen(NamedTuple):
  """What a reward looks at. correct: the task's grade, None where there is none."""

  task: Task
  problem: Problem
  completion: Completion
  correct: float | None


class Part(NamedTuple):
  """One summand of a reward: weight times fn(seen), or of a model fn([graded, ...]) of a whole group."""

  weight: float
  fn: Callable[..., Any]


class Grading(NamedTuple):
  """How groups are graded.

  grade: (task, problem, completions) -> [Graded], code that one host runs. judge: [Graded] -> [Graded] with what models
  say of the group, which run on the devices of all hosts; None where none is asked.
  """

  grade: Callable[..., list[Graded]]
  judge: Callable[[list[Graded]], list[Graded]] | None = None


def task_grade(seen: Seen) -> float | None:
  """The task's own grade of the answer."""
  return seen.correct


def has_format(seen: Seen) -> float:
  """1 where the completion ends by itself, with exactly one line of the answer and nothing behind it."""
  lines = seen.completion.text.strip().splitlines()
  cue = seen.task.answer_cue.strip()
  cued = [line.startswith(cue) for line in lines]
  return float(seen.completion.finished and sum(cued) == 1 and cued[-1] and lines[-1].strip() != cue)


def soft_overlong(seen: Seen, *, max_length: int, cache: int) -> float:
  """DAPO's penalty of length, in tokens: 0 up to max_length - cache, then falling to -1 at max_length, and -1 beyond.

  Reference: Yu et al., DAPO, arXiv 2503.14476.
  """
  _check(0 < cache <= max_length, f'cache {cache} of soft_overlong must lie between 1 and max_length {max_length}')
  return -min(max((_length(seen) - (max_length - cache)) / cache, 0.0), 1.0)


def length_exact(seen: Seen, *, alpha: float = 3e-4) -> float | None:
  """LCPO-Exact: 1[right] - alpha |n_gold - n|, for prompts that ask for n_gold tokens.

  Reference: Aggarwal and Welleck, L1: Controlling How Long A Reasoning Model Thinks, arXiv 2503.04697.
  """
  return None if seen.correct is None else seen.correct - alpha * abs(_budget(seen) - _length(seen))


def length_max(seen: Seen, *, alpha: float = 3e-4, delta: float = 0.5) -> float | None:
  """LCPO-Max: 1[right] clip(alpha (n_gold - n) + delta, 0, 1), for prompts that allow n_gold tokens.

  Reference: Aggarwal and Welleck, L1: Controlling How Long A Reasoning Model Thinks, arXiv 2503.04697.
  """
  if seen.correct is None:
    return None
  return seen.correct * min(max(alpha * (_budget(seen) - _length(seen)) + delta, 0.0), 1.0)


def cosine(
    seen: Seen, *, max_length: int, right: tuple = (1.0, 0.5), wrong: tuple = (-1.0, -0.5),
) -> float | None:
  """A grade that moves with the length along half a cosine: right answers are better short, wrong ones better long.

  end + (start - end) (1 + cos(pi n / max_length)) / 2,  (start, end) = right or wrong

  Reference: Yeo et al., Demystifying Long Chain-of-Thought Reasoning in LLMs, arXiv 2502.03373.
  """
  if seen.correct is None:
    return None
  start, end = right if seen.correct > 0.5 else wrong
  return end + (start - end) * (1 + math.cos(math.pi * min(_length(seen) / max_length, 1.0))) / 2


def repetition(seen: Seen, *, ngram: int = 3) -> float:
  """-(1 - distinct n-grams / n-grams) of the tokens: 0 where nothing is said twice.

  Reference: Yeo et al., Demystifying Long Chain-of-Thought Reasoning in LLMs, arXiv 2502.03373.
  """
  tokens = seen.completion.tokens
  grams = [tokens[i : i + ngram] for i in range(len(tokens) - ngram + 1)]
  return len(set(grams)) / len(grams) - 1.0 if grams else 0.0


def _length(seen: Seen) -> int:
  return len(seen.completion.tokens)


def _budget(seen: Seen) -> int:
  budget = seen.problem.metadata.get(BUDGET)
  _check(budget is not None, f'problem {seen.problem.id!r} asks for no number of tokens; fix: data.budget=(low, high)')
  return budget


def _check(fine: bool, otherwise: str):
  if not fine:
    raise ValueError(otherwise)


REWARDS: dict[str, Callable[..., float | None]] = {
    'task': task_grade,
    'format': has_format,
    'soft_overlong': soft_overlong,
    'length_exact': length_exact,
    'length_max': length_max,
    'cosine': cosine,
    'repetition': repetition,
}


def grade(task: Task, problem: Problem, completions: Sequence[Completion]) -> list[Graded]:
  """Grades the completions of one problem; a cut completion is graded as it stands."""
  graded = ((one, task.grade(problem, one.text)) for one in completions)
  return [Graded(problem, completion, right, right) for completion, right in graded]


def make_grade(parts: Mapping[str, Part], *, seconds: float = 10.0) -> Callable[..., list[Graded]]:
  """`grade` with the weighted sum of several rewards in the place of the task's grade.

  Args:
    parts: {name: Part}.
    seconds: that each may take for one completion (on the main thread of a POSIX system; elsewhere there is no bound).

  Returns:
    (task, problem, completions) -> graded completions. A part that raises, hangs or gives no finite number makes a
    completion unscorable; the first time, its name and the reason are logged.
  """
  guarded = _guard(functools.partial(_time_limit, seconds))

  def make(task: Task, problem: Problem, completions: Sequence[Completion]) -> list[Graded]:
    right = [guarded('task', problem, task.grade, problem, one.text) for one in completions]
    seen = [Seen(task, problem, one, grade) for one, grade in zip(completions, right, strict=True)]
    columns = {name: [guarded(name, problem, part.fn, one) for one in seen] for name, part in parts.items()}
    graded = []
    for row, one in enumerate(seen):
      values = {name: values[row] for name, values in columns.items()}
      known = all(value is not None for value in values.values())
      reward = sum(part.weight * values[name] for name, part in parts.items()) if known else None
      graded.append(Graded(problem, one.completion, reward, one.correct, values))
    return graded

  return make


def make_judge(models: Mapping[str, Part]) -> Callable[[list[Graded]], list[Graded]]:
  """(graded completions of a group) -> the same with the weighted values of models added.

  There is no limit of time, which hosts that compute together could judge differently. What a model raises on makes a
  group unscorable, as in `make_grade`.
  """
  guarded = _guard(contextlib.nullcontext)

  def judge(group: list[Graded]) -> list[Graded]:
    for name, part in models.items():
      values = guarded(name, group[0].problem, part.fn, group) or [None] * len(group)
      group = [_plus(one, name, part.weight, value) for one, value in zip(group, values, strict=True)]
    return group

  return judge


def _plus(one: Graded, name: str, weight: float, value: float | None) -> Graded:
  reward = None if one.reward is None or value is None else one.reward + weight * value
  return one._replace(reward=reward, parts={**one.parts, name: value})


def _guard(limit: Callable[[], contextlib.AbstractContextManager]):
  """(name, problem, fn, *arguments) -> what fn gives within the limit; None, and the first time a word about it, where
  it gives nothing that counts.
  """
  reported: set[str] = set()

  def guarded(name: str, problem: Problem, fn, *arguments):
    try:
      with limit():
        value = fn(*arguments)
      if value is None or np.all(np.isfinite(value)):
        return value
      reason = f'gave {value}'
    except (Exception, _TookTooLong) as error:  # a reward is the user's code: what it raises costs one completion
      reason = f'raised {error!r}'
    if name not in reported:
      reported.add(name)
      _LOG.warning('reward %s %s on problem %s; what it fails on counts as unscorable', name, reason, problem.id)
    return None

  return guarded


class _TookTooLong(BaseException):
  """A reward did not come back in time. No Exception, which a reward may catch."""


@contextlib.contextmanager
def _time_limit(seconds: float):
  """Raises _TookTooLong inside after `seconds`, where a signal can: on the main thread of a POSIX system."""
  if not hasattr(signal, 'setitimer') or threading.current_thread() is not threading.main_thread():
    yield
    return

  def stop(number, frame):
    raise _TookTooLong(f'no answer in {seconds:g} seconds')

  before = signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def reward_arrays(groups: Sequence[Sequence[Graded]]) -> tuple[np.ndarray, np.ndarray]:
  """(rewards, valid), both float32 [P, G]; an unscorable completion has reward 0 and valid 0."""
  return known_arrays([[one.reward for one in group] for group in groups])


def known_arrays(values) -> tuple[np.ndarray, np.ndarray]:
  """(values with 0 for None, 1 where they are known), both float32."""
  filled = [[0.0 if value is None else value for value in row] for row in values]
  known = [[value is not None for value in row] for row in values]
  return np.array(filled, np.float32), np.array(known, np.float32)
