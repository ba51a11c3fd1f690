"""What the studies of adapters, curricula and lengths read off their cells, and the verdicts on it."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from configs.studies import curriculum as curriculum_config
from configs.studies import length_control as length_config
from configs.studies import lora_rl as lora_config
from experiments.rl_studies import curriculum, length_control, lora_rl
from experiments.study import running
from experiments.study.cells import pack
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes.context import DataConfig, load_problems
from srm_jax.schema import parse, resolve
from tests import tiny

NOISE = (0.0, 0.01, -0.01, 0.005, -0.005)


def cells(models):
  """Cells of five seeds; models: noise of a seed -> {name: numbers}."""
  return [{'task': 'x', 'seed': seed, 'models': models(noise)} for seed, noise in enumerate(NOISE, 1)]


def words(study, found):
  return [one.verdict for one in study.judge(found)]


def shown(study, found, axes):
  """The study's text, after it was drawn."""
  figure = Figure()
  study.draw(found, figure)
  assert len(figure.axes) == axes
  return running.markdown(json.loads(json.dumps(running.summary(study, 'full', found))))


def adapters(full, two, eight):
  curve = {'4': 0.1, '8': 0.2}
  accuracies = lambda noise: dict(base=0.1, full=full, lora_2=two, lora_8=eight + noise, lora_32=0.5)
  return cells(lambda noise: {
      name: dict(accuracy=value, trained=1000, curve=curve) for name, value in accuracies(noise).items()
  })


@pytest.mark.parametrize('full, two, eight, expected', [
    (0.5, 0.4, 0.5, ['supported', 'supported']), (0.5, 0.5, 0.53, ['supported', 'supported']),
    (0.5, 0.5, 0.4, ['contradicted', 'contradicted']), (0.5, 0.5, 0.6, ['contradicted', 'supported']),
    (0.5, 0.5, 0.45, ['inconclusive', 'contradicted']), (0.5, 0.51, 0.5, ['supported', 'inconclusive']),
])
def test_the_rule_of_adapters(full, two, eight, expected):
  assert words(lora_rl.STUDY, adapters(full, two, eight)) == expected


def test_adapters_are_shown():
  text = shown(lora_rl.STUDY, adapters(0.5, 0.4, 0.5), axes=2)
  assert '| lora_8 | 1,000 | 0.500 (0.500, 0.510, 0.490, 0.505, 0.495) |' in text and 'Seeds 1, 2, 3, 4, 5.' in text


def test_arms_differ_in_adapters_and_rate_alone():
  arms = resolve(lora_config.get_config('size=smoke').stages)
  whole = arms['full']['config']
  for name, rank in lora_config.RANKS.items():
    config = arms[name]['config']
    assert config['adapters']['rank'] == rank
    assert config['optimizer']['learning_rate'] == pytest.approx(3e-3 if rank else 3e-4)
    assert config['recipe'] == whole['recipe'] and config['init_from'] == whole['init_from'] == '{base}'


def levels(of_uniform, of_levels):
  """Shares of right answers at the hardest level; half of all others are right."""

  def grades(share):
    right = np.tile([1.0, 0.0], 50 * 7 // 2 * 2)[: 100 * 7].reshape(100, 7)
    right[:, -1] = np.arange(100) < round(100 * share)
    return dict(correct=pack(right.reshape(-1)), n=700, accuracy=float(right.mean()))

  return cells(lambda noise: dict(base=grades(0.1), uniform=grades(of_uniform), levels=grades(of_levels + noise)))


@pytest.mark.parametrize('of_uniform, of_levels, expected', [
    (0.3, 0.5, 'supported'), (0.3, 0.32, 'contradicted'), (0.3, 0.35, 'inconclusive'), (0.5, 0.3, 'contradicted'),
])
def test_the_rule_of_levels(of_uniform, of_levels, expected):
  found = levels(of_uniform, of_levels)
  assert words(curriculum.STUDY, found) == [expected]
  np.testing.assert_allclose(curriculum.by_level(found, 'uniform').mean(axis=2)[:, -1], of_uniform)
  text = shown(curriculum.STUDY, found, axes=1)
  assert f'| 8 | 0.100 (0.100, 0.100, 0.100, 0.100, 0.100) | {of_uniform:.3f} (' in text


def test_the_levels_of_a_study_are_those_of_its_test():
  made = resolve(curriculum_config.get_config('size=smoke').stages)
  problems = load_problems(parse(DataConfig, made['test_base']['config']['data'], 'data'))
  assert [problem.metadata['steps'] + 1 for problem in problems] == [*curriculum.TERMS] * 4
  arms = [made[name]['config'] for name in curriculum_config.ORDERS]
  for arm in arms:
    del arm['recipe']['rollouts']['order']
  assert arms[0] == arms[1]


def test_lengths_by_hand():
  found = length_control.lengths(
      np.array([15, 15, 21, 21]), np.array([14, 16, 21, 25]), np.array([1.0, 0.0, 1.0, 1.0])
  )
  assert found['error'] == 1.5 and found['length'] == 19
  assert found['correlation'] == pytest.approx(np.corrcoef([15, 15, 21, 21], [14, 16, 21, 25])[0, 1])
  assert found['by_budget'] == {
      '15': dict(length=15, deviation=1, error=1, accuracy=0.5),
      '21': dict(length=23, deviation=2, error=2, accuracy=1),
  }
  assert length_control.lengths(np.array([15, 21]), np.array([15, 15]), np.ones(2))['correlation'] == 0


def controlled(*, correlation=0.95, error=1.0, drop=0.0, longer=3.0):
  by_budget = {str(budget): dict(length=budget, accuracy=0.9) for budget in length_config.BUDGETS}
  model = lambda **changed: dict(accuracy=0.9, correlation=0.0, error=5.0, length=20.0, by_budget=by_budget) | changed
  return cells(lambda noise: dict(
      base=model(), exact=model(accuracy=0.9 - drop + noise, correlation=correlation + noise, error=error + noise),
      warm=model(length=16.0 + longer + noise), cold=model(length=16.0),
  ))


@pytest.mark.parametrize('place, changed, other', [
    (0, dict(correlation=0.8), 'contradicted'), (0, dict(correlation=0.9), 'inconclusive'),
    (1, dict(error=2.0), 'contradicted'), (1, dict(error=1.5), 'inconclusive'),
    (2, dict(drop=0.05), 'contradicted'), (2, dict(drop=0.03), 'inconclusive'),
    (3, dict(longer=-1.0), 'contradicted'), (3, dict(longer=0.0), 'inconclusive'),
])
def test_the_rule_of_lengths(place, changed, other):
  assert words(length_control.STUDY, controlled()) == ['supported'] * 4
  expected = ['supported'] * 4
  expected[place] = other
  assert words(length_control.STUDY, controlled(**changed)) == expected


def test_lengths_are_shown():
  text = shown(length_control.STUDY, controlled(), axes=2)
  assert '| Max from Exact | 0.900' in text and '| 15.0, 17.0, 21.0, 25.0 | 0.90, 0.90, 0.90, 0.90 |' in text


def test_the_tokens_of_completions_are_counted_with_their_end(tmp_path):
  """One completion ends by itself, one was cut where it stands; both by hand."""
  config = resolve(length_config.get_config('size=smoke').stages)['test_exact']['config']
  config['data']['count'] = 2
  config['model'] = tiny.write_model(tmp_path / 'model', TransformerConfig(258, 1, 16, 2, 2, 8, 32, max_length=64))
  problems = load_problems(parse(DataConfig, config['data'], 'data'))
  folder = tmp_path / 'test'
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(config | {'model': str(config['model'])}))
  rows = [('12345~~\n#### 5', 1.0), ('~' * 32, 0.0)]
  (folder / 'completions_0.jsonl').write_text(''.join(
      json.dumps(dict(row='sampled', id=problem.id, prompt='', text=text, reward=reward)) + '\n'
      for problem, (text, reward) in zip(problems, rows, strict=True)
  ))
  found = length_control.of_evaluation(folder)
  budgets = [problem.metadata['budget'] for problem in problems]
  assert found['length'] == (15 + 32) / 2 and set(budgets) <= set(length_config.BUDGETS)
  assert found['error'] == (abs(15 - budgets[0]) + abs(32 - budgets[1])) / 2
