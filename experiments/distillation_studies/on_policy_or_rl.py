"""S2: updates and sampled tokens to an accuracy, of configs/studies/on_policy_or_rl.py."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.study.running import COLORS, Study, sampled_tokens
from experiments.study import measure, verdicts
from experiments.study.cells import graded
from srm_jax.recipes.context import DataConfig
from srm_jax.schema import parse, resolve

TARGETS = (0.5, 0.7, 0.87)
JUDGED = 0.7
ARMS = ('opd', 'opd_sampled', 'opd_grpo', 'grpo')
CLAIMS = {'opd_sampled': 1.5, 'opd': 4.0}  # how many times their updates GRPO takes


def read(done, config):
  """{model: test grades; of arms the dev curve from the start on, and tokens by step}."""
  section = resolve(config.measure)
  dev = parse(DataConfig, section['data'], 'measure.data')
  curve = lambda name: measure.curve(done[name].workdir, dev, section['new_tokens'], section['decode_rows'])
  start = list(curve('base').values())[-1]
  found = {name: graded(done[f'test_{name}']) for name in ('teacher', 'base', *config.arms)}
  for arm in config.arms:
    rollouts = config.stages[arm].config.recipe.rollouts
    found[arm]['curve'] = {'0': start, **curve(arm)}
    found[arm]['sampled'] = {'0': 0.0, **sampled_tokens(done[arm].workdir, rollouts)}
  return found


def reached(curve: Mapping[str, float], accuracy: float) -> float:
  """Steps at which a curve first is at an accuracy, linear between checkpoints; inf where it never is."""
  points = sorted((int(step), value) for step, value in curve.items())
  for (before, low), (after, high) in zip([(points[0][0], 0.0), *points], points, strict=False):
    if high >= accuracy:
      return float(after) if before == after else before + (after - before) * (accuracy - low) / (high - low)
  return math.inf


def ratio(slow: Mapping[str, float], fast: Mapping[str, float], accuracy: float) -> tuple[float, bool]:
  """(how many times the steps of `fast` `slow` takes, whether that is only a bound as `slow` did not get there); nan
  where `fast` did not, or began there.
  """
  long, short = reached(slow, accuracy), reached(fast, accuracy)
  if not 0 < short < math.inf:
    return math.nan, False
  last = max(map(int, slow))
  return min(long, last) / short, long > last


def judge_ratio(claim: str, pairs: Sequence[tuple[float, bool]], least: float) -> verdicts.Verdict:
  """The verdict on 'the ratio is at least so high', by the rule of the config: by logarithms, shown as ratios."""
  logs = np.log([value for value, _ in pairs])
  evidence = verdicts.of_values(logs)
  bounds = {key: math.exp(getattr(evidence, key)) for key in ('mean', 'low', 'high')}
  shown = {'running_sums': evidence._replace(**bounds, by_seed=tuple(value for value, _ in pairs))}
  if np.isnan(logs).any():
    needed = {'running_sums': f'starts below {JUDGED:.0%} and longer distilled arms'}
    return verdicts.Verdict(claim, 'inconclusive', shown, needed)
  verdict = verdicts.judge(claim, {'running_sums': evidence}, margin=math.log(least))._replace(evidence=shown)
  if verdict.verdict == 'supported' and not all(logs >= math.log(least)):
    return verdict._replace(verdict='inconclusive', needed={'running_sums': 'seeds that agree'})
  if verdict.verdict != 'supported' and any(bound for _, bound in pairs):
    return verdict._replace(verdict='inconclusive', needed={'running_sums': 'more steps of GRPO'})
  return verdict


def judge(found):
  """GRPO against both forms of on-policy distillation."""
  curve = lambda cell, arm: cell['models'][arm]['curve']
  return [
      judge_ratio(
          f'GRPO takes at least {least:g} times the updates of {arm} to {JUDGED:.0%}',
          [ratio(curve(cell, 'grpo'), curve(cell, arm), JUDGED) for cell in found], least,
      )
      for arm, least in CLAIMS.items()
  ]


def table(found):
  """An arm a row: updates and thousands of sampled tokens to each accuracy, by seed; the accuracy at the end."""
  updates = [f'updates to {target:.0%}' for target in TARGETS]
  header = ['arm', *updates, f'kilotokens to {JUDGED:.0%}', 'test at the end']
  rows = []
  for arm in ARMS:
    models = [cell['models'][arm] for cell in found]
    steps = {target: [reached(model['curve'], target) for model in models] for target in TARGETS}
    tokens = [_tokens_at(model['sampled'], step) for model, step in zip(models, steps[JUDGED], strict=True)]
    ends = ', '.join(f'{model["accuracy"]:.3f}' for model in models)
    rows.append([arm, *(_each(steps[target]) for target in TARGETS), _each([t / 1000 for t in tokens]), ends])
  return header, rows


def _tokens_at(sampled: Mapping[str, float], step: float) -> float:
  steps = sorted(map(int, sampled))
  return math.inf if step == math.inf else float(np.interp(step, steps, [sampled[str(at)] for at in steps]))


def _each(values: Sequence[float]) -> str:
  return ', '.join('-' if value == math.inf else f'{value:.0f}' for value in values)


def draw(found, figure):
  """Accuracy over updates and over sampled tokens: a thin line a seed, a thick one for their mean."""
  by_steps, by_tokens = figure.subplots(1, 2, sharey=True)
  for color, arm in zip(COLORS, ARMS, strict=False):
    models = [cell['models'][arm] for cell in found]
    steps = sorted(map(int, models[0]['curve']))
    values = np.array([[model['curve'][str(step)] for step in steps] for model in models])
    tokens = np.array([[_tokens_at(model['sampled'], step) for step in steps] for model in models])
    for axis, x in ((by_steps, np.broadcast_to(steps, values.shape)), (by_tokens, tokens / 1000)):
      axis.plot(x.T, values.T, color=color, alpha=0.25, linewidth=0.8)
      axis.plot(x.mean(axis=0), values.mean(axis=0), color=color, label=arm)
  by_steps.set(xlabel='updates', ylabel='greedy accuracy (dev)', title='The same rollouts a step')
  by_tokens.set(xlabel='thousand sampled tokens')
  for axis in (by_steps, by_tokens):
    axis.axhline(JUDGED, color='#888888', linewidth=0.6, linestyle=':')
  by_steps.legend()


STUDY = Study('configs/studies/on_policy_or_rl.py', read, judge, table, draw)
