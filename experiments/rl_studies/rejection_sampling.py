"""S4: accuracy by round, distinct paths and false positives, of configs/studies/rejection_sampling.py."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.study import cells, claims, verdicts
from experiments.study.running import COLORS, Study, mean_and_seeds
from srm_jax.annotate import KEPT
from srm_jax.data import records
from srm_jax.evaluate import read_completions
from srm_jax.recipes.context import DataConfig, find_task, load_problems
from srm_jax.schema import parse, resolve

MARGIN = 0.1
LINES = {  # {line of rounds: its models}
    'RFT and STaR, k=4': ('gold', 'k4_1', 'k4_2', 'k4_3'),
    'with rationalisation': ('gold_hint', 'hint_1', 'hint_2', 'hint_3'),
    'from scratch': ('gold_scratch', 'scratch_1', 'scratch_2', 'scratch_3'),
}
SAMPLES = {'k1_1': 1, 'k4_1': 4, 'k16_1': 16}


def read(done, config):
  """{model: test grades, 'wrong_steps' among its right test answers, and of what it learnt 'kept' and so on}."""
  return {name: one(name, done, config) for name in config.arms}


def one(name: str, done, config) -> dict[str, Any]:
  """Of one model."""
  data = parse(DataConfig, resolve(config.stages[f'test_{name}'].config.data), 'data')
  task, problems = find_task(data.task), load_problems(data)
  answers = read_completions(done[f'test_{name}'].workdir, 'greedy')
  right = [(p, answers[p.id]['text']) for p in problems if answers[p.id]['reward'] == 1.0]
  found = cells.graded(done[f'test_{name}']) | {'wrong_steps': false_positives(task, right)}
  sampled = done.get(f'{name}_samples')
  if sampled:
    kept = records.read(sampled.workdir / KEPT)
    found |= {'problems': sampled.outcome['problems'], 'solved': sampled.outcome['solved']}
    found |= sampled.outcome['paths'] | {
        'false_positives': false_positives(task, [(a.problem, a.completion) for a in kept]),
        'hinted': sum(bool(a.hint) for a in kept),
    }
  return found


def false_positives(task, right: Sequence[tuple]) -> float:
  """The share of (problem, text) with a right answer that have a wrong step; 0 of none."""
  return float(np.mean([task.first_wrong_step(*pair) is not None for pair in right])) if right else 0.0


def judge(found):
  """That RFT is above SFT on gold by the margin, grows with k, and that scratch does not gain the margin."""
  compare = lambda above, below: claims.compare(found, (above,), (below,))
  gain = cells.values(found, ('scratch_3',), 'accuracy') - cells.values(found, ('gold_scratch',), 'accuracy')
  task = found[0]['task']
  return [
      verdicts.judge(
          f'RFT with k=16 is at least {MARGIN:.0%} above SFT on gold', {task: compare('k16_1', 'gold')}, margin=MARGIN,
      ),
      verdicts.judge('RFT with k=4 is above k=1', {task: compare('k4_1', 'k1_1')}),
      verdicts.judge('RFT with k=16 is above k=4', {task: compare('k16_1', 'k4_1')}),
      verdicts.judge(
          f'three rounds from scratch gain less than {MARGIN:.0%}', {task: verdicts.of_values(MARGIN - gain)},
      ),
  ]


def table(found):
  """A model a row: test accuracy, and what it learnt."""
  header = [
      'model', 'accuracy (seeds)', 'right answers with a wrong step, test', 'problems solved of the pool',
      'distinct paths kept', 'of them with a wrong step', 'of them hinted',
  ]
  return header, [_row(name, [cell['models'][name] for cell in found]) for name in found[0]['models']]


def _row(name, models):
  mean = lambda key: float(np.mean([model[key] for model in models]))
  row = [name, mean_and_seeds([model['accuracy'] for model in models]), f'{mean("wrong_steps"):.3f}']
  if 'kept' not in models[0]:
    return [*row, '', '', '', '']
  return [
      *row, f'{mean("solved"):.0f} of {mean("problems"):.0f}', f'{mean("kept"):.0f}', f'{mean("false_positives"):.3f}',
      f'{mean("hinted"):.0f}',
  ]


def draw(found, figure):
  """Accuracy by number of samples, accuracy by round, false positives by round: a thin line a seed, a thick one."""
  by_samples, by_round, wrong = figure.subplots(1, 3)
  number = lambda names, key: np.array([[cell['models'][name][key] for name in names] for cell in found])
  _lines(by_samples, [0.5, *SAMPLES.values()], number(('gold', *SAMPLES), 'accuracy'), COLORS[0], '')
  by_samples.set_xscale('log', base=2)
  by_samples.set_xticks([0.5, *SAMPLES.values()], ['gold', *map(str, SAMPLES.values())])
  by_samples.set(xlabel='samples a problem', ylabel='greedy accuracy (test)', title='RFT, one round')
  for color, (line, names) in zip(COLORS, LINES.items(), strict=False):
    _lines(by_round, range(len(names)), number(names, 'accuracy'), color, line)
    _lines(wrong, range(1, len(names)), number(names[1:], 'false_positives'), color, line)
  by_round.set(xlabel='round', title='Rounds of 4 samples')
  wrong.set(xlabel='round', xticks=(1, 2, 3), title='Wrong steps in what is kept')
  by_round.legend()


def _lines(axis, x, values, color, label):
  axis.plot(x, values.T, color=color, alpha=0.25, linewidth=0.8)
  axis.plot(x, values.mean(axis=0), color=color, label=label)


STUDY = Study('configs/studies/rejection_sampling.py', read, judge, table, draw)
