"""Cross-entropy, log-probabilities and entropy against hand values, and over a split vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from srm_jax.losses import cross_entropy

LOGITS = np.array([2.0, 1.0, 0.0, -1.0], np.float32)
PROBABILITIES = np.array([0.643914, 0.236883, 0.087144, 0.032059])  # softmax(LOGITS)


def test_token_logprobs_are_the_log_of_the_softmax():
  logits = np.tile(LOGITS, (2, 2, 1))
  targets = np.array([[0, 1], [2, 3]])
  logprobs = cross_entropy.token_logprobs(logits, targets)
  np.testing.assert_allclose(np.exp(logprobs), PROBABILITIES.reshape(2, 2), atol=1e-6)
  np.testing.assert_array_equal(cross_entropy.cross_entropy(logits, targets), -logprobs)


def test_temperature_divides_the_logits():
  targets = np.array([1])
  warm = cross_entropy.token_logprobs(LOGITS[None], targets, temperature=2.0)
  np.testing.assert_allclose(warm, cross_entropy.token_logprobs(LOGITS[None] / 2, targets), rtol=1e-6)
  assert abs(warm[0] - np.log(PROBABILITIES[1])) > 0.05


@pytest.mark.parametrize('temperature', [0.0, -1.0, 0])
def test_temperature_must_be_above_zero(temperature):
  with pytest.raises(ValueError, match='temperature'):
    cross_entropy.token_logprobs(LOGITS[None], np.array([1]), temperature=temperature)
  with pytest.raises(ValueError, match='temperature'):
    cross_entropy.entropy(LOGITS, temperature=temperature)


def test_gradient_is_probability_minus_one_hot():
  gradient = jax.grad(lambda x: cross_entropy.cross_entropy(x, jnp.array(2)))(LOGITS)
  np.testing.assert_allclose(gradient, PROBABILITIES - np.eye(4)[2], atol=1e-6)


def test_entropy_values():
  expected = -np.sum(PROBABILITIES * np.log(PROBABILITIES))
  np.testing.assert_allclose(cross_entropy.entropy(LOGITS), expected, atol=1e-5)
  np.testing.assert_allclose(cross_entropy.entropy(np.zeros((3, 7))), np.log(7), rtol=1e-6)
  np.testing.assert_allclose(cross_entropy.entropy(LOGITS, temperature=1e6), np.log(4), rtol=1e-5)


def test_forbidden_tokens_add_nothing_to_the_entropy():
  forbidden = np.append(LOGITS, -np.inf)
  value, gradient = jax.value_and_grad(cross_entropy.entropy)(forbidden)
  value_without, gradient_without = jax.value_and_grad(cross_entropy.entropy)(LOGITS)
  np.testing.assert_allclose(value, value_without, rtol=1e-6)
  np.testing.assert_allclose(gradient, np.append(gradient_without, 0.0), atol=1e-6)


def test_large_and_low_precision_logits():
  targets = np.array([0])
  shifted = cross_entropy.cross_entropy(LOGITS[None] + 1e4, targets)
  np.testing.assert_allclose(shifted, -np.log(PROBABILITIES[:1]), atol=1e-3)
  half = cross_entropy.cross_entropy(jnp.asarray(LOGITS[None], jnp.bfloat16), targets)
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, -np.log(PROBABILITIES[:1]), atol=1e-6)  # These logits are exact in bfloat16.


def test_shapes_must_agree():
  with pytest.raises(AssertionError):
    cross_entropy.cross_entropy(np.zeros((2, 3, 5)), np.zeros((2, 4), int))


def test_split_vocabulary_equals_whole():
  logits = jax.random.normal(jax.random.key(0), (3, 16))
  targets = jnp.array([0, 9, 15])

  def loss(x, axis_name):
    nll = cross_entropy.cross_entropy(x, targets, temperature=0.7, axis_name=axis_name)
    return jnp.sum(nll * nll + cross_entropy.entropy(x, axis_name=axis_name))

  mesh = jax.make_mesh((4,), ('tensor',), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
  columns = PartitionSpec(None, 'tensor')
  split = jax.shard_map(
    lambda x: jax.value_and_grad(loss)(x, 'tensor'), mesh=mesh, in_specs=columns, out_specs=(PartitionSpec(), columns)
  )
  value, gradient = jax.jit(split)(logits)
  expected, expected_gradient = jax.value_and_grad(loss)(logits, None)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)
