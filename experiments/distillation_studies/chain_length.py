"""S7: accuracy of students of several sizes after short and long chains, of configs/studies/chain_length.py."""

import numpy as np
from scipy import stats

from configs.studies.chain_length import SIZES
from experiments.study.running import COLORS, Study, mean_and_seeds
from experiments.study import cells, verdicts
from experiments.study.cells import graded

ARMS = ('short', 'short_more', 'long', 'mix_20', 'mix_50')
RULES = {'equal epochs': 'short', 'equal tokens': 'short_more'}
SMALLEST = next(iter(SIZES))


def read(done, config):
  """{size_arm: test grades}."""
  return {name: graded(done[f'test_{name}']) for name in config.arms}


def _accuracies(found, arm):
  """[S, sizes]."""
  return np.array([[cell['models'][f'{size}_{arm}']['accuracy'] for size in SIZES] for cell in found])


def rank_correlations(gaps: np.ndarray) -> list[float]:
  """Spearman's rho of the gap with size, of each seed; gaps: [S, sizes]. 0 where all gaps are the same."""
  return [float(stats.spearmanr(range(len(row)), row).statistic) if np.ptp(row) else 0.0 for row in gaps]


def judge(found):
  """The smallest student and the trend, by epochs and by tokens; then the mix."""
  said = []
  for rule, short in RULES.items():
    grades = [cells.correct(found, [f'{SMALLEST}_{arm}']) for arm in (short, 'long')]
    said.append(verdicts.judge(
        f'at {rule} the smallest student learns more from short chains', {'sums': verdicts.of_grades(*grades)},
    ))
    rho = rank_correlations(_accuracies(found, 'long') - _accuracies(found, short))
    said.append(verdicts.judge(
        f'at {rule} the gap (long minus short) rises with size', {'sums': verdicts.of_values(rho)}, margin=0.8,
    ))
  best = np.maximum(_accuracies(found, 'long'), _accuracies(found, 'short_more'))
  lead = np.mean(_accuracies(found, 'mix_20') - best, axis=1)
  said.append(verdicts.judge(
      'a fifth of long chains is no more than a point below the better pure set', {'sums': verdicts.of_values(lead)},
      margin=-0.01,
  ))
  return said


def table(found):
  """An arm a row, a size a column."""
  rows = []
  for arm in ARMS:
    by_size = _accuracies(found, arm).T
    rows.append([arm, *(mean_and_seeds([float(value) for value in values]) for values in by_size)])
  return ['chains', *SIZES], rows


def draw(found, figure):
  """Accuracy over size, a line an arm; the gap over size."""
  accuracy, gap = figure.subplots(1, 2)
  places = range(len(SIZES))
  for color, arm in zip(COLORS, ARMS, strict=False):
    values = _accuracies(found, arm)
    accuracy.plot(places, values.T, '.', color=color, alpha=0.4)
    accuracy.plot(places, values.mean(axis=0), color=color, label=arm)
  for color, (rule, short) in zip(COLORS, RULES.items(), strict=False):
    values = _accuracies(found, 'long') - _accuracies(found, short)
    gap.plot(places, values.T, '.', color=color, alpha=0.4)
    gap.plot(places, values.mean(axis=0), color=color, label=rule)
  gap.axhline(0, color='#888888', linewidth=0.6)
  accuracy.set(ylabel='greedy accuracy (test)', title='What students of three sizes learn')
  gap.set(ylabel='long minus short', title='Gap')
  for axis in (accuracy, gap):
    axis.set_xticks(list(places), list(SIZES))
    axis.legend(fontsize=8)


STUDY = Study('configs/studies/chain_length.py', read, judge, table, draw)
