"""What a task is: problems, prompts, worked solutions and grades, as a record of functions.

A completion is rationale lines followed by '#### answer'. The same `grade` is the reward of reinforcement learning,
the filter of annotation and the score of evaluation.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence

from srm_jax.types import Problem

ANSWER_CUE = '#### '
CHANCE_COUNT = 1000


@dataclasses.dataclass(frozen=True)
class Task:
  """One task.

  problems(split, *, count=None, seed=0) -> list of Problem; splits lists the names it accepts.
  prompt(problem) -> text that ends with a newline.
  solution(problem) -> gold completion without end-of-text, or None where the problem has no rationale.
  extract(text) -> final answer of a completion, or None.
  grade(problem, text) -> 1.0 or 0.0; None where the completion cannot be scored at all (a missing answer is 0.0).
  first_wrong_step(problem, text) -> index into text.splitlines() of the first wrong line; None if all are right or
    the task has no step oracle. len(lines) says that the text stopped before the answer.
  answer_cue: appended to a prompt, it forces a direct answer; grade then wants cue + completion.
  """

  name: str
  domain: str
  splits: tuple[str, ...]
  problems: Callable[..., list[Problem]]
  prompt: Callable[[Problem], str]
  solution: Callable[[Problem], str | None]
  extract: Callable[[str], str | None]
  grade: Callable[[Problem, str], float | None]
  first_wrong_step: Callable[[Problem, str], int | None]
  answer_cue: str = ANSWER_CUE

  @functools.cached_property
  def chance(self) -> float:
    """Accuracy of the best constant answer on 1000 test problems."""
    return constant_accuracy(self.problems('test', count=CHANCE_COUNT))


def constant_accuracy(problems: Sequence[Problem]) -> float:
  """Accuracy of the one answer that is right most often on these problems: the chance line of a plot."""
  if not problems:
    raise ValueError('constant_accuracy of no problems; pass at least one')
  (_, hits), = collections.Counter(problem.answer for problem in problems).most_common(1)
  return hits / len(problems)


def question_prompt(problem: Problem) -> str:
  """The question and a newline."""
  return f'{problem.question.strip()}\n'


def worked_solution(problem: Problem) -> str | None:
  """Rationale lines, then '#### answer'; None where the problem has no rationale."""
  if problem.rationale is None:
    return None
  lines = [problem.rationale] if problem.rationale else []
  return '\n'.join([*lines, f'{ANSWER_CUE}{problem.answer}'])


def no_step_oracle(problem: Problem, text: str) -> None:
  """`first_wrong_step` of a task whose steps nobody can check."""
  del problem, text


def check_split(task: str, split: str, splits: Sequence[str]) -> None:
  """Raises ValueError that names the splits which exist."""
  if split not in splits:
    raise ValueError(f'task {task!r} has no split {split!r}; choose from {", ".join(splits)}')


def stable_hash(text: str) -> int:
  """64 bits of SHA-256: the same on every machine, process and Python version."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'big')
