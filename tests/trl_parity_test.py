"""RL losses against TRL's own code, value and gradient, on random arrays with ratios on both sides of every clip."""

import collections
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.losses import kl_penalty
from srm_jax.losses.advantages import ADVANTAGES
from srm_jax.losses.policy_gradient import SURROGATES
from srm_jax.losses.reductions import REDUCTIONS

ROWS, LENGTH = 6, 10
RNG = np.random.default_rng(0)
LENGTHS = np.array([10, 7, 1, 4, 9, 3])
MASK = (np.arange(LENGTH) < LENGTHS[:, None]).astype(np.float32)
OLD = RNG.normal(-1.5, 0.4, (ROWS, LENGTH)).astype(np.float32)
LOGPROBS = (OLD + RNG.normal(0, 0.3, OLD.shape)).astype(np.float32)
REFERENCE = (OLD + RNG.normal(0, 0.3, OLD.shape)).astype(np.float32)
ADVANTAGE = RNG.normal(size=ROWS).astype(np.float32)

CLIP = dict(clip_low=0.2, clip_high=0.28)
# TRL's loss_type: (our surrogate, its options, our reduction, its options)
LOSSES = {
    'grpo': ('clipped', CLIP, 'sequence_mean_token_mean', {}),
    'dr_grpo': ('clipped', CLIP, 'fixed_length', dict(max_length=12)),
    'dapo': ('clipped', CLIP, 'token_mean', {}),
    'bnpo': ('clipped', CLIP, 'token_mean', {}),
    'cispo': ('cispo', dict(max_ratio=1.28), 'token_mean', {}),
    'sapo': ('sapo', dict(positive=1.0, negative=1.05), 'sequence_mean_token_mean', {}),
}


def theirs(loss_type, level, beta):
  """(loss, gradient) of GRPOTrainer._compute_loss, whose model says LOGPROBS."""
  torch, trl = pytest.importorskip('torch'), pytest.importorskip('trl')
  logprobs = torch.tensor(LOGPROBS, requires_grad=True)
  trainer = mock.MagicMock(
      aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=beta, use_vllm=False,
      importance_sampling_level=level, loss_type=loss_type, epsilon_low=0.2, epsilon_high=0.28,
      max_completion_length=12, current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
      _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
  )
  if loss_type == 'cispo':
    trainer.epsilon_high = 1.28
  trainer.args = mock.MagicMock(
      delta=None, use_bias_correction_kl=False, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
      steps_per_generation=1,
  )
  trainer.accelerator = mock.MagicMock(num_processes=1)
  trainer.accelerator.gather.side_effect = trainer.accelerator.reduce.side_effect = lambda x, **_: x
  trainer._get_per_token_logps_and_entropies.return_value = (logprobs, torch.zeros(ROWS, LENGTH), None)
  inputs = dict(
      prompt_ids=torch.zeros(ROWS, 1).long(), prompt_mask=torch.ones(ROWS, 1),
      completion_ids=torch.zeros(ROWS, LENGTH).long(), completion_mask=torch.tensor(MASK),
      advantages=torch.tensor(ADVANTAGE), old_per_token_logps=torch.tensor(OLD),
      ref_per_token_logps=torch.tensor(REFERENCE), num_items_in_batch=torch.tensor(MASK.sum()),
  )
  loss = trl.GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
  loss.backward()
  return loss.item(), logprobs.grad.numpy()


def ours(loss_type, level, beta):
  surrogate, options, reduction, more = LOSSES[loss_type]
  if level == 'sequence':
    surrogate = 'gspo'

  def loss(logprobs):
    values = SURROGATES[surrogate](logprobs, OLD, ADVANTAGE[:, None] * MASK, MASK, **options)
    if beta:
      values = values + beta * kl_penalty.k3(logprobs, jnp.array(REFERENCE))
    total, count = REDUCTIONS[reduction](values, MASK, **more)
    return total / count

  return jax.value_and_grad(loss)(jnp.array(LOGPROBS))


@pytest.mark.parametrize('beta', [0.0, 0.04])
@pytest.mark.parametrize('loss_type, level', [
    *((name, 'token') for name in LOSSES), ('grpo', 'sequence'), ('dapo', 'sequence'),
])
def test_losses_are_trls(loss_type, level, beta):
  (value, gradient), (their_value, their_gradient) = (f(loss_type, level, beta) for f in (ours, theirs))
  assert np.abs(their_gradient).max() > 1e-3
  np.testing.assert_allclose(value, their_value, atol=1e-5)
  np.testing.assert_allclose(gradient, their_gradient, atol=1e-5)


def by_trainer(rewards, *, scale):
  """TRL's lines for advantages of GRPO (scale) and RLOO ('rloo'), with its own nanstd: NaN is unscorable."""
  torch = pytest.importorskip('torch')
  utils = pytest.importorskip('trl.trainer.utils')
  rewards = torch.tensor(rewards)
  if scale == 'rloo':
    scorable = (~torch.isnan(rewards)).sum(dim=1, keepdim=True)
    found = rewards - (torch.nansum(rewards, dim=1, keepdim=True) - rewards) / (scorable - 1)
  else:
    found = rewards - torch.nanmean(rewards, dim=1, keepdim=True)
    if scale == 'group':
      found = found / (utils.nanstd(rewards, dim=1)[:, None] + 1e-4)
    elif scale == 'batch':
      found = found / (utils.nanstd(rewards.reshape(-1)) + 1e-4)
  return torch.nan_to_num(found, nan=0.0).numpy()


@pytest.mark.parametrize('name, options, scale', [
    ('group_relative', dict(eps=1e-4), 'group'), ('group_relative', dict(eps=1e-4, scale='batch'), 'batch'),
    ('group_relative', dict(scale='none'), 'none'), ('centered', {}, 'none'), ('leave_one_out', {}, 'rloo'),
])
def test_advantages_are_trls(name, options, scale):
  rewards = RNG.normal(size=(4, 5)).astype(np.float32)
  rewards[1, 2] = rewards[3, 0] = rewards[3, 4] = np.nan
  found = ADVANTAGES[name](jnp.array(rewards), valid=~np.isnan(rewards), **options)
  np.testing.assert_allclose(found, by_trainer(rewards, scale=scale), atol=1e-5)
