"""S2b: held-out accuracy after one prompt or eight, of configs/studies/one_prompt.py."""

import numpy as np

from experiments.study.running import COLORS, Study, mean_and_seeds
from experiments.study import cells, verdicts
from experiments.study.cells import graded

PROMPTS = (1, 8)


def read(done, config):
  """{model: test grades}."""
  return {name: graded(done[f'test_{name}']) for name in ('teacher', 'base', *config.arms)}


def judge(found):
  """Distillation against GRPO, for each number of prompts."""
  said = []
  for prompts in PROMPTS:
    evidence = verdicts.of_grades(*(cells.correct(found, [f'{arm}_{prompts}']) for arm in ('opd', 'grpo')))
    claim = f'distillation is above GRPO on held-out problems, prompts: {prompts}'
    said.append(verdicts.judge(claim, {'running_sums': evidence}))
  return said


def _models():
  return ('base', *(f'{arm}_{prompts}' for prompts in PROMPTS for arm in ('opd', 'grpo')), 'teacher')


def table(found):
  """A model a row."""
  accuracies = lambda name: [cell['models'][name]['accuracy'] for cell in found]
  return ['model', 'test accuracy (seeds)'], [[name, mean_and_seeds(accuracies(name))] for name in _models()]


def draw(found, figure):
  """A bar a model, a dot a seed."""
  axis = figure.subplots()
  for place, name in enumerate(_models()):
    values = [cell['models'][name]['accuracy'] for cell in found]
    color = COLORS[('opd' in name) + 2 * ('grpo' in name)] if '_' in name else COLORS[-1]
    axis.bar(place, np.mean(values), color=color, alpha=0.6)
    axis.plot([place] * len(values), values, '.', color='#222222', markersize=4)
  axis.set_xticks(range(len(_models())), _models())
  axis.set(ylabel='greedy accuracy (test)', title='20 steps of 256 samples of 1 or 8 prompts')


STUDY = Study('configs/studies/one_prompt.py', read, judge, table, draw)
