"""S1b: which ways a small student keeps, and what it makes up, of configs/studies/capacity_gap.py."""

from collections.abc import Sequence

import numpy as np

from experiments.study.running import COLORS, Study, mean_and_seeds
from experiments.study import verdicts
from experiments.study.cells import graded
from srm_jax.evaluate import read_completions
from srm_jax.recipes.context import DataConfig, load_problems
from srm_jax.schema import parse, resolve
from srm_jax.tasks import running_sums
from srm_jax.types import Problem

ARMS = ('forward_off', 'forward_on', 'reverse_on', 'minillm_on')
PAIRS = (('reverse_on', 'forward_on'), ('minillm_on', 'forward_off'))
SPOKEN = {'invalid': 'share of invalid texts', 'entropy': 'entropy of ways'}


def read(done, config):
  """{model: test grades and shares of its samples}."""
  found = {}
  for name in ('teacher', 'base', *config.arms):
    section = resolve(config.stages[f'test_{name}'].config.data)
    problems = load_problems(parse(DataConfig, section, 'data'))
    texts = read_completions(done[f'test_{name}'].workdir, 'sampled')
    spoken = shares(problems, [texts[problem.id]['text'] for problem in problems])
    found[name] = graded(done[f'test_{name}'], 'greedy') | spoken
  return found


def shares(problems: Sequence[Problem], texts: Sequence[str]) -> dict[str, float]:
  """{'forward', 'backward', 'entropy', 'invalid', 'mixed'} of one text a problem; ways are those of texts that set out
  on one, entropy is in bits.
  """
  pairs = list(zip(problems, texts, strict=True))
  ways = [way for way in (running_sums.style_of(*pair) for pair in pairs) if way]
  forward = ways.count('forward') / len(ways) if ways else float('nan')
  return {
      'forward': forward, 'backward': 1 - forward, 'entropy': entropy(forward),
      'invalid': float(np.mean([not running_sums.is_valid(*pair) for pair in pairs])),
      'mixed': float(np.mean([running_sums.is_mixed(*pair) for pair in pairs])),
  }


def entropy(share: float) -> float:
  """Of a coin that falls on one side with this probability, in bits."""
  sides = np.array([share, 1 - share])
  return float(-np.sum(sides * np.log2(np.where(sides > 0, sides, 1.0))))


def judge(found):
  """The reverse divergence of each pair against the forward one, on both numbers: lower by how much."""
  number = lambda arm, key: np.array([cell['models'][arm][key] for cell in found])
  return [
      verdicts.judge(
          f'{low} has a lower {SPOKEN[key]} than {high}',
          {'running_sums': verdicts.of_values(number(high, key) - number(low, key))},
      )
      for low, high in PAIRS for key in SPOKEN
  ]


def table(found):
  """A model a row."""
  keys = ('forward', 'entropy', 'invalid', 'mixed', 'accuracy')
  header = ['model', 'share forward (seeds)', 'entropy, bits', 'invalid', 'mixed', 'greedy accuracy']
  values = lambda name, key: [cell['models'][name][key] for cell in found]
  return header, [
      [name, *(mean_and_seeds(values(name, key), '{:.2f}') for key in keys)] for name in ('teacher', 'base', *ARMS)
  ]


def draw(found, figure):
  """Entropy of ways and share of invalid texts: a bar an arm, a dot a seed."""
  for axis, (key, title) in zip(figure.subplots(1, 2), SPOKEN.items(), strict=True):
    for place, name in enumerate(('teacher', 'base', *ARMS)):
      values = [cell['models'][name][key] for cell in found]
      axis.bar(place, np.mean(values), color=COLORS[place % len(COLORS)], alpha=0.6)
      axis.plot([place] * len(values), values, '.', color='#222222', markersize=4)
    axis.set_xticks(range(2 + len(ARMS)), ('teacher', 'base', *ARMS), rotation=20, fontsize=8)
    axis.set_title(title)


STUDY = Study('configs/studies/capacity_gap.py', read, judge, table, draw)
