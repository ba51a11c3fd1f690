"""Hand values, TRL's formula, gradients, and aggregates of every mask by enumeration."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.losses import reward_model

RNG = np.random.default_rng(0)


def sigmoid(x):
  return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def test_bradley_terry_by_hand():
  losses = reward_model.bradley_terry(jnp.array([0.0, 2.0, -3.0]), jnp.array([0.0, 1.0, 1.0]))
  np.testing.assert_allclose(losses, [math.log(2), math.log1p(math.exp(-1)), math.log1p(math.exp(4))], rtol=1e-6)
  assert losses.dtype == jnp.float32
  far = reward_model.bradley_terry(jnp.array([-500.0, 500.0]), jnp.array([500.0, -500.0]))
  np.testing.assert_allclose(far, [1000.0, 0.0])


def test_bradley_terry_is_the_loss_of_trl():
  """RewardTrainer.compute_loss: -logsigmoid(r+ - r-).mean() + coefficient * mean((r+ + r-)^2)."""
  chosen, rejected = RNG.normal(size=(2, 7)).astype(np.float32)
  expected = -np.log(sigmoid(chosen - rejected)).mean() + 0.01 * np.mean((chosen + rejected) ** 2)
  found = jnp.mean(reward_model.bradley_terry(jnp.array(chosen), jnp.array(rejected), centering=0.01))
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_bradley_terry_pulls_apart_by_what_it_did_not_expect():
  grads = jax.grad(lambda a, b: reward_model.bradley_terry(a, b)[0], (0, 1))(jnp.array([1.0]), jnp.array([-0.5]))
  np.testing.assert_allclose(np.concatenate(grads), [-sigmoid(-1.5), sigmoid(-1.5)], rtol=1e-6)


def test_process_bce_by_hand():
  scores, mask = jnp.array([[0.0, 2.0, -1.0, jnp.inf]]), jnp.array([[1.0, 1.0, 1.0, 0.0]])
  labels = jnp.array([[1.0, 0.0, 0.25, jnp.nan]])
  right, wrong = math.log(sigmoid(-1)), math.log(sigmoid(1))
  expected = [[math.log(2), math.log1p(math.exp(2)), -0.25 * right - 0.75 * wrong, 0.0]]
  np.testing.assert_allclose(reward_model.process_bce(scores, labels, mask), expected, rtol=1e-6)


def test_process_bce_moves_a_step_by_its_error_and_masked_ones_not_at_all():
  scores, labels = jnp.array([[0.3, -2.0, jnp.inf]]), jnp.array([[0.25, 1.0, 0.0]])
  mask = jnp.array([[1.0, 1.0, 0.0]])
  grad = jax.grad(lambda s: jnp.sum(reward_model.process_bce(s, labels, mask)))(scores)
  np.testing.assert_allclose(grad, [[sigmoid(0.3) - 0.25, sigmoid(-2.0) - 1, 0.0]], rtol=1e-5)


EXPECTED = {'min': np.min, 'last': lambda probs: probs[-1], 'mean': np.mean, 'product': np.prod}


@pytest.mark.parametrize('name', reward_model.AGGREGATIONS)
def test_aggregates_of_every_mask(name):
  masks = np.array(list(itertools.product([0.0, 1.0], repeat=4)), np.float32)
  scores = RNG.normal(scale=3, size=masks.shape).astype(np.float32)
  found = np.asarray(reward_model.aggregate(name, np.where(masks, scores, np.nan), masks))
  for row, mask, value in zip(scores, masks, found, strict=True):
    probs = sigmoid(row)[mask > 0]
    expected = math.log(EXPECTED[name](probs)) if len(probs) else -math.inf
    assert value == pytest.approx(expected, rel=1e-5)


def test_every_aggregation_is_expected():
  assert EXPECTED.keys() == reward_model.AGGREGATIONS.keys()


@pytest.mark.parametrize('name', reward_model.AGGREGATIONS)
def test_one_step_is_its_own_aggregate_however_sure(name):
  scores, mask = jnp.array([[30.0, 0.0], [25.0, 0.0], [-40.0, 0.0]]), jnp.array([[1.0, 0.0]] * 3)
  found = reward_model.aggregate(name, scores, mask)
  np.testing.assert_allclose(found, jax.nn.log_sigmoid(scores[:, 0]), rtol=1e-6)
  assert found[0] > found[1] > found[2]  # as probabilities the first two would both be 1


@pytest.mark.parametrize('name', reward_model.AGGREGATIONS)
def test_gradients_of_aggregates_are_finite_and_of_steps_alone(name):
  mask = jnp.array([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
  total = lambda s: jnp.sum(jnp.where(jnp.any(mask > 0, axis=1), reward_model.aggregate(name, s, mask), 0.0))
  grad = jax.grad(total)(jnp.array([[1.0, jnp.inf, -1.0], [0.0, 1.0, 2.0]]))
  assert jnp.all(jnp.isfinite(grad)) and not jnp.any(grad[1]) and grad[0, 1] == 0 and grad[0, 2] > 0
