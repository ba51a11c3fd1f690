import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.losses import kl_penalty
from srm_jax.losses.kl_penalty import KL_ESTIMATORS

POLICY = jnp.array([2.0, 1.0, 0.0, -1.0])
REFERENCE = jnp.array([1.0, 2.0, 0.5, -0.5])
REVERSE_GRADIENT = np.array([0.420199, -0.319183, -0.073849, -0.027167])
FORWARD_GRADIENT = np.array([0.424035, -0.360812, -0.046219, -0.017003])

# Expectation over a token of the policy, and expected gradient of the estimator as a loss on such tokens.
EXPECTED = {
    'k1': (0.4219152477, np.zeros(4)),
    'k2': (0.4839513466, REVERSE_GRADIENT),
    'k3': (0.4219152477, FORWARD_GRADIENT),
    'k3_straight_through': (0.4219152477, REVERSE_GRADIENT),
}


def expectation(name, logits):
  """Sum over the vocabulary of (probability, held constant) x estimate."""
  logprobs = jax.nn.log_softmax(logits)
  estimates = KL_ESTIMATORS[name](logprobs[:, None], jax.nn.log_softmax(REFERENCE)[:, None])
  return jnp.sum(jax.lax.stop_gradient(jnp.exp(logprobs)) * estimates[:, 0])


def test_every_estimator_is_enumerated():
  assert EXPECTED.keys() == KL_ESTIMATORS.keys()


@pytest.mark.parametrize('name', EXPECTED)
def test_expectation_and_expected_gradient_by_enumeration(name):
  value, gradient = jax.value_and_grad(lambda x: expectation(name, x))(POLICY)
  np.testing.assert_allclose(value, EXPECTED[name][0], atol=1e-6)
  np.testing.assert_allclose(gradient, EXPECTED[name][1], atol=1e-6)


def test_values_by_hand():
  logprobs, reference = jnp.array([[-1.0, -2.0]]), jnp.array([[-1.5, -1.0]])
  np.testing.assert_allclose(kl_penalty.k1(logprobs, reference), [[0.5, -1.0]], rtol=1e-6)
  np.testing.assert_allclose(kl_penalty.k2(logprobs, reference), [[0.125, 0.5]], rtol=1e-6)
  np.testing.assert_allclose(kl_penalty.k3(logprobs, reference), [[np.exp(-0.5) - 0.5, np.e - 2]], rtol=1e-6)


def test_k3_keeps_its_precision_near_zero():
  estimate = kl_penalty.k3(jnp.zeros((1, 1)), jnp.full((1, 1), 1e-2))
  np.testing.assert_allclose(estimate, np.expm1(1e-2) - 1e-2, rtol=1e-4)


@pytest.mark.parametrize('name', KL_ESTIMATORS)
def test_contract(name):
  logprobs, reference = jnp.array([[-1.0, -2.0]]), jnp.array([[-1.5, -1.0]])
  assert KL_ESTIMATORS[name](logprobs.astype(jnp.bfloat16), reference).dtype == jnp.float32
  np.testing.assert_array_equal(KL_ESTIMATORS[name](logprobs, logprobs), [[0.0, 0.0]])
  gradient = jax.grad(lambda x: KL_ESTIMATORS[name](logprobs, x).sum())(reference)
  np.testing.assert_array_equal(gradient, [[0.0, 0.0]])
  with pytest.raises(AssertionError):
    KL_ESTIMATORS[name](logprobs, reference[:, :1])
  with pytest.raises(AssertionError):
    KL_ESTIMATORS[name](logprobs[0], reference[0])
