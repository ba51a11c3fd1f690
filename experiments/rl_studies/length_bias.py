"""S5-ii: lengths of right and of wrong completions while a policy learns, of configs/studies/length_bias.py."""

from collections.abc import Mapping, Sequence

import numpy as np

from configs.studies.length_bias import TASK
from experiments.study import verdicts
from experiments.study.cells import graded, values
from experiments.study.running import COLORS, Study, mean_and_seeds
from srm_jax import metrics

ARMS = ('grpo', 'dr_grpo', 'token_mean', 'gspo')
MARGIN = 0.02  # of accuracy


def read(done, config):
  """{model: test grades; of arms what `lengths` found}."""
  found = {name: graded(done[f'test_{name}']) for name in ('base', *config.arms)}
  for arm in config.arms:
    repeats = config.stages[arm].config.recipe.updates
    found[arm]['lengths'] = lengths(done[arm].workdir, repeats.epochs * repeats.minibatches)
  return found


def lengths(workdir, repeats: int) -> dict[str, list[float]]:
  """{'turn', 'wrong', 'right': [rows of the log]}: mean lengths of the completions that were sampled up to a turn.

  repeats: updates on what is sampled at once, so many steps a turn. Rows without a wrong or a right one are left out.
  """
  rows = [(row['step'] / repeats, row['length_wrong'], row['length_right']) for row in metrics.read(workdir)]
  kept = [row for row in rows if np.isfinite(row).all()]
  return {name: [row[place] for row in kept] for place, name in enumerate(('turn', 'wrong', 'right'))}


def slope(found: Mapping[str, Sequence[float]], kind: str) -> float:
  """Tokens that the mean length gains in ten turns, by least squares; kind: wrong, right or gap, wrong - right."""
  if len(found['turn']) < 2:
    return np.nan  # a policy that is never right, as that of a smoke run
  right = 0.0 if kind == 'wrong' else np.asarray(found['right'])
  y = right if kind == 'right' else np.asarray(found['wrong']) - right
  return 10 * float(np.polyfit(found['turn'], y, 1)[0])


def slopes(found, arm: str, kind: str) -> np.ndarray:
  """[seeds]."""
  return np.array([slope(cell['models'][arm]['lengths'], kind) for cell in found])


def judge(found):
  """That GRPO lengthens wrong answers and Dr. GRPO does not, and that this costs neither accuracy."""
  ahead = lambda kind: slopes(found, 'grpo', kind) - slopes(found, 'dr_grpo', kind)
  accuracy = values(found, ['grpo'], 'accuracy') - values(found, ['dr_grpo'], 'accuracy')
  claims = {
      'wrong answers grow faster under GRPO than under Dr. GRPO, tokens in ten turns': (ahead('wrong'), 0.0),
      'so does what wrong answers are longer than right ones': (ahead('gap'), 0.0),
      f'accuracy, GRPO - Dr. GRPO, is above -{MARGIN}': (accuracy, -MARGIN),
      f'accuracy, Dr. GRPO - GRPO, is above -{MARGIN}': (-accuracy, -MARGIN),
  }
  return [
      verdicts.judge(claim, {TASK: verdicts.of_values(numbers)}, margin=margin)
      for claim, (numbers, margin) in claims.items()
  ]


def table(found):
  """An arm a row: tokens gained in ten turns by wrong and by right answers, lengths and accuracy at the end."""
  header = ['arm', 'wrong, in ten turns', 'right, in ten turns', 'wrong at the end', 'right at the end', 'accuracy']
  start = ['start', *[''] * 4, mean_and_seeds(list(values(found, ['base'], 'accuracy')))]
  rows = []
  for arm in ARMS:
    grown = [mean_and_seeds(list(slopes(found, arm, kind)), '{:+.2f}') for kind in ('wrong', 'right')]
    ends = [
        mean_and_seeds([([np.nan] + cell['models'][arm]['lengths'][kind])[-1] for cell in found], '{:.1f}')
        for kind in ('wrong', 'right')
    ]
    rows.append([arm, *grown, *ends, mean_and_seeds(list(values(found, [arm], 'accuracy')))])
  return header, [start, *rows]


def draw(found, figure):
  """Lengths over turns, wrong answers to the left and right ones to the right: a thin line a seed, a thick one their
  mean (over the turns that all seeds have).
  """
  for axis, kind in zip(figure.subplots(1, 2, sharey=True), ('wrong', 'right'), strict=True):
    for color, arm in zip(COLORS, ARMS, strict=False):
      curves = [dict(zip(one['turn'], one[kind])) for one in (cell['models'][arm]['lengths'] for cell in found)]
      for curve in curves:
        axis.plot(list(curve), list(curve.values()), color=color, alpha=0.25, linewidth=0.8)
      turns = sorted(set.intersection(*map(set, curves)))
      axis.plot(turns, [np.mean([curve[turn] for curve in curves]) for turn in turns], color=color, label=arm)
    axis.set(xlabel='turns of sampling and learning', title=f'E[length | {kind}]')
  axis.legend()


STUDY = Study('configs/studies/length_bias.py', read, judge, table, draw)
