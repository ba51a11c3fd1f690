"""Grades become arrays; what cannot be scored is marked, not guessed; shaping follows its papers."""

import logging
import math
import time

import numpy as np
import pytest

from srm_jax import rewards
from srm_jax.rewards import REWARDS, Part, Seen, grade, make_grade, make_judge, reward_arrays
from srm_jax.types import Completion, Problem
from tests.rollout_test import completion
from tests.tiny import PARITY, SUMS

PROBLEM = Problem('one', 'how many?', '7', metadata={'budget': 1000})


def seen(text='', *, tokens=0, correct=1.0, finished=True, problem=PROBLEM):
  tokens = tokens if isinstance(tokens, tuple) else (1,) * tokens
  return Seen(SUMS, problem, Completion(None, 0, text, (0,), tokens, (), finished), correct)


def test_grades_are_the_tasks():
  problem = SUMS.problems('train', count=1)[0]
  texts = [f'#### {problem.answer}', '#### 99', '']
  graded = grade(SUMS, problem, [completion(problem, i, text) for i, text in enumerate(texts)])
  assert [one.reward for one in graded] == [one.correct for one in graded] == [1.0, 0.0, 0.0]
  assert [one.completion.sample for one in graded] == [0, 1, 2] and graded[0].problem is problem


def test_unscorable_completions_are_not_valid():
  problems = PARITY.problems('train', count=2)
  texts = [str(i) for i in range(40)]
  groups = [
      grade(PARITY, problem, [completion(problem, i, text) for i, text in enumerate(texts)]) for problem in problems
  ]
  found, valid = reward_arrays(groups)
  assert found.shape == valid.shape == (2, 40) and found.dtype == valid.dtype == np.float32
  for group, reward_row, valid_row in zip(groups, found, valid, strict=True):
    for one, reward, known in zip(group, reward_row, valid_row, strict=True):
      assert known == (one.reward is not None) and reward == (one.reward or 0.0)
  assert 0 < valid.sum() < valid.size


@pytest.mark.parametrize('tokens, value', [(16000, 0), (16384, 0), (18432, -0.5), (20480, -1), (30000, -1)])
def test_soft_overlong_golden_values(tokens, value):
  assert rewards.soft_overlong(seen(tokens=tokens), max_length=20480, cache=4096) == value


def test_lcpo_golden_values():
  assert rewards.length_exact(seen(tokens=1500)) == pytest.approx(0.85)
  assert rewards.length_max(seen(tokens=1500)) == pytest.approx(0.35)
  assert rewards.length_exact(seen(tokens=500, correct=0.0)) == pytest.approx(-0.15)
  assert rewards.length_max(seen(tokens=500, correct=0.0)) == 0
  assert rewards.length_max(seen(tokens=10)) == pytest.approx(0.797)
  assert rewards.length_max(seen(tokens=1), alpha=1.0) == 1
  assert rewards.length_exact(seen(correct=None)) is rewards.length_max(seen(correct=None)) is None


def test_cosine_by_hand():
  at = lambda tokens, correct: rewards.cosine(seen(tokens=tokens, correct=correct), max_length=100)
  assert [at(n, 1.0) for n in (0, 50, 100, 200)] == pytest.approx([1.0, 0.75, 0.5, 0.5])
  assert [at(n, 0.0) for n in (0, 50, 100)] == pytest.approx([-1.0, -0.75, -0.5])
  assert at(25, 1.0) == pytest.approx(0.5 + 0.5 * (1 + math.cos(math.pi / 4)) / 2)
  assert at(25, None) is None


@pytest.mark.parametrize('tokens, value', [
    ((1, 2, 3, 4), 0), ((1, 2, 1, 2, 1, 2), -0.5), ((5,) * 11, -8 / 9), ((1,), 0),
])
def test_repetition_counts_what_is_said_twice(tokens, value):
  assert rewards.repetition(seen(tokens=tokens)) == pytest.approx(value)


@pytest.mark.parametrize('text, finished, value', [
    ('3 + 4 = 7\n#### 7', True, 1), ('#### 7', True, 1), ('#### 7', False, 0), ('7', True, 0), ('####', True, 0),
    ('#### 7\n#### 8', True, 0), ('#### 7\nthat is it', True, 0), ('', True, 0),
])
def test_format(text, finished, value):
  assert rewards.has_format(seen(text, finished=finished)) == value


@pytest.mark.parametrize('name', REWARDS)
def test_every_reward_is_a_number(name):
  options = {'soft_overlong': dict(max_length=10, cache=5), 'cosine': dict(max_length=10)}.get(name, {})
  assert isinstance(REWARDS[name](seen('#### 7', tokens=3), **options), (int, float))


@pytest.mark.parametrize('name', ['length_exact', 'length_max'])
def test_a_problem_without_a_budget_says_what_to_do(name):
  with pytest.raises(ValueError, match="'plain' asks for no number of tokens; fix: data.budget"):
    REWARDS[name](seen(problem=Problem('plain', '', '')))


def test_impossible_lengths_are_refused():
  with pytest.raises(ValueError, match='cache 20 of soft_overlong must lie between 1 and max_length 10'):
    rewards.soft_overlong(seen(), max_length=10, cache=20)


def completions(count):
  return [completion(SUMS.problems('train', count=1)[0], i, f'#### {i}') for i in range(count)]


def graded_by(**parts):
  problem = SUMS.problems('train', count=1)[0]
  made = make_grade({name: Part(weight, fn) for name, (weight, fn) in parts.items()}, seconds=0.2)
  return made(SUMS, problem, completions(3))


def test_a_weighted_sum_is_reported_in_parts():
  sample = lambda one: one.completion.sample
  found = graded_by(sample=(2.0, sample), half=(-1.0, lambda one: 0.5), shown=(0.0, lambda one: 9.0))
  assert [one.reward for one in found] == [-0.5, 1.5, 3.5]
  assert found[1].parts == dict(sample=1, half=0.5, shown=9.0)
  problem = SUMS.problems('train', count=1)[0]
  assert [one.correct for one in found] == [float(str(i) == problem.answer) for i in range(3)]


def _hang(one):
  while one.completion.sample == 1:
    time.sleep(0.01)
  return 1.0


@pytest.mark.parametrize('fails', [
    lambda one: [1.0, None, 1.0][one.completion.sample], lambda one: [1.0, math.nan, 1.0][one.completion.sample],
    lambda one: 1.0 / (one.completion.sample - 1) ** 2, lambda one: [1.0, math.inf, 1.0][one.completion.sample], _hang,
], ids=['none', 'nan', 'raises', 'infinite', 'hangs'])
def test_what_fails_costs_one_completion(fails, caplog):
  with caplog.at_level(logging.WARNING):
    found = graded_by(good=(1.0, lambda one: 1.0), bad=(1.0, fails))
  assert [one.reward for one in found] == [2.0, None, 2.0]
  assert found[1].parts == dict(good=1.0, bad=None)
  assert all('reward bad' in line and 'unscorable' in line for line in caplog.messages) and len(caplog.messages) <= 1


def test_what_models_say_is_added_to_the_grades(caplog):
  problem = SUMS.problems('train', count=1)[0]
  graded = [one._replace(parts={'task': one.reward}) for one in grade(SUMS, problem, completions(3))]
  graded[2] = graded[2]._replace(reward=None)
  shown = Part(0.0, lambda group: [1.0] * len(group))
  judge = make_judge({'a': Part(2.0, lambda group: [0.25, 0.5, 0.75]), 'b': shown})
  found = judge(graded)
  assert [one.reward for one in found] == [graded[0].reward + 0.5, graded[1].reward + 1.0, None]
  assert [one.parts for one in found] == [
      {'task': one.parts['task'], 'a': a, 'b': 1.0} for one, a in zip(graded, (0.25, 0.5, 0.75))
  ]
  with caplog.at_level(logging.WARNING):
    failed = make_judge({'a': Part(1.0, lambda group: 1 / 0)})(graded)
  assert [(one.reward, one.parts['a']) for one in failed] == [(None, None)] * 3
  assert 'reward a raised' in caplog.text and 'unscorable' in caplog.text


def test_a_reward_that_swallows_everything_does_not_hang():
  def stubborn(one):
    while True:
      try:
        time.sleep(0.01)
      except Exception:  # noqa: BLE001
        pass

  start = time.perf_counter()
  assert [one.reward for one in graded_by(stubborn=(1.0, stubborn))] == [None] * 3
  assert time.perf_counter() - start < 5


def test_a_failing_reward_is_named_once(caplog):
  def broken(one):
    raise KeyError('no such thing')

  with caplog.at_level(logging.WARNING):
    found = graded_by(broken=(1.0, broken))
  assert [one.reward for one in found] == [None] * 3
  assert len(caplog.messages) == 1 and "reward broken raised KeyError('no such thing')" in caplog.messages[0]
