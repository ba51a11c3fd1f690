"""Running sums of digits modulo ten: the smallest task with a chain whose every step can be checked.

  3+8+4+9     forward 154, from the left: 3+8, +4, +9 mod 10     backward 314, from the right: 9+4, +8, +3
              then '#### 4', the same either way

A chain is a pure function of a problem, so that what a teacher is made of is known digit by digit, and so is what a
student writes: `style_of` says which of the two ways a text follows. Which way a problem of the mixture is worked hangs
on a hash of it, which no model can foresee.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

from srm_jax.tasks import graders, task
from srm_jax.types import Problem

TERMS = 6
FAMILY = 'running_sums'
STYLES = ('forward', 'backward')
SPLITS = ('train', 'dev', 'test')
DEFAULT_COUNT = 1000
_BUCKETS = {0: 'test', 1: 'dev'}  # of ten; every other bucket is train


def digits_of(problem: Problem) -> list[int]:
  """'3+8+4' -> [3, 8, 4]."""
  return [int(digit) for digit in problem.question.split('+')]


def _sums(digits: Sequence[int]) -> str:
  return ''.join(str(total % 10) for total in list(itertools.accumulate(digits))[1:])


def forward(problem: Problem) -> str:
  """Sums from the left: '3+8+4+9' -> '154'."""
  return _sums(digits_of(problem))


def backward(problem: Problem) -> str:
  """Sums from the right: '3+8+4+9' -> '314'."""
  return _sums(digits_of(problem)[::-1])


def either_way(problem: Problem) -> str:
  """Forward or backward, as a coin that belongs to the problem falls."""
  return (forward, backward)[task.stable_hash(f'way {problem.question}') % 2](problem)


def with_slips(problem: Problem) -> str:
  """Sums from the left, where in every second problem a term is misread: '3+8+4+9' -> '154' or '176'."""
  coin, digits = task.stable_hash(f'slip {problem.question}'), digits_of(problem)
  slips, coin = coin % 2, coin // 2
  if slips:
    digits[1 + coin % (len(digits) - 1)] += 1 + coin // len(digits) % 9
  return _sums(digits)


def as_written(problem: Problem) -> str:
  """The rationale and the answer that it comes to, right or wrong."""
  return f'{problem.rationale}\n{task.ANSWER_CUE}{problem.rationale[-1]}'


def style_of(problem: Problem, text: str) -> str | None:
  """The way that a text's first digit sets out on, right or wrong after that; None for neither, and where both begin
  alike.
  """
  begins = {style: chain(problem)[0] for style, chain in zip(STYLES, (forward, backward))}
  if begins['forward'] == begins['backward']:
    return None
  return next((style for style in STYLES if text[:1] == begins[style]), None)


def is_valid(problem: Problem, text: str) -> bool:
  """Whether a text is one of the two chains from the first digit to the answer."""
  return text.strip() in [f'{chain(problem)}\n{task.ANSWER_CUE}{problem.answer}' for chain in (forward, backward)]


def is_mixed(problem: Problem, text: str) -> bool:
  """Whether every digit of a text's chain is of one of the two at its place, and neither chain is all of it."""
  line = text.partition('\n')[0]
  ways = forward(problem), backward(problem)
  return line not in ways and len(line) == len(ways[0]) and all(c in pair for c, *pair in zip(line, *ways))


def most_of(split: str, terms: int) -> int:
  """Problems that a split gives: four in five of those that it has, so that drawing comes to an end."""
  buckets = list(_BUCKETS.values()).count(split) or 10 - len(_BUCKETS)
  return 10**terms * buckets * 8 // 100


def problems_of(chain: Callable[[Problem], str], split: str, *, count: int, seed: int, terms: int) -> list[Problem]:
  """The first `count` distinct problems of a split, in the order of `seed`.

  Raises:
    ValueError: more than can be drawn of so few digits.
  """
  if count > most_of(split, terms):
    raise ValueError(f'{count} {split} problems of {terms} digits; there are {most_of(split, terms)} to be had')
  draw, found = random.Random(f'{FAMILY} {seed}'), {}
  while len(found) < count:
    question = '+'.join(str(draw.randrange(10)) for _ in range(terms))
    if _BUCKETS.get(task.stable_hash(question) % 10, 'train') == split and question not in found:
      blank = Problem(f'{FAMILY}-{question}', question, '', '', {'family': FAMILY, 'steps': 1})
      answer = str(sum(digits_of(blank)) % 10)
      found[question] = Problem(blank.id, question, answer, chain(blank), blank.metadata)
  return list(found.values())


def grade(problem: Problem, text: str) -> float:
  """1.0 where the last digit is right."""
  return float(graders.extract_hash_answer(text) == problem.answer)


def running_sums_task(
    name: str, chain: Callable[[Problem], str], *, terms: int = TERMS,
    solution: Callable[[Problem], str | None] = task.worked_solution,
) -> task.Task:
  """A task of running sums whose worked solutions are written by `chain`.

  No text is held against one chain digit by digit, as two are right.
  """

  def problems(split: str, *, count: int | None = None, seed: int = 0) -> list[Problem]:
    task.check_split(name, split, SPLITS)
    default = min(DEFAULT_COUNT, most_of(split, terms))
    return problems_of(chain, split, count=default if count is None else count, seed=seed, terms=terms)

  return task.Task(
      name=name, domain='math', splits=SPLITS, problems=problems, prompt=task.question_prompt,
      solution=solution, extract=graders.extract_hash_answer, grade=grade,
      first_wrong_step=task.no_step_oracle,
  )
