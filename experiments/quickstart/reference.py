"""Five runs with different seeds as a band for one new run: experiments/quickstart/reference.json.

python -m experiments.sweep --config=configs/quickstart.py --seeds=5 --workdir=runs/reference
python -m experiments.quickstart.reference --workdir=runs/reference [--seeds=1,2,3,4,5] [--arg=task=arithmetic_mix]
python -m experiments.quickstart.reference --table

The second command runs only what the first (or a stopped call of either) has not finished in the workdir. The third
prints the committed reference as the README has it.

The band is the 95 % prediction interval of one new run, t-based: mean +- t(k - 1) s sqrt(1 + 1/k) over k seeds. It is
wider than the interval of the mean, which says where the average of many runs lies and not where yours does. s is
never taken below the binomial spread of one test set of n problems.
"""

import importlib.metadata
import json
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

PATH = pathlib.Path(__file__).with_name('reference.json')


class Band(NamedTuple):
  """mean, extremes and prediction interval of one row over the seeds."""

  mean: float
  smallest: float
  largest: float
  low: float
  high: float


class Reference(NamedTuple):
  """bands: {row: Band}, those of strategies under their names. about: seeds, task, size, steps, dtype, command."""

  bands: dict[str, Band]
  about: dict[str, Any]
  comparisons: list[dict[str, Any]]


def prediction_interval(accuracies: Sequence[float], n: int, level: float = 0.95) -> tuple[float, float]:
  """Where one new run of the same kind falls with probability `level`.

  mean +- t s sqrt(1 + 1/k), s = max(sample standard deviation, sqrt(p (1 - p) / n)) with p = (mean n + 1) / (n + 2).

  Args:
    accuracies: of k >= 2 seeds, each on its own n problems.
    n: problems of one test set.
    level: coverage.
  """
  from scipy import stats

  values = np.asarray(accuracies, float)
  if len(values) < 2:
    raise ValueError(f'a prediction interval needs two runs or more, got {len(values)}; add seeds')
  p = (values.mean() * n + 1) / (n + 2)
  spread = max(values.std(ddof=1), math.sqrt(p * (1 - p) / n))
  half = stats.t.ppf((1 + level) / 2, len(values) - 1) * spread * math.sqrt(1 + 1 / len(values))
  return max(0.0, float(values.mean() - half)), min(1.0, float(values.mean() + half))


def summarize(runs: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> dict[str, Any]:
  """The content of reference.json.

  Args:
    runs: finished stages of each seed, {name: Stage}.
    about: what the runs have in common, for the reader of the file.
  """
  from experiments.quickstart import findings

  found = [findings.collect(stages) for stages in runs]
  tests = [{name: findings.results(stages[f'test_{name}'])['greedy'] for name in findings.STEPS} for stages in runs]
  spent = [findings.results(stages['strategies']) for stages in runs]
  rows = {name: _row(found[0].rows[name].title, [test[name] for test in tests]) for name in findings.STEPS}
  for name, row in rows.items():
    if f'hard_{name}' in runs[0]:
      row['hard'] = [findings.results(stages[f'hard_{name}'])['greedy']['accuracy'] for stages in runs]
  pairs = [(name, step.against) for name, step in findings.STEPS.items() if step.against]
  comparisons = [_compared(name, against, tests, [one.best for one in found]) for name, against in pairs]
  comparisons += [_compared(name, against, spent, ()) for name, (_, against) in findings.STRATEGIES.items() if against]
  return {
      **about, 'chosen': [one.best for one in found], 'rows': rows,
      'strategies': {
          name: _row(found[0].strategies[name].title, [one[name] for one in spent]) for name in findings.STRATEGIES
      },
      'comparisons': comparisons,
  }


def _row(title: str, results) -> dict[str, Any]:
  accuracies = [result['accuracy'] for result in results]
  n = min(result['n'] for result in results)
  return {
      'title': title, 'accuracies': accuracies, 'mean': float(np.mean(accuracies)), 'min': min(accuracies),
      'max': max(accuracies), 'band': prediction_interval(accuracies, n), 'n': n,
  }


def _compared(name: str, against: str, results, best: Sequence[str]) -> dict[str, Any]:
  """Pooled paired test over the seeds; the arm behind BEST is each seed's own."""
  from experiments.quickstart.findings import resolve
  from srm_jax import statistics

  others = [resolve(against, best[i]) if best else against for i in range(len(results))]
  ours = np.array([one[name]['correct'] for one in results])
  theirs = np.array([one[other]['correct'] for one, other in zip(results, others)])
  test = statistics.pooled_paired_test(ours, theirs)
  gains = sum(gain > 0 for gain in test.by_seed)
  return {'row': name, 'against': against, 'gains': gains, 'seeds': len(results), **test._asdict()}


def read(path=PATH) -> Reference | None:
  """The committed reference; None where there is none."""
  if not pathlib.Path(path).exists():
    return None
  content = json.loads(pathlib.Path(path).read_text())
  rows = content['rows'] | content['strategies']
  bands = {name: Band(row['mean'], row['min'], row['max'], *row['band']) for name, row in rows.items()}
  about = {key: value for key, value in content.items() if key not in ('rows', 'strategies', 'comparisons')}
  return Reference(bands, about, content['comparisons'])


def markdown(content: Mapping[str, Any]) -> str:
  """The tables of steps and of strategies over the seeds, for a README.

  Args:
    content: of reference.json.
  """
  from experiments.quickstart.findings import BEST
  from experiments.quickstart.table import SHORT, points, probability

  gained = {one['row']: one for one in content['comparisons']}

  def line(name, row):
    cells = [row['title'], f'{100 * row["mean"]:.1f}', f'{100 * row["min"]:.1f}–{100 * row["max"]:.1f}']
    if name in gained:
      one = gained[name]
      over = 'best arm' if one['against'] == BEST else SHORT[one['against']]
      cells += [f'{points(one["difference"])} over {over}', f'{one["gains"]} of {one["seeds"]}', probability(one['p'])]
    return '| ' + ' | '.join(cells + [''] * (6 - len(cells))) + ' |'

  def table(first, rows):
    titles = f'| {first} | Accuracy, % (mean) | over seeds | Points gained | Seeds that gain | pooled p |'
    return '\n'.join([titles, '|---|---:|---:|---:|---:|---:|', *(line(*item) for item in rows.items())])

  return table('Step', content['rows']) + '\n\n' + table('Strategy', content['strategies']) + '\n'


def differences(reference: Reference, settings) -> list[str]:
  """In what a run differs from the reference, so that its bands do not apply; empty where they do."""
  return [
      f'{name} {reference.about[name]} there, {getattr(settings, name)} here'
      for name in ('task', 'size', 'steps') if reference.about[name] != getattr(settings, name)
  ] + [f'{name} made there, given here' for name in settings.models]


def main(argv):
  del argv
  from experiments import command, runtime

  if FLAGS.table:
    print(markdown(json.loads(pathlib.Path(FLAGS.output).read_text())), end='')
    return
  if not FLAGS.workdir:
    raise app.UsageError('give --workdir=DIR for the stages, or --table')
  command.show_progress_of_library()
  runtime.prepare()
  command.guarded(_write)


def _write():
  from configs import quickstart
  from srm_jax import stages

  seeds, arg = [int(seed) for seed in FLAGS.seeds], FLAGS.arg
  configs = [quickstart.get_config(','.join(filter(None, [arg, f'seed={seed}']))) for seed in seeds]
  runs = [stages.run_stages(config, FLAGS.workdir) for config in configs]
  given = dict(part.split('=') for part in filter(None, arg.split(',')))
  command = f'python -m experiments.quickstart.reference --workdir=DIR --seeds={",".join(map(str, seeds))}'
  about = {
      'command': command + (f' --arg={arg}' if arg else ''), 'task': configs[0].task,
      'size': configs[0].size, 'steps': float(given.get('steps', 1.0)),
      'dtype': given.get('dtype', 'float32'), 'seeds': seeds, 'jax': importlib.metadata.version('jax'),
      'python': '.'.join(map(str, sys.version_info[:2])),
  }
  content = summarize(runs, about)
  pathlib.Path(FLAGS.output).write_text(json.dumps(content, indent=1) + '\n')
  for one in content['comparisons']:
    print(
        f'{one["row"]} over {one["against"]}: {100 * one["difference"]:+.1f} points, gains in {one["gains"]} of '
        f'{one["seeds"]} seeds, pooled p = {one["p"]:.4f}'
    )
  print(f'written: {FLAGS.output}')


FLAGS = flags.FLAGS

if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'Where the stages of all seeds are, or go.')
  flags.DEFINE_bool('table', False, 'Print the committed reference as Markdown, and run nothing.')
  flags.DEFINE_list('seeds', ['1', '2', '3', '4', '5'], 'Seeds, none of them one of development.')
  flags.DEFINE_string('arg', '', 'Argument of configs/quickstart.py, without the seed.')
  flags.DEFINE_string('output', str(PATH), 'The file to write, or to print.')
  app.run(main)
