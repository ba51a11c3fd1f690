"""Sums of digits modulo ten, worked in whatever order: a task of many valid chains, every step of which can be checked.

  3+8+4+9     8+4=2, 2+9=1, 1+3=4, '#### 4': any of the terms comes next; 3+8=1, 1+4=5, 5+9=4 ends alike

Of n terms n! chains are right. Which one a worked solution follows hangs on a hash of the problem, which no model can
foresee: all that it can learn is to go on with some term that is left.
"""

from __future__ import annotations

import dataclasses
import random
import re

from srm_jax.tasks import graders, running_sums, task
from srm_jax.types import Problem

TERMS = 5


def chain(problem: Problem) -> str:
  """One of the orders, as the problem's hash has it: '3+8+4' -> '8+4=2', '2+3=5'."""
  total, *terms = random.Random(task.stable_hash(f'order {problem.question}')).sample(
      running_sums.digits_of(problem), problem.question.count('+') + 1
  )
  lines = []
  for term in terms:
    lines.append(f'{total}+{term}={(total + term) % 10}')
    total = (total + term) % 10
  return '\n'.join(lines)


def first_wrong_step(problem: Problem, text: str) -> int | None:
  """Index of the first line that does not go on from the line before with a term that is left, or sums wrongly."""
  left, total, lines = running_sums.digits_of(problem), None, text.strip().splitlines()
  for index, line in enumerate(lines):
    if not left:
      return None if line == f'{task.ANSWER_CUE}{total}' and index == len(lines) - 1 else index
    step = re.fullmatch(r'(\d)\+(\d)=(\d)', line)
    if step is None:
      return index
    before, term, after = map(int, step.groups())
    if total is None and before in left:
      left.remove(before)
      total = before
    if before != total or term not in left or after != (before + term) % 10:
      return index
    left.remove(term)
    total = after
  return len(lines)


def orders_task(name: str, *, terms: int = TERMS) -> task.Task:
  """A task of such sums; problems and splits are those of running sums of so many terms."""

  def problems(split: str, *, count: int | None = None, seed: int = 0) -> list[Problem]:
    task.check_split(name, split, running_sums.SPLITS)
    most = running_sums.most_of(split, terms)
    count = min(running_sums.DEFAULT_COUNT, most) if count is None else count
    found = running_sums.problems_of(chain, split, count=count, seed=seed, terms=terms)
    return [dataclasses.replace(one, metadata={**one.metadata, 'steps': terms - 1}) for one in found]

  return task.Task(
      name=name, domain='math', splits=running_sums.SPLITS, problems=problems, prompt=task.question_prompt,
      solution=task.worked_solution, extract=graders.extract_hash_answer, grade=running_sums.grade,
      first_wrong_step=first_wrong_step, path=task.equations,
  )
