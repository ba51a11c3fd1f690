"""Golden values, enumeration and coverage for the statistics of evaluation."""

import itertools
import math

import numpy as np
import pytest

from srm_jax import statistics


@pytest.mark.parametrize('k, expected', [(1, 0.1875), (4, 0.607143), (8, 0.9), (13, 0.998214), (14, 1.0)])
def test_pass_at_k_golden(k, expected):
  assert statistics.pass_at_k(16, 3, k) == pytest.approx(expected, abs=1e-6)


def test_pass_at_k_is_the_mean_over_subsets():
  samples = [1, 0, 0, 1, 0, 0]
  for k in range(1, 7):
    subsets = list(itertools.combinations(samples, k))
    assert statistics.pass_at_k(6, 2, k) == pytest.approx(np.mean([max(subset) for subset in subsets]))


@pytest.mark.parametrize('arguments', [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_refuses(arguments):
  with pytest.raises(ValueError, match='pass_at_k needs'):
    statistics.pass_at_k(*arguments)


def _majority_by_hand(answers, correct, k):
  total, subsets = 0.0, list(itertools.combinations(range(len(answers)), k))
  for subset in subsets:
    votes = [answers[i] for i in subset if answers[i] is not None]
    if votes:
      winner = max(votes, key=lambda vote: (votes.count(vote), -votes.index(vote)))
      total += correct[answers.index(winner)]
  return total / len(subsets)


@pytest.mark.parametrize('answers', [
    ['7', '8', '7', '9', '8', '7'], ['8', '7', '7', '8'], [None, '7', None, '8', '7'], ['7', '8', '9'],
    [None, '8', '9', '7', '7', '9']])
def test_majority_matches_enumeration(answers):
  correct = [answer == '7' for answer in answers]
  for k in range(1, len(answers) + 1):
    assert statistics.majority_at_k(answers, correct, k) == pytest.approx(_majority_by_hand(answers, correct, k))


def test_majority_ties_go_to_the_first_seen_and_none_does_not_vote():
  assert statistics.majority_at_k(['8', '7'], [0, 1], 2) == 0.0
  assert statistics.majority_at_k(['7', '8'], [1, 0], 2) == 1.0
  assert statistics.majority_at_k([None, None, '7'], [0, 0, 1], 3) == 1.0
  assert statistics.majority_at_k([None, None], [0, 0], 1) == 0.0


def test_majority_by_random_subsets_approaches_the_exact_value():
  rng = np.random.default_rng(0)
  answers = [str(x) for x in rng.choice(4, size=14, p=[0.4, 0.3, 0.2, 0.1])]
  correct = [answer == '0' for answer in answers]
  exact = statistics.majority_at_k(answers, correct, 5, subsets=10_000)
  sampled = statistics.majority_at_k(answers, correct, 5, subsets=1500, seed=1)
  assert sampled != exact and abs(sampled - exact) < 0.05
  assert sampled == statistics.majority_at_k(answers, correct, 5, subsets=1500, seed=1)


def test_majority_refuses_more_votes_than_samples():
  with pytest.raises(ValueError, match='k=3'):
    statistics.majority_at_k(['1', '2'], [1, 0], 3)


def test_wilson_against_published_values():
  # Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I.
  for successes, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
      (29, 29, 0.8830, 1.0)]:
    assert statistics.wilson_interval(successes, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_narrows_with_n_and_widens_with_level():
  width = lambda *arguments: np.diff(statistics.wilson_interval(*arguments))[0]
  assert width(500, 1000) < width(50, 100)
  assert width(50, 100, 0.99) > width(50, 100, 0.95)
  with pytest.raises(ValueError, match='successes=5'):
    statistics.wilson_interval(5, 4)
  with pytest.raises(ValueError, match='level 95'):
    statistics.wilson_interval(1, 4, 95)


def test_bootstrap_of_a_mean_matches_its_standard_error():
  values = np.random.default_rng(0).normal(size=400)
  low, high = statistics.bootstrap_interval(values, seed=1)
  assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
  assert low < values.mean() < high
  assert (low, high) == statistics.bootstrap_interval(values, seed=1)
  assert (low, high) != statistics.bootstrap_interval(values, seed=2)


def test_bootstrap_keeps_rows_together():
  rows = np.stack([np.arange(50.0), np.arange(50.0) + 3], axis=1)
  low, high = statistics.bootstrap_interval(rows, statistic=lambda x: float(np.mean(x[:, 1] - x[:, 0])), resamples=50)
  assert low == high == 3.0
  with pytest.raises(ValueError, match='no values'):
    statistics.bootstrap_interval([])


def test_mcnemar_by_hand():
  a, b = [1] * 8 + [0] + [1] * 5, [0] * 8 + [1] + [1] * 5  # 8 wins, 1 loss
  result = statistics.paired_test(a, b)
  assert result.p == pytest.approx(2 * (math.comb(9, 0) + math.comb(9, 1)) / 2**9)
  assert result.difference == pytest.approx(7 / 14) and result.n == 14
  assert result.low < 0.5 < result.high
  swapped = statistics.paired_test(b, a)
  assert swapped.p == result.p and swapped.low == pytest.approx(-result.high)


def test_agreement_everywhere_is_no_evidence_and_not_certainty():
  result = statistics.paired_test([1, 0, 1], [1, 0, 1])
  assert result.p == 1.0 and result.low < 0 < result.high


def test_sign_flip_by_enumeration_and_by_sampling():
  differences = np.array([0.5, 1.5, -0.25, 2.0, 0.75])
  flips = [abs(sum(s * d for s, d in zip(signs, differences))) for signs in itertools.product((-1, 1), repeat=5)]
  expected = np.mean([flip >= differences.sum() - 1e-9 for flip in flips])
  assert statistics.paired_test(differences, np.zeros(5)).p == pytest.approx(expected)
  many = np.random.default_rng(0).normal(0.2, 1.0, size=100)
  exact_like = statistics.paired_test(many, np.zeros(100), resamples=4000).p
  t = many.mean() / (many.std(ddof=1) / 10)
  assert exact_like == pytest.approx(math.erfc(abs(t) / math.sqrt(2)), abs=0.03)


def test_paired_beats_unpaired_where_problems_vary():
  rng = np.random.default_rng(0)
  difficulty = rng.normal(size=60)
  a, b = difficulty + 0.1 + 0.05 * rng.normal(size=60), difficulty
  assert statistics.paired_test(a, b, resamples=2000).p < 0.01
  assert statistics.paired_test(a, rng.permutation(b), resamples=2000).p > 0.05


def test_false_positive_rates_are_honest():
  rng = np.random.default_rng(0)
  single = [statistics.paired_test(*rng.integers(0, 2, size=(2, 40))).p <= 0.05 for _ in range(400)]
  assert np.mean(single) <= 0.08
  # Seeds that share problems: the same difference in every seed. Flipping each seed by itself would reject ~ 40 %.
  hits = 0
  for _ in range(200):
    shared = rng.normal(size=30)
    a = np.repeat(shared[None], 5, axis=0)
    hits += statistics.pooled_paired_test(a, np.zeros_like(a), resamples=300).p <= 0.05
  assert hits / 200 <= 0.1


def test_pooled_test_respects_the_pairing_within_each_seed():
  rng = np.random.default_rng(0)
  b = rng.integers(0, 2, size=(5, 80)).astype(float)
  a = np.where(rng.random((5, 80)) < 0.15, 1.0, b)
  result = statistics.pooled_paired_test(a, b, resamples=2000)
  assert result.p < 0.01 and result.low > 0
  assert result.difference == pytest.approx(np.mean(a - b)) and result.n == 400
  assert result.by_seed == pytest.approx(tuple((a - b).mean(axis=1)))
  assert result.seed_low < result.difference < result.seed_high
  shuffled = rng.permuted(b, axis=1)
  assert statistics.pooled_paired_test(a, shuffled, resamples=2000).p > result.p


def test_pooled_test_with_one_seed_has_no_seed_interval():
  result = statistics.pooled_paired_test(np.ones((1, 6)), np.zeros((1, 6)))
  assert result.p == pytest.approx(2 / 2**6) and math.isnan(result.seed_low)


@pytest.mark.parametrize('a, b, message', [
    ([1, 0], [1], 'shapes'), ([], [], 'shapes'), ([1, np.nan], [1, 0], 'NaN'),
    (np.ones((2, 2)), np.ones((2, 2)), 'shapes')])
def test_paired_test_refuses(a, b, message):
  with pytest.raises(ValueError, match=message):
    statistics.paired_test(a, b)
