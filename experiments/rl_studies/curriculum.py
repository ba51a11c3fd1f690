"""S11: accuracy by level after easy problems first and after all alike, of configs/studies/curriculum.py."""

import numpy as np

from experiments.study import verdicts
from experiments.study.cells import graded, unpack
from experiments.study.running import COLORS, Study, mean_and_seeds

MODELS = {'base': 'start', 'uniform': 'uniform', 'levels': 'from easy to hard'}
TERMS = range(2, 9)  # problem i of the test has TERMS[i % 7] (srm_jax/tasks/levels.py)
LEAST = 0.05


def read(done, config):
  """{model: test grades}."""
  del config
  return {name: graded(done[f'test_{name}']) for name in MODELS}


def by_level(found, name: str) -> np.ndarray:
  """[seeds, levels, problems]: grades of a model."""
  grades = np.array([unpack(cell['models'][name]['correct'], cell['models'][name]['n']) for cell in found])
  return grades.reshape(len(found), -1, len(TERMS)).swapaxes(1, 2)


def judge(found):
  """That the hardest level gains by what came before it."""
  hardest = {name: by_level(found, name)[:, -1].mean(axis=1) for name in ('levels', 'uniform')}
  evidence = verdicts.of_values(hardest['levels'] - hardest['uniform'])
  claim = f'from easy to hard is {100 * LEAST:g} points above uniform at {TERMS[-1]} digits'
  return [verdicts.judge(claim, {'running_sums': evidence}, margin=LEAST)]


def table(found):
  """A number of digits a row."""
  accuracy = {name: by_level(found, name).mean(axis=2) for name in MODELS}
  rows = [
      [str(terms), *(mean_and_seeds(accuracy[name][:, level]) for name in MODELS)] for level, terms in enumerate(TERMS)
  ]
  return ['digits', *(f'test accuracy, {said} (seeds)' for said in MODELS.values())], rows


def draw(found, figure):
  """Accuracy over the number of digits: a thin line a seed, a thick one for their mean."""
  axis = figure.subplots()
  for color, (name, said) in zip(COLORS, MODELS.items(), strict=False):
    values = by_level(found, name).mean(axis=2)
    axis.plot(TERMS, values.T, color=color, alpha=0.25, linewidth=0.8)
    axis.plot(TERMS, values.mean(axis=0), color=color, label=said)
  axis.set(xlabel='digits of a sum', ylabel='greedy accuracy (test)', title='The same updates on the same problems')
  axis.legend()


STUDY = Study('configs/studies/curriculum.py', read, judge, table, draw)
