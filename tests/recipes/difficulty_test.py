"""Orders of problems: what they ask for follows what the student can do, and nothing is forgotten over a restart."""

import collections
import json

import numpy as np
import pytest

from srm_jax import schema
from srm_jax.recipes import difficulty
from srm_jax.recipes.difficulty import ORDERS
from srm_jax.rewards import Graded
from srm_jax.rollout import subsample
from srm_jax.types import Problem

PROBLEMS = [Problem(f'p{i}', '', '', metadata={'steps': i // 4 + 1}) for i in range(12)]  # three levels of four


def groups(problems, rate, samples=4):
  """Groups in which a share `rate(problem)` is right; None where nothing can be scored."""
  found = []
  for problem in problems:
    share = rate(problem)
    grades = [None] * samples if share is None else [float(i < share * samples) for i in range(samples)]
    found.append([Graded(problem, None, grade, grade) for grade in grades])
  return found


def test_uniform_is_a_permutation_an_epoch():
  order = difficulty.uniform(PROBLEMS, 3)
  assert order.choose(5, 7) == subsample(PROBLEMS, 5, seed=3, step=7)


def levels(**options):
  return difficulty.levels(PROBLEMS, 1, **{'advance': 0.75, 'window': 8, **options})


def hardest(order):
  return max(problem.metadata['steps'] for turn in range(6) for problem in order.choose(4, turn))


def test_a_level_opens_when_the_last_is_mastered():
  order = levels()
  assert hardest(order) == 1
  order.learn(groups(PROBLEMS[:1], lambda problem: 1.0))  # four grades are not the window of eight yet
  assert hardest(order) == 1
  order.learn(groups(PROBLEMS[:2], lambda problem: 0.5))  # six of the last eight are needed
  assert hardest(order) == 1
  order.learn(groups(PROBLEMS[:2], lambda problem: 0.75))
  assert hardest(order) == 2
  assert {problem.metadata['steps'] for turn in range(6) for problem in order.choose(4, turn)} == {1, 2}


def test_easier_problems_and_what_nobody_can_score_do_not_count():
  order = levels()
  order.learn(groups(PROBLEMS[:4], lambda problem: 1.0))
  assert hardest(order) == 2
  order.learn(groups(PROBLEMS[:4] * 4, lambda problem: 1.0))  # the first level again
  order.learn(groups(PROBLEMS[4:8] * 4, lambda problem: None))
  assert hardest(order) == 2
  for _ in range(4):
    order.learn(groups(PROBLEMS[4:], lambda problem: 1.0))
  assert hardest(order) == 3  # and there it stays


def test_levels_need_their_key():
  with pytest.raises(schema.ConfigError, match="problem 'p0' has no 'depth' in its metadata; .'steps'. are"):
    levels(key='depth')


def test_pass_rates_prefer_what_is_half_right():
  order = difficulty.pass_rates(PROBLEMS, 1, floor=0.01)
  rate = lambda problem: [0.0, 0.5, 1.0][PROBLEMS.index(problem) % 3]
  for _ in range(8):
    order.learn(groups(PROBLEMS, rate))
  drawn = collections.Counter(problem.id for turn in range(300) for problem in order.choose(2, turn))
  by_rate = collections.Counter()
  for problem in PROBLEMS:
    by_rate[rate(problem)] += drawn[problem.id]
  assert by_rate[0.5] > 5 * by_rate[0.0] > 0 and by_rate[0.5] > 5 * by_rate[1.0] > 0


def test_pass_rates_by_hand():
  order = difficulty.pass_rates(PROBLEMS, 1, memory=0.75)
  order.learn(groups(PROBLEMS[:1], lambda problem: 1.0) + groups(PROBLEMS[1:2], lambda problem: None))
  np.testing.assert_allclose(order.get_state()[:3], [0.75 * 0.5 + 0.25, 0.5, 0.5])
  with pytest.raises(schema.ConfigError, match='13 problems a draw, but there are 12'):
    order.choose(13, 0)


@pytest.mark.parametrize('name', ORDERS)
def test_a_restored_order_goes_on_as_the_first_would(name):
  order, other = (ORDERS[name](PROBLEMS, 5, **({'window': 8} if name == 'levels' else {})) for _ in range(2))
  learn = lambda which, turn: which.learn(groups(which.choose(4, turn), lambda problem: 0.75 + 0.25 * (turn % 2)))
  for turn in range(4):
    learn(order, turn)
  other.set_state(json.loads(json.dumps(order.get_state())))
  for turn in range(4, 10):
    assert order.choose(4, turn) == other.choose(4, turn)
    learn(order, turn)
    learn(other, turn)
  assert order.get_state() == other.get_state()
