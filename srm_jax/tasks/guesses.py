"""A guess that is checked behind it: whether a sum of digits is odd, said first and worked out afterwards.

  3+8+4+9     #### 1        the answer, before any work: odd
              154????       sums from the left mod 10, then '?', as 4 is even; where the guess was right it is '.'

Behind the mark stand 0 to 16 more of it, as a hash of the problem says that knows nothing of the guess. Whoever writes
such texts is right on half of the problems, sees then whether it was, and may go on as long as it likes: what a length
bias can do, and the answer does not hang on.
"""

from __future__ import annotations

import dataclasses

from srm_jax.tasks import running_sums, task
from srm_jax.types import Problem

MORE = 16
MARKS = {True: '.', False: '?'}


def guessed_and_checked(problem: Problem) -> str:
  """The text of a running sum whose guess is a coin of the problem: '#### 1\\n154????'."""
  coin = lambda what, sides: task.stable_hash(f'{what} {problem.question}') % sides
  guess, sums = coin('guess', 2), running_sums.forward(problem)
  mark = MARKS[guess == int(sums[-1]) % 2]
  return f'{task.ANSWER_CUE}{guess}\n{sums}{mark * (1 + coin("filler", MORE + 1))}'


def guesses_task(base: task.Task, name: str) -> task.Task:
  """A task of the problems and splits of `base`, running sums, that asks for a guess and its check."""

  def rewrite(problem: Problem) -> Problem:
    return dataclasses.replace(
        problem, answer=str(int(problem.answer) % 2), rationale=guessed_and_checked(problem)
    )

  def problems(split: str, *, count: int | None = None, seed: int = 0) -> list[Problem]:
    return [rewrite(problem) for problem in base.problems(split, count=count, seed=seed)]

  return dataclasses.replace(base, name=name, problems=problems, solution=lambda problem: problem.rationale)
