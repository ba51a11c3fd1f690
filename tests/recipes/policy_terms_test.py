"""What sampled tokens earn, against loops over the tokens of a row; where rewards enter; which options are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from srm_jax.losses.on_policy_distillation import TEACHER_ADVANTAGES
from srm_jax.losses.policy_gradient import SURROGATES
from srm_jax.recipes.policy_terms import POLICY_TERMS
from srm_jax.schema import ConfigError
from tests import tiny
from tests.recipes import dense

OPTIONS = {  # of which no advantage has its default here
    'reverse_kl': [{}, {'discount': 0.9}, {'discount': 1}], 'minillm': [{}, {'discount': 0.9}, {'offset': 0}],
}
CASES = [(name, options) for name in TEACHER_ADVANTAGES for options in OPTIONS[name]]


def policy(advantage='reverse_kl', advantage_options=None, **options):
  return base.policy(advantage, **options)['options'] | dict(advantage_options=advantage_options or {})


def build(options):
  return POLICY_TERMS['policy'](options, 'loss.terms.x.options')


@pytest.fixture(scope='module')
def setting():
  """(student's and teacher's log-probabilities, rollouts, mask): the student has moved since it sampled."""
  rollouts = tiny.random_rollouts()
  mask, rng = rollouts.batch.loss_mask, np.random.default_rng(3)
  student = rollouts.sampler_logprobs + rng.normal(0, 0.3, mask.shape).astype(np.float32)
  teacher = rng.normal(-3, 1, mask.shape).astype(np.float32)
  outside = np.where(mask > 0, 0.0, np.nan).astype(np.float32)  # it must reach nothing
  return student + outside, teacher + outside, rollouts, mask


def expected_loss(student, sampler, advantages, mask):
  return np.where(mask > 0, -np.exp(np.where(mask > 0, student - sampler, 0.0)) * advantages, 0.0)


@pytest.mark.parametrize('name, options', CASES)
@pytest.mark.parametrize('reward_weight', [0.0, 0.5])
def test_values_and_gradient_of_every_advantage(setting, name, options, reward_weight):
  """-rho (A_teacher + weight A_reward), with a gradient through rho alone."""
  student, teacher, rollouts, mask = setting
  term = build(policy(name, options, reward_weight=reward_weight))
  assert term.rewarded == bool(reward_weight)
  values = term.fn(student, teacher, rollouts, mask)
  clean = np.nan_to_num(teacher)
  advantages = dense.TEACHER_ADVANTAGES[name](clean, rollouts.sampler_logprobs, mask, **options)
  advantages = advantages + reward_weight * rollouts.advantages
  expected = expected_loss(np.nan_to_num(student), rollouts.sampler_logprobs, advantages, mask)
  assert np.abs(expected[mask > 0]).mean() > 0.1
  np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
  total = lambda student, teacher: jnp.sum(term.fn(student, teacher, rollouts, mask))
  to_student, to_teacher = jax.grad(total, argnums=(0, 1))(jnp.asarray(student), jnp.asarray(teacher))
  np.testing.assert_allclose(to_student, expected, rtol=1e-4, atol=1e-5)  # of an exponential, its own value
  assert not np.any(to_teacher)


@pytest.mark.parametrize('surrogate', SURROGATES)
def test_every_surrogate_gets_the_advantages(setting, surrogate):
  student, teacher, rollouts, mask = setting
  values = build(policy('minillm', surrogate=surrogate, reward_weight=0.5)).fn(student, teacher, rollouts, mask)
  advantages = dense.minillm_advantages(np.nan_to_num(teacher), rollouts.sampler_logprobs, mask)
  advantages = np.float32(advantages + 0.5 * rollouts.advantages)
  clean = np.nan_to_num(student)
  np.testing.assert_allclose(
      values, SURROGATES[surrogate](clean, rollouts.sampler_logprobs, advantages, mask), rtol=1e-4, atol=1e-5
  )
  assert np.abs(values).sum() > 1


def test_rewards_count_on_the_rows_of_the_term_alone(setting):
  """Beside data, whose advantages may hold anything."""
  student, teacher, rollouts, mask = setting
  half = mask * (np.arange(len(mask)) % 2 == 0)[:, None]
  dirty = rollouts._replace(advantages=np.where(half > 0, rollouts.advantages, np.float32(np.nan)))
  term = build(policy(reward_weight=2.0))
  whole = term.fn(student, teacher, rollouts, mask)
  np.testing.assert_allclose(term.fn(student, teacher, dirty, half), np.where(half > 0, whole, 0.0), rtol=1e-6)


def test_whitened_advantages_have_mean_0_and_deviation_1_over_the_terms_rows(setting):
  student, teacher, rollouts, mask = setting
  rows = np.arange(len(mask)) % 2 == 0
  mask = mask * rows[:, None]
  plain, whitened = (build(policy('minillm', whiten=white)) for white in (False, True))
  assert whitened.coupled and not plain.coupled and whitened.spoken == 'importance_sampling(whitened minillm)'
  on_policy = lambda term: np.asarray(-term.fn(rollouts.sampler_logprobs, teacher, rollouts, mask))  # a ratio of 1
  values, before = on_policy(whitened)[mask > 0], on_policy(plain)[mask > 0]
  np.testing.assert_allclose([values.mean(), values.std()], [0, 1], atol=1e-6)
  np.testing.assert_allclose(values, (before - before.mean()) / before.std(), rtol=1e-4, atol=1e-6)
  assert not on_policy(whitened)[mask == 0].any()
  rewarded = build(policy('minillm', whiten=True, reward_weight=0.5))  # rewards are whitened where they are made
  np.testing.assert_allclose(
      on_policy(rewarded), on_policy(whitened) + 0.5 * np.where(mask > 0, rollouts.advantages, 0), atol=1e-6
  )


def test_without_a_reward_weight_there_need_be_no_rewards(setting):
  student, teacher, rollouts, mask = setting
  term = build(policy())
  without = term.fn(student, teacher, rollouts._replace(advantages=None), mask)
  np.testing.assert_array_equal(without, term.fn(student, teacher, rollouts, mask))


def test_terms_say_what_they_are():
  assert build(policy()).spoken == 'importance_sampling(reverse_kl)'
  assert build(policy('minillm', surrogate='clipped', reward_weight=0.5)).spoken == 'clipped(minillm + 0.5 rewards)'


HERE = r'loss\.terms\.x\.options'


@pytest.mark.parametrize('options, message', [
    (policy('forward_kl'), rf"{HERE}\.advantage 'forward_kl' unknown; choose from \['minillm', 'reverse_kl'\]"),
    (policy(advantage_options={'gamma': 1}), rf"option of {HERE}\.advantage 'reverse_kl' 'gamma' unknown"),
    (policy(advantage_options={'discount': 1.5}), rf'{HERE}: discount 1\.5 of reverse_kl is outside \[0, 1\]'),
    (policy('minillm', {'offset': 2}), rf'{HERE}: offset 2 of minillm must be 1'),
    (policy(surrogate='ppo'), rf"{HERE}\.surrogate 'ppo' unknown"),
    (policy(surrogate='clipped', surrogate_options={'clip': 1}), rf"of {HERE}\.surrogate 'clipped' 'clip' unknown"),
    (policy(surrogate_options={'old_logprobs': 0.0}), r"'importance_sampling' 'old_logprobs' unknown; choose"),
    (policy(surrogate='clipped', surrogate_options={'clip_low': -1}), rf'{HERE}: clip_low'),
    (policy(surrogate='clipped', surrogate_options={'clip_low': 'a'}), rf'{HERE}: '),
    (policy(surrogate='clipped', surrogate_options={'dual_clip': 0.5}), rf'{HERE}: dual_clip 0\.5'),
    (policy(reward_weight='a'), rf"{HERE}\.reward_weight is 'a' \(str\); expected float"),
    (policy(reward_weight=True), rf'{HERE}\.reward_weight is True'),
    (policy() | {'kl': 0.1}, rf"{HERE}\.kl: key 'kl' unknown"),
    ({'advantage': 'minillm'}, rf'{HERE}\.advantage_options is missing'),
])
def test_impossible_options_are_refused(options, message):
  with pytest.raises(ConfigError, match=message):
    build(options)


def test_there_is_a_test_of_every_kind():
  assert POLICY_TERMS.keys() == {'policy'} and OPTIONS.keys() == TEACHER_ADVANTAGES.keys()
  assert base.policy()['options'] == policy() and base.policy()['kind'] == 'policy'
