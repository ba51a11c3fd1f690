"""What a study says about a claim, by one rule that its config states before the run.

  supported     on every task the 95 % t interval of the difference over seeds is above the margin, and p < .05
  contradicted  on some task that interval is below the margin, and p < .05
  inconclusive  else; then the seeds or problems that would decide, if what was seen went on, are named

p is that of the pooled paired test over problems, where the difference is one of grades. Everything here is a pure
function of numbers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from srm_jax import statistics

LEVEL = 0.95
MOST_SEEDS = 1000  # beyond, the number means nothing


class Evidence(NamedTuple):
  """A difference on one task: its mean over seeds, the t interval of that mean, and of each seed.

  p, n: of the pooled paired test over problems; None where the difference is not one of grades.
  """

  mean: float
  low: float
  high: float
  by_seed: tuple[float, ...]
  p: float | None
  n: int | None


class Verdict(NamedTuple):
  """claim: a sentence. verdict: supported, contradicted or inconclusive. evidence: {task: Evidence}.

  needed: {task: what would decide}, where inconclusive.
  """

  claim: str
  verdict: str
  evidence: Mapping[str, Evidence]
  needed: Mapping[str, str]


def of_grades(a: np.ndarray, b: np.ndarray) -> Evidence:
  """Evidence on accuracy, a minus b: [S, N] each, the same problems in the same order."""
  test = statistics.pooled_paired_test(a, b)
  return Evidence(test.difference, test.seed_low, test.seed_high, test.by_seed, test.p, test.n)


def of_values(differences: Sequence[float]) -> Evidence:
  """Evidence on one number a seed."""
  values = np.asarray(differences, float)
  half = _half_width(len(values), values.std(ddof=1)) if len(values) > 1 else math.nan
  mean = float(values.mean())
  return Evidence(mean, mean - half, mean + half, tuple(map(float, values)), None, None)


def judge(claim: str, evidence: Mapping[str, Evidence], *, margin: float = 0.0) -> Verdict:
  """The verdict on 'the difference is above the margin, on every task'.

  Args:
    claim: the sentence that is judged.
    evidence: {task: Evidence}.
    margin: what the difference must exceed.

  Raises:
    ValueError: no evidence.
  """
  if not evidence:
    raise ValueError(f'claim {claim!r} has no evidence; give it at least one task')
  signs = {task: _sign(one, margin) for task, one in evidence.items()}
  needed = {task: needs(one, margin) for task, one in evidence.items() if not signs[task]}
  if -1 in signs.values():
    return Verdict(claim, 'contradicted', evidence, {})
  return Verdict(claim, 'inconclusive' if needed else 'supported', evidence, needed)


def judge_within(claim: str, evidence: Mapping[str, Evidence], *, margin: float) -> Verdict:
  """The verdict on 'the difference is between -margin and margin, on every task': equivalence, by both of its sides.

  Args:
    claim: the sentence that is judged.
    evidence: {task: Evidence} of values; the test of grades asks whether there is a difference, which is not claimed.
    margin: above 0.
  """
  turned = {task: one._replace(mean=-one.mean, low=-one.high, high=-one.low, by_seed=tuple(-x for x in one.by_seed))
            for task, one in evidence.items()}
  sides = [judge(claim, side, margin=-margin) for side in (evidence, turned)]
  words = [side.verdict for side in sides]
  if 'contradicted' in words:
    return Verdict(claim, 'contradicted', evidence, {})
  needed = {task: text for side in sides for task, text in side.needed.items()}
  return Verdict(claim, 'inconclusive' if needed else 'supported', evidence, needed)


def _sign(one: Evidence, margin: float) -> int:
  """1 where the evidence is above the margin, -1 where it is below, 0 where it does not say (nan with one seed)."""
  if one.p is not None and not one.p < 1 - LEVEL:
    return 0
  return int(one.low > margin) - int(one.high < margin)


def needs(one: Evidence, margin: float) -> str:
  """How many seeds or problems would put the interval on one side of the margin."""
  if len(one.by_seed) < 2:
    return 'at least 5 seeds'
  if one.p is not None and not one.p < 1 - LEVEL and (one.low > margin or one.high < margin):
    return f'about {problems_needed(one.p, one.n)} problems over all seeds'
  seeds = seeds_needed(one.by_seed, margin)
  return f'more than {MOST_SEEDS} seeds' if seeds is None else f'about {max(seeds, len(one.by_seed) + 1)} seeds'


def seeds_needed(by_seed: Sequence[float], margin: float = 0.0) -> int | None:
  """The least number of seeds whose t interval, with the mean and deviation seen, leaves the margin; None beyond
  MOST_SEEDS.
  """
  values = np.asarray(by_seed, float)
  gap, deviation = abs(values.mean() - margin), values.std(ddof=1)
  return next((k for k in range(2, MOST_SEEDS + 1) if _half_width(k, deviation) < gap), None)


def problems_needed(p: float, n: int) -> int:
  """Problems at which a two-sided p over n of them would fall to 5 %, if the difference stayed: z grows as sqrt(n)."""
  seen = stats.norm.isf(min(p, 0.999) / 2)
  return math.ceil(n * (stats.norm.isf((1 - LEVEL) / 2) / seen) ** 2)


def _half_width(seeds: int, deviation: float) -> float:
  return float(stats.t.ppf((1 + LEVEL) / 2, seeds - 1) * deviation / math.sqrt(seeds))
