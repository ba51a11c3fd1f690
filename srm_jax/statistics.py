"""Estimates and tests for evaluation: every reported number gets an interval, every comparison a paired test.

All functions work on the host (numpy) and are deterministic in their seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special, stats

MAX_EXACT_FLIPS = 13  # 2^13 sign patterns are enumerated; more differences are sampled


class PairedTest(NamedTuple):
  """difference = mean(a - b) over n problems; its interval; two-sided p of 'no difference'."""

  difference: float
  low: float
  high: float
  p: float
  n: int


class PooledPairedTest(NamedTuple):
  """PairedTest over seeds, given the trained models, and what the seeds say by themselves.

  difference, low, high, p, n: of the pooled test; the interval is over problems.
  by_seed: mean(a - b) of each seed. seed_low, seed_high: t interval of their mean, which holds the spread over
  training runs (nan with one seed).
  """

  difference: float
  low: float
  high: float
  p: float
  n: int
  by_seed: tuple[float, ...]
  seed_low: float
  seed_high: float


def pass_at_k(n: int, c: int, k: int) -> float:
  """Unbiased estimate of the probability that at least one of k samples is right: 1 - C(n - c, k) / C(n, k).

  Args:
    n: samples drawn for the problem.
    c: how many of them are right.
    k: samples allowed.

  Raises:
    ValueError: not 0 <= c <= n, or not 1 <= k <= n.

  Reference: Chen et al., Evaluating Large Language Models Trained on Code, arXiv 2107.03374.
  """
  if not 0 <= c <= n or not 1 <= k <= n:
    raise ValueError(f'pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}; draw k samples or more')
  return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_at_k(
    answers: Sequence[Hashable | None], correct: Sequence[bool | float], k: int, *, subsets: int = 1000, seed: int = 0
) -> float:
  """Probability that the most frequent of k answers, drawn without replacement from one problem's samples, is right.

  Averages over all C(n, k) subsets where there are at most `subsets`, else over that many random ones; both are
  unbiased. A subset keeps the order of sampling. A tie goes to the answer seen first. None does not vote;
  where nobody votes the result is wrong.

  Args:
    answers: final answer of each sample, comparable by ==; None where there is none.
    correct: grade of each sample.
    k: votes.
    subsets: limit of exact enumeration, and the number of random subsets beyond it.
    seed: of the random subsets.

  Raises:
    ValueError: lengths differ, or not 1 <= k <= len(answers).

  Reference: Wang et al., Self-Consistency Improves Chain of Thought Reasoning in Language Models, arXiv 2203.11171.
  """
  n = len(answers)
  if len(correct) != n or not 1 <= k <= n:
    raise ValueError(f'majority_at_k needs a grade an answer and 1 <= k <= n, got {n}, {len(correct)} grades, k={k}')
  names = list(dict.fromkeys(answer for answer in answers if answer is not None))
  if not names:
    return 0.0
  chosen = _subsets(n, k, subsets, seed)
  votes = np.array([[answer == name for name in names] for answer in answers])[chosen]  # [subsets, k, names]
  first_seen = np.where(votes.any(axis=1), votes.argmax(axis=1), k)
  winner = np.argmax(votes.sum(axis=1) * (k + 1) - first_seen, axis=-1)
  grades = np.array([float(correct[answers.index(name)]) for name in names])
  return float(np.mean(np.where(votes.any(axis=(1, 2)), grades[winner], 0.0)))


def _subsets(n: int, k: int, limit: int, seed: int) -> np.ndarray:
  """Index rows [subsets, k], each ascending: all of them, or `limit` random ones."""
  if math.comb(n, k) <= limit:
    return np.array(list(itertools.combinations(range(n), k)))
  order = np.random.default_rng(seed).random((limit, n)).argsort(axis=-1)
  return np.sort(order[:, :k], axis=-1)


def wilson_interval(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
  """Score interval of a proportion; unlike p +- z s it stays inside [0, 1] and has width at 0 and n successes.

  (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

  Raises:
    ValueError: n < 1 or successes outside [0, n].

  Reference: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 1927.
  """
  if n < 1 or not 0 <= successes <= n:
    raise ValueError(f'wilson_interval needs 0 <= successes <= n and n >= 1, got successes={successes}, n={n}')
  z, p = _normal_quantile(level), successes / n
  centre = p + z**2 / (2 * n)
  half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
  scale = 1 + z**2 / n
  return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, *, statistic: Callable[[np.ndarray], float] = np.mean, level: float = 0.95,
    resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
  """Percentile interval of a statistic, resampling whole rows of `values`.

  Args:
    values: [N, ...], a row a problem; keep what belongs to one problem in one row.
    statistic: maps resampled values, same shape, to a number.
    level: coverage.
    resamples: number of resamples.
    seed: of the resampling.

  Raises:
    ValueError: no values.
  """
  values = np.asarray(values)
  if len(values) == 0:
    raise ValueError('bootstrap_interval of no values; pass at least one')
  rng = np.random.default_rng(seed)
  estimates = [statistic(values[rng.integers(len(values), size=len(values))]) for _ in range(resamples)]
  low, high = np.quantile(estimates, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def paired_test(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, *, level: float = 0.95, resamples: int = 10_000,
    seed: int = 0
) -> PairedTest:
  """Compares two systems on the same problems.

  Grades of 0 and 1: exact McNemar test (binomial on the problems where they differ) and the Bonett-Price interval,
  which keeps its width when the systems agree everywhere. Other scores: sign-flip permutation test of the mean
  difference (exact up to 13 differing problems, else with `resamples` random flips) and a bootstrap interval.

  Args:
    a: score of system a on each problem, [N].
    b: score of system b on the same problems in the same order, [N].
    level: coverage of the interval.
    resamples: random sign patterns, and bootstrap resamples.
    seed: of both.

  Returns:
    PairedTest; p <= 0.05 says that the difference is not an accident of these problems. It says nothing about other
    training runs.

  Raises:
    ValueError: shapes differ, no problem, or a score that is not finite.

  Reference: Bonett and Price, Adjusted Wald Confidence Interval for a Difference of Binomial Proportions Based on
  Paired Data, JEBS 2012.
  """
  a, b = _paired_arrays(a, b, ndim=1)
  difference, n = float(np.mean(a - b)), len(a)
  if np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
    wins, losses = int(np.sum(a > b)), int(np.sum(a < b))
    p = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    return PairedTest(difference, *_bonett_price(wins, losses, n, level), float(p), n)
  low, high = bootstrap_interval(a - b, level=level, resamples=resamples, seed=seed)
  return PairedTest(difference, low, high, _sign_flip_p(a - b, resamples, seed), n)


def pooled_paired_test(
    a: np.ndarray, b: np.ndarray, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> PooledPairedTest:
  """Compares two systems over several seeds, each pair of runs on the same problems.

  A sign-flip permutation test on the mean over seeds of each problem's difference: a problem's differences of all seeds
  flip together. That is valid whether the seeds share their problems (differences on one problem are then
  correlated) or each seed has its own, where the columns are arbitrary groups.

  Args:
    a: [S, N], scores of system a: seeds x problems.
    b: [S, N], scores of system b; row s on the problems of row s of a, in the same order.
    level: coverage of both intervals.
    resamples: random sign patterns, and bootstrap resamples.
    seed: of both.

  Returns:
    PooledPairedTest. p is given the trained models; whether a new training run would gain is what by_seed and
    the interval over seeds say.

  Raises:
    ValueError: shapes differ or are not [S, N], nothing to compare, or a score that is not finite.
  """
  a, b = _paired_arrays(a, b, ndim=2)
  pooled = np.mean(a - b, axis=0)
  low, high = bootstrap_interval(pooled, level=level, resamples=resamples, seed=seed)
  by_seed = np.mean(a - b, axis=1)
  seeds = len(by_seed)
  half = stats.t.ppf((1 + level) / 2, seeds - 1) * by_seed.std(ddof=1) / math.sqrt(seeds) if seeds > 1 else math.nan
  difference = float(by_seed.mean())
  return PooledPairedTest(
      difference, low, high, _sign_flip_p(pooled, resamples, seed), a.size, tuple(map(float, by_seed)),
      float(difference - half), float(difference + half))


def _normal_quantile(level: float) -> float:
  if not 0 < level < 1:
    raise ValueError(f'level {level} is not between 0 and 1; 0.95 is a 95 % interval')
  return float(special.ndtri((1 + level) / 2))


def _paired_arrays(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, *, ndim: int
) -> tuple[np.ndarray, np.ndarray]:
  a, b = (np.asarray(values, dtype=np.float64) for values in (a, b))
  if a.shape != b.shape or a.ndim != ndim or a.size == 0:
    wanted = '[N]' if ndim == 1 else '[S, N]'
    raise ValueError(f'paired scores have shapes {a.shape} and {b.shape}; both must be the same {wanted}')
  if not (np.isfinite(a).all() and np.isfinite(b).all()):
    raise ValueError('paired scores hold NaN or infinity; leave out problems that either system cannot be scored on')
  return a, b


def _bonett_price(wins: int, losses: int, n: int, level: float) -> tuple[float, float]:
  z, won, lost = _normal_quantile(level), (wins + 1) / (n + 2), (losses + 1) / (n + 2)
  half = z * math.sqrt((won + lost - (won - lost) ** 2) / (n + 2))
  return max(-1.0, won - lost - half), min(1.0, won - lost + half)


def _sign_flip_p(differences: np.ndarray, resamples: int, seed: int) -> float:
  """Two-sided p of a zero mean, when every difference is as likely to have either sign."""
  differences = differences[differences != 0]
  if len(differences) == 0:
    return 1.0
  threshold = abs(differences.sum()) * (1 - 1e-12)  # rounding must not lose the observed pattern itself
  if len(differences) <= MAX_EXACT_FLIPS:
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(differences))))
    return float(np.mean(np.abs(signs @ differences) >= threshold))
  rng, hits = np.random.default_rng(seed), 0
  for size in [1000] * (resamples // 1000) + [resamples % 1000]:
    signs = rng.integers(0, 2, size=(size, len(differences)), dtype=np.int8) * 2 - 1
    hits += int(np.sum(np.abs(signs @ differences) >= threshold))
  return (hits + 1) / (resamples + 1)
