"""Guesses and their checks: the texts by hand, and that neither guess nor length says anything about the problem."""

import numpy as np

from srm_jax.tasks import TASKS, guesses, running_sums
from srm_jax.types import Problem

TASK = TASKS['running_sums_guessed']


def test_a_text_by_hand():
  """3+8+4+9 = 24 is even: the guess of this problem decides the mark, and the mark alone is repeated."""
  text = guesses.guessed_and_checked(Problem('a', '3+8+4+9', '4'))
  answer, work = text.split('\n')
  guess, marks = answer.removeprefix('#### '), work.removeprefix('154')
  assert guess in ('0', '1') and set(marks) == {'.' if guess == '0' else '?'} and 1 <= len(marks) <= 17


def test_texts_of_the_task():
  problems = TASK.problems('train', count=2000, seed=3)
  right, lengths = [], []
  for problem in problems:
    text = TASK.solution(problem)
    work = text.split('\n')[1]
    assert problem.answer == str(sum(running_sums.digits_of(problem)) % 2) and work[:4].isdigit()
    assert (TASK.grade(problem, text) == 1.0) == work.endswith('.') and TASK.extract(text) == text[5]
    right.append(TASK.grade(problem, text))
    lengths.append(len(work) - 4)
  assert abs(np.mean(right) - 0.5) < 0.04 and set(lengths) == set(range(1, 18))
  assert abs(np.corrcoef(right, lengths)[0, 1]) < 0.06  # three standard errors


def test_splits_are_those_of_running_sums():
  assert len(TASK.problems('test')) == 1000
  assert not {one.id for one in TASK.problems('test')} & {one.id for one in TASK.problems('train', count=2000)}
