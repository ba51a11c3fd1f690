import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.losses import advantages
from srm_jax.losses.advantages import ADVANTAGES

REWARDS = jnp.array([[1.0, 0, 0, 1, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    'name, options, right, wrong',
    [
        ('group_relative', {'ddof': 1}, 1.62018, -0.54006),
        ('group_relative', {'ddof': 0}, 1.73205, -0.57735),
        ('group_relative', {'ddof': 0, 'eps': 0.0}, np.sqrt(3), -np.sqrt(1 / 3)),
        ('group_relative', {'ddof': 0, 'eps': 1.0}, 0.75 / (1 + np.sqrt(3) / 4), -0.25 / (1 + np.sqrt(3) / 4)),
        ('centered', {}, 0.75, -0.25),
        ('leave_one_out', {}, 6 / 7, -2 / 7),
    ],
)
def test_golden_values(name, options, right, wrong):
  np.testing.assert_allclose(ADVANTAGES[name](REWARDS, **options), jnp.where(REWARDS > 0, right, wrong), atol=1e-5)


def test_leave_one_out_is_the_mean_of_the_others():
  rewards = np.array([[0.3, 1.2, -0.5], [2.0, 0.0, 0.1]])
  others = np.stack([np.delete(rewards, i, axis=1).mean(axis=1) for i in range(3)], axis=1)
  np.testing.assert_allclose(advantages.leave_one_out(jnp.array(rewards)), rewards - others, atol=1e-6)


@pytest.mark.parametrize('name', ADVANTAGES)
def test_equal_rewards_give_exactly_zero(name):
  # The float32 mean of seven times 0.7 is not 0.7: subtracting it leaves 6e-8, a tenth of the default eps.
  rewards = jnp.broadcast_to(jnp.array([[0.1], [0.7]]), (2, 7))
  assert np.any(rewards - jnp.sum(rewards, axis=-1, keepdims=True) / 7)
  np.testing.assert_array_equal(ADVANTAGES[name](rewards), jnp.zeros((2, 7)))
  np.testing.assert_array_equal(ADVANTAGES[name](rewards[:, :1]), jnp.zeros((2, 1)))


@pytest.mark.parametrize('name', ADVANTAGES)
@pytest.mark.parametrize('unscored', [0.0, 50.0, np.nan, np.inf])
def test_unscorable_completions_are_as_if_absent(name, unscored):
  rewards = jnp.array([[1.0, unscored, 0.0, 0.5, unscored]])
  valid = jnp.array([[1, 0, 1, 1, 0]])
  expected = ADVANTAGES[name](jnp.array([[1.0, 0.0, 0.5]]))
  result = ADVANTAGES[name](rewards, valid=valid)
  np.testing.assert_allclose(result[:, [0, 2, 3]], expected, atol=1e-6)
  np.testing.assert_array_equal(result[:, [1, 4]], jnp.zeros((1, 2)))


@pytest.mark.parametrize('name', ADVANTAGES)
def test_groups_with_one_or_no_valid_member_are_zero(name):
  rewards = jnp.array([[1.0, 0.0], [1.0, 0.0]])
  valid = jnp.array([[1, 0], [0, 0]])
  np.testing.assert_array_equal(ADVANTAGES[name](rewards, valid=valid), jnp.zeros((2, 2)))


@pytest.mark.parametrize('name', ADVANTAGES)
def test_contract(name):
  rewards = jnp.array([[1.0, 0.0, 0.5], [2.0, 0.0, 0.1]])
  result = ADVANTAGES[name](rewards.astype(jnp.bfloat16))
  assert result.shape == (2, 3) and result.dtype == jnp.float32
  values = ADVANTAGES[name](rewards)
  np.testing.assert_allclose(values.sum(axis=-1), jnp.zeros(2), atol=1e-5)
  np.testing.assert_allclose(ADVANTAGES[name](rewards + 3), values, atol=1e-5)
  np.testing.assert_array_equal(ADVANTAGES[name](rewards[:1]), values[:1])
  np.testing.assert_array_equal(ADVANTAGES[name](rewards, valid=jnp.ones((2, 3), bool)), values)
  np.testing.assert_array_equal(jax.grad(lambda x: ADVANTAGES[name](x)[0, 0])(rewards), jnp.zeros((2, 3)))
  with pytest.raises(AssertionError):
    ADVANTAGES[name](rewards[0])
  with pytest.raises(AssertionError):
    ADVANTAGES[name](rewards, valid=jnp.ones((2, 2)))


def test_group_relative_ignores_the_scale_of_rewards():
  rewards = jnp.array([[1.0, 0.0, 0.5]])
  np.testing.assert_allclose(
      advantages.group_relative(1000 * rewards, eps=0.0), advantages.group_relative(rewards, eps=0.0), rtol=1e-6
  )


def test_informative_groups():
  rewards = jnp.array([[0.1, 0.1, 0.1], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [np.nan, 1.0, 0.0], [1.0, 0.0, 1.0]])
  valid = jnp.array([[1, 1, 1], [1, 1, 1], [1, 0, 0], [0, 1, 1], [0, 0, 0]])
  np.testing.assert_array_equal(advantages.informative_groups(rewards, valid=valid), [False, True, False, True, False])
  np.testing.assert_array_equal(advantages.informative_groups(rewards[:2]), [False, True])


GAE_REWARDS = jnp.array([[0.0, 0.0, 0.0, 1.0]])
GAE_VALUES = jnp.array([[0.2, 0.4, 0.5, 0.8]])


def test_gae_golden_values():
  estimates, returns = advantages.gae(GAE_REWARDS, GAE_VALUES, jnp.ones((1, 4)), discount=1.0, trace_decay=0.95)
  np.testing.assert_allclose(estimates, [[0.737225, 0.5655, 0.49, 0.2]], atol=1e-6)
  np.testing.assert_allclose(returns, estimates + GAE_VALUES, atol=1e-6)


def test_gae_end_points_of_trace_decay():
  mask = jnp.ones((1, 4))
  monte_carlo, returns = advantages.gae(GAE_REWARDS, GAE_VALUES, mask, discount=0.9, trace_decay=1.0)
  np.testing.assert_allclose(returns, [[0.9**3, 0.9**2, 0.9, 1.0]], atol=1e-6)
  np.testing.assert_allclose(monte_carlo, returns - GAE_VALUES, atol=1e-6)
  one_step, _ = advantages.gae(GAE_REWARDS, GAE_VALUES, mask, discount=0.9, trace_decay=0.0)
  np.testing.assert_allclose(one_step, [[0.16, 0.05, 0.22, 0.2]], atol=1e-6)


def test_gae_steps_over_masked_tokens():
  mask = jnp.array([[0, 1, 1, 0, 0, 1, 1, 0]])
  slots = jnp.array([1, 2, 5, 6])
  rewards = jnp.full((1, 8), np.nan).at[:, slots].set(GAE_REWARDS)
  values = jnp.full((1, 8), np.nan).at[:, slots].set(GAE_VALUES)
  dense = advantages.gae(GAE_REWARDS, GAE_VALUES, jnp.ones((1, 4)), discount=0.9)
  for spread, expected in zip(advantages.gae(rewards, values, mask, discount=0.9), dense, strict=True):
    np.testing.assert_allclose(spread[:, slots], expected, atol=1e-6)
    np.testing.assert_array_equal(spread[:, jnp.array([0, 3, 4, 7])], jnp.zeros((1, 4)))


def test_gae_is_constant_and_checks_shapes():
  gradient = jax.grad(lambda values: advantages.gae(GAE_REWARDS, values, jnp.ones((1, 4)))[1].sum())(GAE_VALUES)
  np.testing.assert_array_equal(gradient, jnp.zeros((1, 4)))
  with pytest.raises(AssertionError):
    advantages.gae(GAE_REWARDS, GAE_VALUES[:, :3], jnp.ones((1, 4)))
  with pytest.raises(AssertionError):
    advantages.gae(GAE_REWARDS[0], GAE_VALUES[0], jnp.ones(4))


def test_whiten_by_hand():
  values = jnp.array([[1.0, jnp.nan, 3.0], [5.0, 7.0, jnp.inf]])
  mask = jnp.array([[1, 0, 1], [1, 1, 0]])
  expected = np.array([[-3, 0, -1], [1, 3, 0]]) / np.sqrt(5)
  np.testing.assert_allclose(advantages.whiten(values, mask), expected, atol=1e-6)
  assert not np.any(advantages.whiten(values, jnp.zeros_like(mask)))  # nothing counts
  assert not np.any(advantages.whiten(jnp.full((1, 3), 4.0), jnp.ones((1, 3))))  # nothing varies
  slope = jax.grad(lambda x: jnp.sum(advantages.whiten(x, mask)))(jnp.ones((2, 3)))
  assert not np.any(slope)
  with pytest.raises(AssertionError):
    advantages.whiten(values, mask[:1])
