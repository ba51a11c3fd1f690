"""Longer ways to write the same sums: every step undone and said again, some wrong at first and corrected.

  4 + 3 - 5     4+3=7, so 7-3=4, ok 4+3=7, 7-5=2, so 2+5=7, ok 7-5=2

A chain is a pure function of a problem; which step goes wrong first hangs on a hash of it, which no model can foresee.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from srm_jax.tasks import task
from srm_jax.types import Problem

ERRORS = 10  # one step in so many is wrong at first in a checked chain


def terms_of(problem: Problem) -> list[int]:
  """The signed terms of a sum: '4 + 3 - 5' -> [4, 3, -5].

  Raises:
    ValueError: the problem is no plain sum.
  """
  expression = problem.metadata.get('expression', '')
  if not re.fullmatch(r'-?\d+( [+-] \d+)*', expression):
    raise ValueError(f'problem {problem.id}: {expression!r} is no sum of numbers; chains are of the family chain_sum')
  return [int(term) for term in expression.replace('+ ', '').replace('- ', '-').split(' ')]


def checked_steps(problem: Problem) -> list[str]:
  """Every step undone and said again; one in ten is wrong by one at first, does not undo, and is corrected."""
  total, *terms = terms_of(problem)
  lines: list[str] = []
  for number, term in enumerate(terms):
    lines += _checked(total, term, task.stable_hash(f'error {number} {problem.id}'))
    total += term
  return lines


def _checked(a: int, b: int, coin: int) -> list[str]:
  """Of one step: 4+3=7, so 7-3=4, ok 4+3=7."""
  right = [f'so {a + b}{-b:+d}={a}', f'ok {a}{b:+d}={a + b}']
  if coin % ERRORS:
    return [f'{a}{b:+d}={a + b}', *right]
  wrong = a + b + (1 if coin // ERRORS % 2 else -1)
  return [f'{a}{b:+d}={wrong}', f'so {wrong}{-b:+d}={wrong - b}', f'no {a}{b:+d}={a + b}', *right]


def restyled(base: task.Task, name: str, steps: Callable[[Problem], list[str]]) -> task.Task:
  """A task of the same problems, splits and grades whose worked solutions are written by `steps`.

  No text is held against one chain line by line, as several are right.
  """

  def rewrite(problem: Problem) -> Problem:
    lines = steps(problem)
    return dataclasses.replace(
        problem, rationale='\n'.join(lines), metadata={**problem.metadata, 'steps': len(lines)}
    )

  def problems(split: str, *, count: int | None = None, seed: int = 0) -> list[Problem]:
    task.check_split(name, split, base.splits)
    return [rewrite(problem) for problem in base.problems(split, count=count, seed=seed)]

  return dataclasses.replace(base, name=name, problems=problems, first_wrong_step=task.no_step_oracle)
