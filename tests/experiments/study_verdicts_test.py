"""The rule of verdicts against intervals and tests computed in another way, and claims on made-up cells."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.study import cells, claims, verdicts
from srm_jax.schema import ConfigError


def _evidence(low, high, *, p=None, n=None, by_seed=(0.1, 0.2)):
  return verdicts.Evidence((low + high) / 2, low, high, by_seed, p, n)


def test_the_interval_over_seeds_is_the_t_interval():
  one = verdicts.of_values([0.1, 0.4, 0.3, 0.2])
  low, high = stats.t.interval(0.95, 3, loc=0.25, scale=stats.sem([0.1, 0.4, 0.3, 0.2]))
  assert (one.mean, one.low, one.high) == pytest.approx((0.25, low, high)) and one.p is None
  assert math.isnan(verdicts.of_values([0.3]).low)


def test_evidence_on_grades_is_paired_by_problem_and_by_seed():
  rng = np.random.default_rng(0)
  b = (rng.random((5, 400)) < 0.5).astype(float)
  a = np.maximum(b, rng.random((5, 400)) < 0.1)
  one = verdicts.of_grades(a, b)
  assert one.by_seed == pytest.approx((a - b).mean(axis=1)) and one.n == 2000 and one.p < 0.001
  low, high = stats.t.interval(0.95, 4, loc=np.mean(one.by_seed), scale=stats.sem(one.by_seed))
  assert (one.low, one.high) == pytest.approx((low, high))
  assert verdicts.of_grades(b, b).p == 1.0


@pytest.mark.parametrize('evidence, verdict', [
    ({'x': _evidence(0.01, 0.1, p=0.01)}, 'supported'),
    ({'x': _evidence(0.01, 0.1, p=0.06, n=100)}, 'inconclusive'),  # the seeds agree, the problems do not say
    ({'x': _evidence(-0.01, 0.1, p=0.01)}, 'inconclusive'),
    ({'x': _evidence(-0.1, -0.01, p=0.01)}, 'contradicted'),
    ({'x': _evidence(-0.1, -0.01, p=0.06, n=100)}, 'inconclusive'),
    ({'x': _evidence(0.01, 0.1, p=0.01), 'y': _evidence(0.2, 0.3, p=0.01)}, 'supported'),
    ({'x': _evidence(0.01, 0.1, p=0.01), 'y': _evidence(-0.2, 0.3, p=0.01)}, 'inconclusive'),
    ({'x': _evidence(0.01, 0.1, p=0.01), 'y': _evidence(-0.3, -0.2, p=0.01)}, 'contradicted'),
    ({'x': _evidence(-0.01, 0.1, p=0.5, n=9), 'y': _evidence(-0.3, -0.2, p=0.01)}, 'contradicted'),
    ({'x': _evidence(0.01, 0.1)}, 'supported'),  # not of grades: the interval alone
    ({'x': verdicts.of_values([0.3])}, 'inconclusive'),
])
def test_the_rule(evidence, verdict):
  found = verdicts.judge('it', evidence)
  assert found.verdict == verdict and found.claim == 'it'
  assert bool(found.needed) == (verdict == 'inconclusive')


def test_a_margin_moves_the_border():
  one = {'x': _evidence(0.05, 0.15)}
  assert [verdicts.judge('', one, margin=margin).verdict for margin in (0.04, 0.1, 0.16)] == [
      'supported', 'inconclusive', 'contradicted']


@pytest.mark.parametrize('evidence, verdict', [
    (_evidence(-0.04, 0.04), 'supported'), (_evidence(0.01, 0.04), 'supported'),
    (_evidence(-0.06, 0.0), 'inconclusive'), (_evidence(0.0, 0.06), 'inconclusive'),
    (_evidence(-0.06, 0.06), 'inconclusive'), (_evidence(0.06, 0.1), 'contradicted'),
    (_evidence(-0.1, -0.06), 'contradicted'), (verdicts.of_values([0.0]), 'inconclusive'),
])
def test_equivalence_has_two_sides(evidence, verdict):
  found = verdicts.judge_within('it', {'x': evidence}, margin=0.05)
  assert found.verdict == verdict and found.evidence == {'x': evidence}
  assert bool(found.needed) == (verdict == 'inconclusive')


def test_what_would_decide():
  seen = (0.1, 0.0, 0.2, -0.1, 0.1)
  seeds = verdicts.seeds_needed(seen)
  half = lambda k: stats.t.ppf(0.975, k - 1) * np.std(seen, ddof=1) / math.sqrt(k)
  assert half(seeds) < np.mean(seen) < half(seeds - 1)
  assert verdicts.seeds_needed((0.1, -0.1)) is None
  problems = verdicts.problems_needed(0.2, 1000)
  z = stats.norm.isf(0.1) * math.sqrt(problems / 1000)
  assert 2 * stats.norm.sf(z) == pytest.approx(0.05, abs=1e-4) and problems > 1000
  needs = lambda one: verdicts.needs(one, 0.0)
  assert needs(verdicts.of_values([0.3])) == 'at least 5 seeds'
  assert needs(verdicts.of_values(seen)) == f'about {seeds} seeds'
  assert needs(verdicts.of_values([0.1, -0.1])) == 'more than 1000 seeds'
  assert needs(_evidence(0.1, 0.2, p=0.2, n=1000)) == f'about {problems} problems over all seeds'


def test_a_claim_without_evidence_is_not_judged():
  with pytest.raises(ValueError, match='no evidence'):
    verdicts.judge('it', {})


def cell(task, seed, grades, **measured):
  """A cell whose arms have these grades, and one value of each kind measured."""
  models = {
      name: {'accuracy': float(np.mean(right)), 'n': len(right), 'correct': cells.pack(right)}
      | {key: values[name] for key, values in measured.items()}
      for name, right in grades.items()
  }
  return {'task': task, 'seed': seed, 'seconds': 10.0 * seed, 'models': models}


CLAIM = dict(text='a and b above c', above=('a', 'b'), below=('c',), what='accuracy', margin=0.0)


def test_a_claim_is_about_means_over_its_arms_with_problems_in_place():
  grades = {'a': [1, 1, 0, 1], 'b': [1, 0, 0, 1], 'c': [0, 1, 0, 0]}
  found = [cell('x', 2, grades), cell('x', 1, {**grades, 'c': [1, 1, 0, 0]})]
  assert cells.correct(found[:1], ['a', 'b']).tolist() == [[1, 0.5, 0, 1]]
  one = claims.judge(CLAIM, found).evidence['x']
  assert one.by_seed == pytest.approx((0.625 - 0.5, 0.625 - 0.25)) and one.n == 8  # by seed, whatever the order


def test_a_claim_about_something_else_takes_its_means():
  measured = {'cka': {'a': [0.5, 0.7], 'b': [0.9, 0.9], 'c': [0.2, 0.4]}}
  found = [cell('x', seed, dict.fromkeys('abc', [1]), **measured) for seed in (1, 2)]
  one = claims.judge({**CLAIM, 'what': 'cka', 'margin': 0.1}, found)
  assert one.evidence['x'].mean == pytest.approx(0.75 - 0.3) and one.verdict == 'supported'
  assert claims.judge({**CLAIM, 'what': 'cka', 'margin': 0.5}, found).verdict == 'contradicted'


def test_an_arm_that_is_not_there_is_found_at_once():
  from ml_collections import ConfigDict

  with pytest.raises(ConfigError, match="'a and b above c' names the arm 'b'; the arms are a, c"):
    claims.check(ConfigDict(dict(arms=('a', 'c'), claims=(CLAIM,))))


def test_packed_grades_come_back():
  for n in (1, 7, 8, 9, 30):
    right = np.random.default_rng(n).integers(0, 2, n)
    assert cells.unpack(cells.pack(right), n).tolist() == right.tolist()
