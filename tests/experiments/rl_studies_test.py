"""What the RL studies read off their cells: gains in pass@k, and the verdicts on them."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from configs import base
from configs.studies import estimators as estimators_config
from configs.studies import rejection_sampling as study_config
from experiments.rl_studies import estimators, length_bias, pass_at_k, rejection_sampling
from experiments.study import cells as cells_of_studies
from experiments.study import running
from experiments.study.cells import pack
from srm_jax import schema
from srm_jax.models.config import TransformerConfig
from srm_jax.rewards import Graded
from srm_jax.tasks import TASKS
from srm_jax.types import Completion, Problem
from tests import tiny
from tests.tiny import tiny_tasks  # noqa: F401


def cell(seed, before, after):
  """Shares by k of the two models: lists over KS."""
  shares = lambda values: {kind: dict(zip(map(str, pass_at_k.KS), values)) for kind in ('pass', 'majority')}
  models = {'base': shares(before), 'grpo': shares(after)}
  return {'task': 'running_sums', 'seed': seed, 'models': models}


def cells(gain_first, gain_last):
  noise = [0.0, 0.01, -0.01, 0.005, -0.005]
  before = [0.3, 0.4, 0.5, 0.6, 0.7]
  return [
      cell(seed, before, [0.3 + gain_first + one, 0.4, 0.5, 0.6, 0.7 + gain_last]) for seed, one in enumerate(noise, 1)
  ]


@pytest.mark.parametrize('first, last, words', [
    (0.3, 0.0, ['supported', 'supported']), (0.3, 0.2, ['supported', 'contradicted']),
    (-0.1, 0.0, ['contradicted', 'contradicted']), (0.3, 0.1, ['supported', 'inconclusive']),
    (0.3, -0.05, ['supported', 'supported']), (0.0, 0.0, ['inconclusive', 'inconclusive']),
])
def test_the_rule(first, last, words):
  assert [one.verdict for one in pass_at_k.judge(cells(first, last))] == words


def test_gains_are_after_minus_before():
  np.testing.assert_allclose(pass_at_k.gains(cells(0.2, 0.1), 1), [0.2, 0.21, 0.19, 0.205, 0.195])
  np.testing.assert_allclose(pass_at_k.gains(cells(0.2, 0.1), 256), [0.1] * 5)


def test_results_are_shown():
  found = cells(0.3, 0.0)
  results = json.loads(json.dumps(running.summary(pass_at_k.STUDY, 'full', found)))
  text = running.markdown(results)
  assert '**supported**' in text and '| 256 |' in text and 'Seeds 1, 2, 3, 4, 5.' in text
  figure = Figure()
  pass_at_k.draw(found, figure)
  assert len(figure.axes) == 2 and all(len(axis.lines) == 12 for axis in figure.axes)


def test_shares_of_many_answers_by_hand(monkeypatch, tmp_path):
  """Two problems: one right of 256, and all right; the wrong answers agree."""
  folder = tiny.write_model(tmp_path, TransformerConfig(258, 1, 16, 2, 2, 8, 32, max_length=64))

  def rollout(generate, prompting, problems, sampling):
    del generate, prompting
    def group(problem, right):
      rows = []
      for sample in range(sampling.samples):
        text = f'#### {problem.answer}' if sample < right else '#### 99'
        rows.append(Graded(problem, Completion(None, sample, text, (1,), (2,), (0.0,), True), float(sample < right)))
      return rows

    return [group(problems[0], 1), group(problems[1], 256)]

  monkeypatch.setattr(pass_at_k, 'rollout', rollout)
  section = schema.resolve(base.train(
      {}, tokenizer='byte', model={}, optimizer={}, num_steps=1,
      measure=dict(data=tiny.data('sums', count=2), new_tokens=4, decode_rows=8, samples=256),
  ))['measure']
  found = pass_at_k.of_many(folder, section, 1)
  for k in pass_at_k.KS:
    assert found['pass'][str(k)] == pytest.approx((k / 256 + 1) / 2)
  assert found['majority']['256'] == 0.5 and found['majority']['1'] == pytest.approx(0.5, abs=0.02)


MODELS = [
    'start', 'gold', 'k1_1', 'k4_1', 'k4_2', 'k4_3', 'k16_1', 'gold_hint', 'hint_1', 'hint_2', 'hint_3', 'gold_scratch',
    'scratch_1', 'scratch_2', 'scratch_3',
]


def sampled_cell(seed, accuracies):
  """Of models with so many right answers of 500; all others have 50."""
  rng, models = np.random.default_rng(seed), {}
  for name in MODELS:
    right = rng.permutation(500) < round(500 * (accuracies.get(name, 0.1) + 0.004 * (seed % 3)))
    models[name] = {'accuracy': float(right.mean()), 'n': 500, 'correct': pack(right), 'wrong_steps': 0.25}
    if name[-1].isdigit():
      models[name] |= dict(
          kept=30, distinct=40, duplicates=5, wrong=55, false_positives=0.5, problems=20, solved=10, hinted=2,
      )
  return {'task': 'sums_in_any_order', 'seed': seed, 'models': models}


def sampled_cells(**accuracies):
  return [sampled_cell(seed, accuracies) for seed in range(1, 6)]


@pytest.mark.parametrize('accuracies, words', [
    (dict(gold=0.3, k1_1=0.4, k4_1=0.5, k16_1=0.6), 'supported supported supported supported'),
    (dict(gold=0.3, k1_1=0.5, k4_1=0.4, k16_1=0.35), 'contradicted contradicted contradicted supported'),
    (dict(gold=0.3, k1_1=0.4, k4_1=0.4, k16_1=0.4), 'inconclusive inconclusive inconclusive supported'),
    (dict(gold=0.3, k1_1=0.4, k4_1=0.5, k16_1=0.6, scratch_3=0.4), 'supported supported supported contradicted'),
])
def test_the_rule_of_rejection_sampling(accuracies, words):
  assert [one.verdict for one in rejection_sampling.judge(sampled_cells(**accuracies))] == words.split()


def test_results_of_rejection_sampling_are_shown():
  found = sampled_cells(gold=0.3, k16_1=0.6)
  results = json.loads(json.dumps(running.summary(rejection_sampling.STUDY, 'full', found)))
  text = running.markdown(results)
  assert '| k16_1 | 0.605 (' in text and '| 0.250 | 10 of 20 | 30 | 0.500 | 2 |' in text
  figure = Figure()
  rejection_sampling.draw(found, figure)
  assert [len(axis.lines) for axis in figure.axes] == [6, 18, 18]


def test_the_line_of_rejection_sampling():
  """Every round asks the model before it, and learns from where its line began."""
  made = study_config.get_config('seed=2')
  assert list(made.arms) == MODELS
  train, ask = (lambda name: made.stages[name].config), (lambda name: made.stages[f'{name}_samples'].config)
  teachers = {name: ask(name).teacher for name in MODELS if name[-1].isdigit()}
  assert teachers == {
      'k1_1': '{gold}', 'k4_1': '{gold}', 'k4_2': '{k4_1}', 'k4_3': '{k4_2}', 'k16_1': '{gold}',
      'hint_1': '{gold_hint}', 'hint_2': '{hint_1}', 'hint_3': '{hint_2}',
      'scratch_1': '{gold_scratch}', 'scratch_2': '{scratch_1}', 'scratch_3': '{scratch_2}',
  }
  for name in teachers:
    mix = train(name).recipe.data.mix
    assert train(name).init_from == ('' if name.startswith('scratch') else '{start}')
    assert mix.kept.data.records == f'{{{name}_samples}}/kept.jsonl' and mix.kept.ratio == 0.75
    assert sum(part.ratio for part in mix.values()) == 1 and ('hinted' in mix) == name.startswith('hint')
    assert mix.kept.data.prompt.hint == '' and bool(ask(name).hint) == name.startswith('hint')
    assert ask(name).paths >= ask(name).sampling.samples


def test_false_positives_by_hand():
  problem, task = Problem('a', '3+8+4', '5'), TASKS['sums_in_any_order']
  texts = ['3+8=1\n1+4=5\n#### 5', '3+8=2\n2+4=5\n#### 5', '#### 5', '4+8=2\n2+3=5\n#### 5']
  assert rejection_sampling.false_positives(task, [(problem, text) for text in texts]) == 0.5
  assert rejection_sampling.false_positives(task, []) == 0.0


# --- S5


def lengths_cell(seed, grown, accuracy=0.5):
  """Lengths that grow by grown[arm] = (wrong, right) tokens a turn from 20, and one accuracy or one of each arm."""
  accuracies = accuracy if isinstance(accuracy, dict) else dict.fromkeys(length_bias.ARMS, accuracy)
  turns, noise = [4.0, 8.0, 12.0], 0.01 * (seed - 3)
  models = {
      arm: {'accuracy': accuracies[arm], 'lengths': {
          'turn': turns, 'wrong': [20 + (wrong + noise) * turn for turn in turns],
          'right': [20 + right * turn for turn in turns],
      }}
      for arm, (wrong, right) in grown.items()
  }
  return {'task': length_bias.TASK, 'seed': seed, 'models': models | {'base': {'accuracy': 0.5}}}


def grown(**changed):
  return {arm: (0.0, 0.0) for arm in length_bias.ARMS} | changed


@pytest.mark.parametrize('changed, accuracy, words', [
    (dict(grpo=(0.2, 0.0)), 0.5, ['supported'] * 4),
    (dict(grpo=(0.2, 0.2)), 0.5, ['supported', 'inconclusive', 'supported', 'supported']),
    (dict(dr_grpo=(0.2, 0.0)), 0.5, ['contradicted', 'contradicted', 'supported', 'supported']),
    ({}, dict(grpo=0.6, dr_grpo=0.5, token_mean=0.5, gspo=0.5),
     ['inconclusive', 'inconclusive', 'supported', 'contradicted']),
    ({}, dict(grpo=0.5, dr_grpo=0.6, token_mean=0.5, gspo=0.5),
     ['inconclusive', 'inconclusive', 'contradicted', 'supported']),
])
def test_the_rule_of_lengths(changed, accuracy, words):
  found = [lengths_cell(seed, grown(**changed), accuracy) for seed in range(1, 6)]
  if words[0] == 'inconclusive':  # arms that differ by nothing have no interval; these differ by seed
    for cell_, sign in zip(found, (1, -1, 1, -1, 0.5)):
      cell_['models']['grpo']['lengths']['wrong'] = [20 + sign * turn for turn in (4.0, 8.0, 12.0)]
  elif words[1] == 'inconclusive':
    for cell_, sign in zip(found, (1, -1, 1, -1, 0.5)):
      cell_['models']['grpo']['lengths']['right'] = [20 + (0.2 + sign) * turn for turn in (4.0, 8.0, 12.0)]
  assert [one.verdict for one in length_bias.judge(found)] == words


def test_slopes_are_tokens_in_ten_turns():
  found = lengths_cell(3, grown(grpo=(0.3, 0.1)))['models']['grpo']['lengths']
  assert [length_bias.slope(found, kind) for kind in ('wrong', 'right', 'gap')] == pytest.approx([3.0, 1.0, 2.0])


def test_lengths_are_read_by_turn_and_without_rows_of_one_kind(tmp_path):
  rows = [
      dict(step=4, length_wrong=20.0, length_right=19.0), dict(step=8, length_wrong=float('nan'), length_right=18.0),
      dict(step=12, length_wrong=22.0, length_right=17.0),
  ]
  (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  assert length_bias.lengths(tmp_path, 4) == {'turn': [1.0, 3.0], 'wrong': [20.0, 22.0], 'right': [19.0, 17.0]}


# --- estimators


def estimators_cell(seed, **accuracies):
  """Grades of 400 problems of each preset; 'base' is right on a half."""
  models = {}
  for name in ('base', *estimators_config.PRESETS):
    share = accuracies.get(name, 0.5) + 0.005 * ((seed * len(name)) % 3)
    right = np.arange(400) < 400 * share
    models[name] = {
        'accuracy': float(right.mean()), 'n': 400, 'correct': cells_of_studies.pack(right), 'updates': 32,
        'tokens': 1e5, 'curve': {'4': 0.5, '8': share},
    }
  return {'task': 'running_sums_with_slips', 'seed': seed, 'models': models}


@pytest.mark.parametrize('accuracies, words', [
    (dict(rloo=0.8, grpo=0.8, dr_grpo=0.8, dapo=0.9, gspo=0.9, cispo=0.9, sapo=0.9), ['supported'] * 4),
    (dict(reinforce=0.9, grpo=0.6, ppo=0.9), ['contradicted'] * 4),
])
def test_the_claims_about_estimators(accuracies, words):
  found = [estimators_cell(seed, **accuracies) for seed in range(1, 6)]
  assert [one.verdict for one in estimators.judge(found)] == words


def test_arms_of_estimators_are_the_presets_on_equal_samples():
  config = estimators_config.get_config('seed=2')
  arms = {name: config.stages[name].config for name in config.arms}
  assert tuple(arms) == tuple(estimators_config.PRESETS)
  for name, arm in arms.items():
    preset = estimators_config.PRESETS[name].get_config('').recipe
    assert arm.recipe.advantage == preset.advantage and arm.recipe.surrogate == preset.surrogate
    assert arm.recipe.updates == preset.updates and arm.recipe.kl.coef == preset.kl.coef
    assert arm.recipe.kl.reference == ('{base}' if preset.kl.coef else '')
    assert arm.recipe.data == arms['grpo'].recipe.data and arm.seed == arms['grpo'].seed
    assert (arm.recipe.rollouts.prompts, arm.recipe.rollouts.samples) == (32, 8)
  assert config.stages.base == estimators_config.get_config('seed=4').stages.base  # one start for all seeds
  assert arms['grpo'].recipe.data.seed != estimators_config.get_config('seed=4').stages.grpo.config.recipe.data.seed
  turns = {arm.num_steps / estimators_config.updates_a_turn(arm.recipe) for arm in arms.values()}
  assert len(turns) == 1
  assert arms['dapo'].recipe.rollouts.dynamic.prompts == 32 and arms['ppo'].num_steps == 8 * arms['grpo'].num_steps


def test_the_new_studies_are_shown():
  for study, found, axes in (
      (length_bias.STUDY, [lengths_cell(seed, grown(grpo=(0.2, 0.0))) for seed in range(1, 6)], 2),
      (estimators.STUDY, [estimators_cell(seed, dapo=0.9) for seed in range(1, 6)], 2),
  ):
    text = running.markdown(json.loads(json.dumps(running.summary(study, 'full', found))))
    assert '**supported**' in text and '| dr_grpo |' in text
    figure = Figure()
    study.draw(found, figure)
    assert len(figure.axes) == axes


def test_sampled_tokens_count_what_was_dropped_and_turns_of_several_updates(tmp_path):
  rows = [dict(step=4, completion_tokens=10.0, drawn_tokens=20.0), dict(step=8, completion_tokens=10.0)]
  (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  found = running.sampled_tokens(tmp_path, dict(prompts=2, samples=8), 4)
  assert found == {'4': 320.0, '8': 480.0}
