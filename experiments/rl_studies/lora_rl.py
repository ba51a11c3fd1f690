"""S10: GRPO on all weights and on adapters, of configs/studies/lora_rl.py."""

import numpy as np

from experiments.study import verdicts
from experiments.study.cells import graded
from experiments.study.running import COLORS, Study, mean_and_seeds
from srm_jax import checkpoints, metrics
from srm_jax.models.adapters import num_adapter_params
from srm_jax.models.config import num_params

ARMS = ('full', 'lora_2', 'lora_8', 'lora_32')
NEAR, NOTHING = 0.05, 0.01


def read(done, config):
  """{model: test grades; of arms the numbers that are trained, and the pass rate of what was sampled by step}."""
  found = {name: graded(done[f'test_{name}']) for name in ('base', *config.arms)}
  for name in config.arms:
    folder = done[name].workdir
    found[name]['trained'] = trained(folder)
    found[name]['curve'] = {str(row['step']): row['pass_rate'] for row in metrics.read(folder)}
  return found


def trained(folder) -> int:
  """How many numbers a run trains: of its adapters, or of the whole model."""
  model, adapter = checkpoints.model_config(folder), checkpoints.adapters_of(folder)
  return num_adapter_params(model, adapter) if adapter else num_params(model)


def gaps(found, other: str) -> np.ndarray:
  """[seeds]: accuracy of rank 8 minus that of another arm."""
  of = lambda name: np.array([cell['models'][name]['accuracy'] for cell in found])
  return of('lora_8') - of(other)


def judge(found):
  """That rank 8 is as good as all weights, and rank 2 no better than rank 8."""
  evidence = lambda other: {'running_sums': verdicts.of_values(gaps(found, other))}
  return [
      verdicts.judge_within(f'rank 8 is within {NEAR:.0%} of all weights', evidence('full'), margin=NEAR),
      verdicts.judge(f'rank 2 is not better than rank 8 by {NOTHING:.0%}', evidence('lora_2'), margin=-NOTHING),
  ]


def table(found):
  """A model a row."""
  of = lambda name, key: [cell['models'][name][key] for cell in found]
  rows = [['start', '-', mean_and_seeds(of('base', 'accuracy'))]]
  rows += [[name, f'{of(name, "trained")[0]:,}', mean_and_seeds(of(name, 'accuracy'))] for name in ARMS]
  return ['model', 'trained numbers', 'test accuracy (seeds)'], rows


def draw(found, figure):
  """The pass rate of samples over updates, the mean over seeds; accuracy at the end, a dot a seed."""
  curves, ends = figure.subplots(1, 2, width_ratios=(3, 2))
  for place, (color, name) in enumerate(zip(COLORS, ARMS, strict=False)):
    models = [cell['models'][name] for cell in found]
    steps = sorted(map(int, models[0]['curve']))
    curves.plot(steps, np.mean([[one['curve'][str(step)] for step in steps] for one in models], axis=0), color=color,
                label=name)
    values = [one['accuracy'] for one in models]
    ends.bar(place, np.mean(values), color=color, alpha=0.6)
    ends.plot([place] * len(values), values, '.', color='#222222', markersize=4)
  curves.set(xlabel='updates', title='pass rate of samples')
  curves.legend()
  ends.set_xticks(range(len(ARMS)), ARMS)
  ends.set(title='greedy accuracy (test)')


STUDY = Study('configs/studies/lora_rl.py', read, judge, table, draw)
