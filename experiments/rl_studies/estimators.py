"""Every preset of configs/rl from one start, on equal prompts and samples, of configs/studies/estimators.py."""

import numpy as np

from configs.studies import teaching
from configs.studies.estimators import PRESETS, updates_a_turn
from experiments.study import claims
from experiments.study.cells import graded, values
from experiments.study.running import COLORS, Study, mean_and_seeds, sampled_tokens
from srm_jax import metrics

GROUPED = ('rloo', 'grpo', 'dr_grpo')
CLAIMS = (
    teaching.claim('A baseline: the mean of RLOO, GRPO and Dr. GRPO is above REINFORCE', GROUPED, ['reinforce']),
    teaching.claim('Dynamic sampling: DAPO is above GRPO after as many updates', ['dapo'], ['grpo']),
    teaching.claim('No critic is needed: RLOO is above PPO', ['rloo'], ['ppo']),
    teaching.claim('Four updates on a batch: the mean of GSPO, CISPO and SAPO is above GRPO',
                   ['gspo', 'cispo', 'sapo'], ['grpo']),
)
STYLES = ('-', '--')


def read(done, config):
  """{model: test grades; of arms their curve of pass rates by turn, what they sampled, and their updates}."""
  found = {name: graded(done[f'test_{name}']) for name in ('base', *config.arms)}
  for arm in config.arms:
    training = config.stages[arm].config
    repeats, workdir = updates_a_turn(training.recipe), done[arm].workdir
    curve = {f'{row["step"] / repeats:g}': row['pass_rate'] for row in metrics.read(workdir)}
    sampled = sampled_tokens(workdir, training.recipe.rollouts, repeats)
    found[arm] |= {'curve': curve, 'tokens': list(sampled.values())[-1], 'updates': training.num_steps}
  return found


def judge(found):
  """The claims, by paired grades."""
  return [claims.judge(claim, found) for claim in CLAIMS]


def table(found):
  """An arm a row, the start first."""
  header = ['preset', 'updates', 'kilotokens sampled', 'accuracy at temperature 1', 'over GRPO']
  rows = [['start', '0', '0', mean_and_seeds(list(values(found, ['base'], 'accuracy'))), '']]
  grpo = values(found, ['grpo'], 'accuracy')
  for name in PRESETS:
    accuracy = values(found, [name], 'accuracy')
    updates, tokens = (values(found, [name], key).mean() for key in ('updates', 'tokens'))
    rows.append([
        name, f'{updates:.0f}', f'{tokens / 1000:.0f}', mean_and_seeds(list(accuracy)),
        f'{(accuracy - grpo).mean():+.3f}',
    ])
  return header, rows


def draw(found, figure):
  """The pass rate of what is sampled, over turns, and the accuracy at the end: means over seeds, a dot a seed."""
  over_turns, at_end = figure.subplots(1, 2)
  for place, name in enumerate(PRESETS):
    models = [cell['models'][name] for cell in found]
    look = dict(color=COLORS[place % len(COLORS)], linestyle=STYLES[place // len(COLORS)])
    curves = [model['curve'] for model in models]
    turns = [turn for turn in curves[0] if all(turn in curve for curve in curves)]
    over_turns.plot(
        [float(turn) for turn in turns], [np.mean([curve[turn] for curve in curves]) for turn in turns], label=name,
        **look,
    )
    accuracies = [model['accuracy'] for model in models]
    at_end.barh(place, np.mean(accuracies), color=look['color'], alpha=0.6)
    at_end.plot(accuracies, [place] * len(models), '.', color='#222222', markersize=4)
  over_turns.set(xlabel='turns of sampling and learning', ylabel='pass rate of what is drawn')
  over_turns.legend(fontsize=6)
  at_end.axvline(np.mean(values(found, ['base'], 'accuracy')), color='#888888', linewidth=0.8, linestyle=':')
  at_end.set_yticks(range(len(PRESETS)), PRESETS, fontsize=7)
  at_end.invert_yaxis()
  at_end.set(xlabel='accuracy at temperature 1 (test)')


STUDY = Study('configs/studies/estimators.py', read, judge, table, draw)
