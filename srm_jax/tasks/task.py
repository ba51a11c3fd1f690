"""What a task is: problems, prompts, worked solutions and grades, as a record of functions.

A completion is rationale lines followed by '#### answer'. The same `grade` is the reward of reinforcement learning,
the filter of annotation and the score of evaluation.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Sequence

from srm_jax.types import Problem

ANSWER_CUE = '#### '
CHANCE_COUNT = 1000
_EQUATION = re.compile(r'[-+*/().,$%\d ]++=[ $]*-?\d[\d.,]*')


def normalised_text(text: str) -> str:
  """The words of a text, one space apart."""
  return ' '.join(text.split())


def equations(text: str) -> str:
  """The equations of a text, a line each, without spaces, dollar signs and commas: chains that say the same sums in
  other words take one path. The normalised text where there is none.

  Reference: Yuan et al., Scaling Relationship on Learning Mathematical Reasoning with Large Language Models, RFT,
  arXiv 2308.01825.
  """
  found = [re.sub(r'[ $,]', '', one).strip('.') for one in _EQUATION.findall(text)]
  return '\n'.join(one for one in found if one[0] != '=') or normalised_text(text)


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
  path(text) -> what two completions share that reason alike, of which rejection sampling keeps one.
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
  path: Callable[[str], str] = normalised_text
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
