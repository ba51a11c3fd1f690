"""The configs of studies: whole lines in every size, arms that differ only in their loss, and one small cell run."""

import itertools
import json
import pathlib

import jax
import numpy as np
import pytest

from configs.studies import distillation_ablation, logits_or_hidden, teaching
from experiments.study import cells, claims, measure
from srm_jax import stages
from srm_jax.schema import resolve

STUDIES = {'distillation_ablation': distillation_ablation, 'logits_or_hidden': logits_or_hidden}


def _config(study, **given):
  return STUDIES[study].get_config(','.join(f'{name}={value}' for name, value in given.items()))


@pytest.mark.parametrize('study, size', list(itertools.product(STUDIES, teaching.SIZES)))
def test_every_line_opens_and_its_claims_are_about_its_arms(study, size):
  task, size = size.split('/')
  config = _config(study, task=task, size=size, seed=2)
  stages.check(resolve(config))
  claims.check(config)
  assert (config.task, config.seed, config.size) == (task, 2, size)
  assert {f'test_{arm}' for arm in ('teacher', 'base', *config.arms)} < set(config.order)


def test_the_grid_is_whole_and_its_pairs_differ_in_the_source_alone():
  config = resolve(_config('distillation_ablation'))
  names = ('forward_kl', 'reverse_kl', 'jsd', 'skew', 'fitnets', 'cosine', 'minilm', 'logit_hidden')
  assert set(config['arms']) == {'sft', *(f'{name}_{where}' for name in names for where in ('off', 'on'))}
  trained = {arm: config['stages'][arm]['config'] for arm in config['arms']}
  shared = [{key: value for key, value in one.items() if key != 'recipe'} for one in trained.values()]
  assert all(one == shared[0] for one in shared) and shared[0]['init_from'] == '{base}'
  for name in names:
    off, on = (trained[f'{name}_{where}']['recipe'] for where in ('off', 'on'))
    assert off['loss'] == on['loss'] and off['data'] == on['data'] and off['teacher'] == on['teacher']
  assert len({json.dumps(one['recipe'].get('loss'), sort_keys=True) for one in trained.values()}) == len(names) + 1


def test_both_studies_share_teacher_start_and_tests_of_them():
  one, other = (resolve(_config(study, task='rewriting', seed=3)) for study in STUDIES)
  shared = [name for name in one['order'] if name in other['order']]
  assert shared == ['tokenizer', 'teacher', 'annotate', 'base', 'test_teacher', 'test_base']
  assert all(one['stages'][name] == other['stages'][name] for name in shared)


def test_no_two_arms_of_s3_are_the_same():
  config = resolve(_config('logits_or_hidden'))
  losses = [config['stages'][arm]['config']['recipe'].get('loss') for arm in config['arms']]
  assert len({json.dumps(one, sort_keys=True) for one in losses}) == len(losses)
  assert losses[config['arms'].index('ce_patient_skip')]['terms']['hidden']['options']['layers'] == [[0, 0], [1, 2]]


def test_seeds_share_test_problems_and_nothing_else():
  def drawn(seed):
    line = resolve(_config('distillation_ablation', seed=seed))['stages'].values()
    data = [stage['config'].get('data') or stage['config']['recipe']['data'] for stage in line]
    learnt = {one['seed'] for one in data if one['split'] == 'train' and not one['records']}
    runs = {stage['config']['seed'] for stage in line if stage['run'] == 'train'}
    return learnt, runs, {one['seed'] for one in data if one['split'] == 'test'}

  for (problems, runs, tests), other in itertools.combinations(map(drawn, range(1, 6)), 2):
    assert problems and not problems & other[0] and not runs & other[1] and tests == other[2]


def _small(study, task, arms):
  """The smoke line of a study with a few of its arms."""
  config = _config(study, task=task, size='smoke')
  left_out = {name for arm in config.arms if arm not in arms for name in (arm, f'test_{arm}')}
  config.order = tuple(name for name in config.order if name not in left_out)
  config.arms = tuple(arm for arm in config.arms if arm in arms)
  return config


@pytest.mark.slow  # half a minute each
@pytest.mark.parametrize('study, task, arms', [
    ('distillation_ablation', 'rewriting', ('sft', 'logit_hidden_off', 'minilm_on')),
    ('logits_or_hidden', 'sums', ('ce', 'ce_patient_skip')),
])
def test_a_cell_end_to_end(study, task, arms, tmp_path, monkeypatch):
  config, ran = _small(study, task, arms), []
  cell = cells.run_cell(config, tmp_path, report=lambda stage: ran.append(stage.name))
  assert tuple(ran) == config.order and (cell['task'], cell['seed']) == (task, 1) and cell['seconds'] > 0
  assert set(cell['models']) == {'teacher', 'base', *arms}
  for name in ('base', *arms):
    one = cell['models'][name]
    assert one['n'] == 32 and cells.unpack(one['correct'], 32).mean() == pytest.approx(one['accuracy'])
    assert list(one['curve'])[-1] == '3' and all(0 <= share <= 1 for share in one['curve'].values())
    assert 0 < one['entropy'] < np.log(276) and one['divergence'] > 0 and one['flops'] > 0 and one['seconds'] > 0
    assert len(one['cka']) == 1 and 0 < one['cka'][0] < 1
  assert len(cell['models'][arms[0]]['curve']) == 3
  monkeypatch.setattr(stages, 'run_stages', lambda *_, **__: pytest.fail('a finished cell was run again'))
  assert cells.run_cell(config, tmp_path) == cell
  folder = lambda name: next(path for path in pathlib.Path(tmp_path).glob(f'{name}-*'))
  teacher = measure.likeness(folder('teacher'), folder('teacher'), *_measured_on(config))
  assert teacher['divergence'] == pytest.approx(0, abs=1e-5) and np.allclose(teacher['cka'], 1, atol=1e-4)
  jax.clear_caches()


def _measured_on(config):
  from srm_jax.recipes.context import BatchConfig, DataConfig
  from srm_jax.schema import parse

  section = resolve(config.measure)
  return parse(DataConfig, section['data'], 'data'), parse(BatchConfig, section['batch'], 'batch')
