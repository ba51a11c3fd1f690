import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.losses import advantages
from srm_jax.losses.advantages import ADVANTAGES
from srm_jax.losses.policy_gradient import SURROGATES
from srm_jax.losses.reductions import REDUCTIONS

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


# Two groups of three: a spread of its own in each, and one over both.
SCORES = np.array([[1.0, 0.0, 0.0], [3.0, 1.0, 1.0]])


@pytest.mark.parametrize('ddof', [0, 1])
def test_scale_of_the_batch_is_one_number_for_all_groups(ddof):
  centred = SCORES - SCORES.mean(axis=1, keepdims=True)
  found = advantages.group_relative(jnp.array(SCORES), scale='batch', ddof=ddof, eps=0.0)
  np.testing.assert_allclose(found, centred / SCORES.std(ddof=ddof), rtol=1e-6)
  valid = np.array([[1, 1, 1], [1, 1, 0]])
  kept = np.array([1.0, 0.0, 0.0, 3.0, 1.0])
  rewards = jnp.array(SCORES).at[1, 2].set(jnp.nan)
  found = advantages.group_relative(rewards, valid=valid, scale='batch', ddof=ddof, eps=0.0)
  np.testing.assert_allclose(found[1], np.array([1.0, -1.0, 0.0]) / kept.std(ddof=ddof), rtol=1e-6)


def test_scale_none_is_the_centred_reward():
  np.testing.assert_array_equal(
      advantages.group_relative(jnp.array(SCORES), scale='none'), advantages.centered(jnp.array(SCORES))
  )
  with pytest.raises(ValueError, match="scale 'row' of group_relative unknown"):
    advantages.group_relative(REWARDS, scale='row')


def test_returns_to_go_by_hand():
  rewards = jnp.array([[0.5, 7.0, 0.0, 1.0], [1.0, 0.0, 0.0, 9.0]])
  mask = jnp.array([[1, 0, 1, 1], [1, 1, 1, 0]])
  found, again = advantages.returns_to_go(rewards, mask)
  np.testing.assert_allclose(found, [[1.5, 0, 1, 1], [1, 0, 0, 0]])
  np.testing.assert_array_equal(found, again)
  discounted, _ = advantages.returns_to_go(rewards, mask, discount=0.5)
  np.testing.assert_allclose(discounted, [[0.75, 0, 0.5, 1], [1, 0, 0, 0]])


def test_a_grade_at_the_end_is_the_return_of_every_token():
  """So REINFORCE on rewards of 0 and 1 is cross-entropy on what is right."""
  mask = jnp.array([[0, 1, 1, 1], [0, 1, 1, 0]])
  rewards = jnp.array([[0, 0, 0, 1.0], [0, 0, -2.0, 0]])
  np.testing.assert_array_equal(advantages.returns_to_go(rewards, mask)[0], mask * jnp.array([[1.0], [-2.0]]))


@pytest.mark.parametrize('name', advantages.TOKEN_ADVANTAGES)
def test_token_advantages_share_a_contract(name):
  rewards, mask = jnp.array([[1.0, jnp.nan, 2.0]]), jnp.array([[1, 0, 1]])
  values = jnp.array([[0.5, jnp.nan, 0.25]])
  found, returns = advantages.TOKEN_ADVANTAGES[name](rewards, mask, values=values)
  assert found.shape == returns.shape == (1, 3) and found.dtype == jnp.float32
  assert np.all(np.isfinite(found)) and found[0, 1] == returns[0, 1] == 0
  with pytest.raises(AssertionError):
    advantages.TOKEN_ADVANTAGES[name](rewards, mask[:, :2], values=values)


def test_a_token_is_worth_the_steps_that_end_at_it_or_later():
  """Steps (0.2, 0.8) and (0.4): standardised over all three; the second completion's padding is worth nothing."""
  rewards = jnp.array([[[0.0, 0.2, 0.0, 0.8], [0.4, 0.0, 0.0, 0.0]]])
  ends = jnp.array([[[0, 1, 0, 1], [1, 0, 0, 0]]])
  scores = np.array([0.2, 0.8, 0.4])
  first, second, third = (scores - scores.mean()) / scores.std(ddof=1)
  found = advantages.process_relative(rewards, ends, eps=0.0)
  np.testing.assert_allclose(found[0, 0], [first + second, first + second, second, second], rtol=1e-5)
  np.testing.assert_allclose(found[0, 1], [third, 0, 0, 0], atol=1e-6)
  alone = advantages.process_relative(rewards, ends, valid=jnp.array([[1, 0]]), eps=0.0)
  np.testing.assert_allclose(alone[0, 0, 3], np.sqrt(0.5), rtol=1e-5)
  np.testing.assert_array_equal(alone[0, 1], jnp.zeros(4))


@pytest.mark.parametrize('reduction, options, biased', [
    ('sequence_mean_token_mean', {}, True), ('fixed_length', {'max_length': 4}, False),
])
def test_dr_grpo_has_no_length_bias_where_grpo_has(reduction, options, biased):
  """By enumeration of all groups: responses are right or wrong, and stop after 1 to 4 tokens whatever they are.

  What wrong responses learn about stopping is -(1 - mu) mu (G - 1) / G grad E[1 / |o| given wrong] under 1 / |o|, and
  nothing under a constant (experiments.md, S5).
  """
  mu, group, longest = 0.3, 3, 4
  kinds = [(right, length) for right in (0.0, 1.0) for length in range(1, longest + 1)]
  groups = np.array(list(itertools.product(kinds, repeat=group)))  # [N, G, 2]
  right, lengths = groups[..., 0], groups[..., 1].astype(int)
  mask = (np.arange(longest) < lengths[..., None]).astype(np.float32)

  def token_logprobs(theta):
    """[N, G, T]: go on, go on, stop; at the longest there is no choice left."""
    last = np.arange(longest) == lengths[..., None] - 1
    stop, proceed = jax.nn.log_sigmoid(theta), jax.nn.log_sigmoid(-theta)
    return mask * jnp.where(last, jnp.where(lengths[..., None] == longest, 0.0, stop), proceed)

  def loss(theta):
    own = token_logprobs(theta)
    own = jnp.where(right[..., None] > 0, jax.lax.stop_gradient(own), own)

    def one(rewards, logprobs, mask):
      spread = advantages.centered(rewards[None])[0][:, None] * mask
      total, count = REDUCTIONS[reduction](SURROGATES['reinforce'](logprobs, logprobs, spread, mask), mask, **options)
      return total / count

    chance = jnp.exp(jax.lax.stop_gradient(own).sum((1, 2))) * np.prod(np.where(right > 0, mu, 1 - mu), axis=1)
    return jnp.sum(chance * jax.vmap(one)(jnp.asarray(right), own, jnp.asarray(mask)))

  def inverse_length(theta):
    stop = jax.nn.sigmoid(theta)
    return sum((1 - stop) ** (n - 1) * (stop if n < longest else 1) / n for n in range(1, longest + 1))

  gradient = jax.grad(inverse_length)(-1.0)
  assert gradient > 0.1
  drift = -(1 - mu) * mu * (group - 1) / group * gradient if biased else 0.0
  np.testing.assert_allclose(-jax.grad(loss)(-1.0), drift, atol=1e-6)
