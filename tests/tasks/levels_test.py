"""Every level has its share of the problems, marked by its steps, and gives them again where it has few."""

import collections

import pytest

from srm_jax.tasks import TASKS, running_sums

TASK = TASKS['running_sums_2_to_8']


def test_levels_take_turns():
  problems = TASK.problems('train', count=702, seed=1)
  assert len(problems) == 702
  for place, problem in enumerate(problems):
    assert len(running_sums.digits_of(problem)) == 2 + place % 7 == problem.metadata['steps'] + 1
    assert TASK.grade(problem, TASK.solution(problem)) == 1.0
  assert problems == TASK.problems('train', count=1400, seed=1)[:702] != TASK.problems('train', count=702, seed=2)


def test_a_small_level_gives_its_problems_again():
  problems = TASK.problems('test', count=7000)
  counts = [collections.Counter(problem.question for problem in problems[level::7]) for level in range(7)]
  assert [len(one) for one in counts] == [8, 80, 800, 1000, 1000, 1000, 1000]
  assert set(counts[0].values()) == {125}


def test_splits_do_not_meet():
  questions = [{problem.question for problem in TASK.problems(split, count=3000)} for split in ('train', 'dev', 'test')]
  assert not questions[0] & questions[1] and not questions[0] & questions[2] and not questions[1] & questions[2]
  with pytest.raises(ValueError, match="'running_sums_2_to_8' has no split 'hard'"):
    TASK.problems('hard')
