"""Grades become arrays; what cannot be scored is marked, not guessed."""

import numpy as np

from srm_jax.rewards import grade, reward_arrays
from tests.rollout_test import completion
from tests.tiny import PARITY, SUMS


def test_grades_are_the_tasks():
  problem = SUMS.problems('train', count=1)[0]
  texts = [f'#### {problem.answer}', '#### 99', '']
  graded = grade(SUMS, problem, [completion(problem, i, text) for i, text in enumerate(texts)])
  assert [one.reward for one in graded] == [1.0, 0.0, 0.0]
  assert [one.completion.sample for one in graded] == [0, 1, 2] and graded[0].problem is problem


def test_unscorable_completions_are_not_valid():
  problems = PARITY.problems('train', count=2)
  texts = [str(i) for i in range(40)]
  groups = [
      grade(PARITY, problem, [completion(problem, i, text) for i, text in enumerate(texts)]) for problem in problems
  ]
  rewards, valid = reward_arrays(groups)
  assert rewards.shape == valid.shape == (2, 40) and rewards.dtype == valid.dtype == np.float32
  for group, reward_row, valid_row in zip(groups, rewards, valid, strict=True):
    for one, reward, known in zip(group, reward_row, valid_row, strict=True):
      assert known == (one.reward is not None) and reward == (one.reward or 0.0)
  assert 0 < valid.sum() < valid.size
