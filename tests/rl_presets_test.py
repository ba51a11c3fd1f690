"""Every preset of configs/rl trains: two steps of a tiny policy, and its row of choices is what its paper says."""

import importlib
import math
import pathlib

import numpy as np
import pytest

from configs import base
from srm_jax import checkpoints
from srm_jax.models.config import TransformerConfig
from srm_jax.train import train
from tests import tiny
from tests.tiny import one_device, tiny_tasks  # noqa: F401

FOLDER = pathlib.Path(__file__).parents[1] / 'configs' / 'rl'
# name: (advantage, surrogate, reduction, where the KL stands)
CHOICES = {
    'reinforce': ('returns_to_go', 'reinforce', 'fixed_length', ''),
    'rloo': ('leave_one_out', 'reinforce', 'fixed_length', 'reward'),
    'grpo': ('group_relative', 'clipped', 'sequence_mean_token_mean', ''),
    'dr_grpo': ('centered', 'clipped', 'fixed_length', ''),
    'dapo': ('group_relative', 'clipped', 'token_mean', ''),
    'gspo': ('group_relative', 'gspo', 'sequence_mean_token_mean', ''),
    'cispo': ('group_relative', 'cispo', 'token_mean', ''),
    'sapo': ('group_relative', 'sapo', 'sequence_mean_token_mean', ''),
    'reinforce_plus_plus': ('returns_to_go', 'clipped', 'token_mean', 'reward'),
    'ppo': ('gae', 'clipped', 'token_mean', 'reward'),
    'lcpo': ('group_relative', 'clipped', 'sequence_mean_token_mean', ''),
}


def preset(name, arg='smoke'):
  return importlib.import_module(f'configs.rl.{name}').get_config(arg)


def test_every_preset_is_listed():
  found = {path.stem for path in FOLDER.glob('*.py') if 'problems.run(' in path.read_text()}
  assert found == set(CHOICES)


@pytest.mark.parametrize('name', CHOICES)
def test_choices(name):
  recipe = preset(name, '').recipe
  kl = recipe.kl.place if recipe.kl.coef else ''
  assert (recipe.advantage.name, recipe.surrogate.name, recipe.reduction.name, kl) == CHOICES[name]


def test_details_of_the_papers():
  dapo = preset('dapo', '').recipe
  assert (dapo.surrogate.options.clip_low, dapo.surrogate.options.clip_high) == (0.2, 0.28)
  assert dapo.rollouts.cut == 'mask' and dapo.rollouts.dynamic.prompts == dapo.rollouts.prompts
  assert dapo.rewards.overlong.options.to_dict() == dict(max_length=128, cache=32)
  assert preset('dr_grpo', '').recipe.reduction.options.max_length == 128
  assert preset('ppo', '').recipe.critic.to_dict() == dict(coef=0.5, clip=0.2)


@pytest.fixture(scope='module')
def start(tmp_path_factory):
  model = TransformerConfig(258, 1, 16, 2, 2, 8, 32, max_length=256)
  return tiny.write_model(tmp_path_factory.mktemp('start'), model, scale=3.0)


@pytest.mark.parametrize('name', CHOICES)
def test_a_preset_takes_its_steps(name, start, tmp_path):
  config = preset(name, f'start={start},smoke')
  config.recipe.data.update(task='parity', count=12)
  config.model = base.model(**{**tiny.MODEL, 'max_length': 256})
  config.update(log_every=1, progress=False, checkpoint_every=0)
  config.recipe.rollouts.cut = 'learn'  # this policy never comes to an end
  run = train(config, tmp_path)
  assert run.step == 2
  for row in run.metrics:
    numbers = {key: value for key, value in row.items() if not key.startswith(('length_', 'reward', 'clip_'))}
    assert all(map(math.isfinite, numbers.values())), row
    assert row['sampler_gap_max'] < 1e-3
  if name == 'dapo':
    assert run.metrics[0]['loss/policy'] != 0 and 'reward/overlong' in run.metrics[0]
  if CHOICES[name][3] == 'reward':
    assert abs(run.metrics[0]['kl']) < 1e-3  # the reference is where it starts
  assert ('value_head' in run.params) == (name == 'ppo')


@pytest.mark.parametrize('name, changes', [
    ('dapo', {}), ('ppo', {}), ('grpo', {'order': dict(name='pass_rates', options={})}),
], ids=['carried groups', 'inner epochs and a critic', 'pass rates'])
def test_a_stopped_run_continues_to_the_same_bits(name, changes, start, tmp_path):
  config = preset(name, f'start={start},smoke')
  config.recipe.data.update(task='parity', count=12)
  config.recipe.rollouts.update(cut='learn', **changes)
  if name == 'dapo':
    config.recipe.rollouts.dynamic.prompts = 5  # more than a step needs, so that some are carried
  config.model = base.model(**{**tiny.MODEL, 'max_length': 256})
  config.update(num_steps=5, log_every=1, progress=False, checkpoint_every=0)
  whole = train(config, tmp_path / 'whole')
  with tiny.stopped_after(3):
    train(config, tmp_path / 'stopped')
  again = train(config, tmp_path / 'stopped')
  assert checkpoints.fingerprint(again.params) == checkpoints.fingerprint(whole.params)
  numbers = [[{**row, 'seconds_per_step': 0} for row in run.metrics] for run in (whole, again)]
  np.testing.assert_equal(*numbers)
