"""The formulas are tested through `distillation`; here is what they promise beyond: impossible tokens, checks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.losses import divergences

# Half of the mass of p is where q has none, and the other way round.
LOG_P = jnp.array([jnp.log(0.5), jnp.log(0.5), -1e30])
LOG_Q = jnp.array([-1e30, jnp.log(0.25), jnp.log(0.75)])


def test_kl_and_total_variation_by_hand():
  log_a, log_b = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
  np.testing.assert_allclose(divergences.kl(log_a, log_b), 0.5 * np.log(2) + 0.5 * np.log(2 / 3), rtol=1e-6)
  np.testing.assert_allclose(divergences.total_variation(log_a, log_b), 0.25, rtol=1e-6)
  np.testing.assert_allclose(jnp.exp(divergences.log_mixture(log_a, log_b, 0.2)), [0.3, 0.7], rtol=1e-6)


def test_a_token_that_one_side_rules_out_costs_what_it_should():
  p, q = np.array([0.5, 0.5, 0]), np.array([0, 0.25, 0.75])
  m = 0.3 * p + 0.7 * q
  expected = 0.3 * np.sum(p[:2] * np.log(p[:2] / m[:2])) + 0.7 * np.sum(q[1:] * np.log(q[1:] / m[1:]))
  np.testing.assert_allclose(divergences.jensen_shannon(LOG_P, LOG_Q, beta=0.3), expected, rtol=1e-6)
  scaled = divergences.scaled_jensen_shannon(LOG_P, LOG_Q, beta=0.3)
  np.testing.assert_allclose(scaled, expected / 0.21, rtol=1e-6)
  np.testing.assert_allclose(divergences.total_variation(LOG_P, LOG_Q), 0.75, rtol=1e-6)
  np.testing.assert_allclose(divergences.kl(LOG_P, LOG_P), 0.0, atol=1e-7)


@pytest.mark.parametrize('beta', [0.0, 1e-6, 0.5, 1.0])
@pytest.mark.parametrize('name', ['jensen_shannon', 'scaled_jensen_shannon'])
def test_scheduled_weights_have_finite_gradients_at_impossible_tokens_and_end_points(name, beta):
  loss = getattr(divergences, name)
  gradient = jax.jit(jax.grad(lambda log_q, beta: loss(LOG_P, log_q, beta=beta)))(LOG_Q, beta)
  assert np.all(np.isfinite(gradient))


def test_concrete_sees_numbers_and_arrays_but_not_what_is_traced():
  assert divergences.concrete(2) == divergences.concrete(jnp.float32(2)) == divergences.concrete(np.float64(2)) == 2.0
  seen, array = [], jnp.float32(3)
  jax.jit(lambda x: seen.extend([divergences.concrete(x), divergences.concrete(array)]))(1.0)
  assert seen == [None, 3.0]


def test_checks_name_the_value_and_clip_what_is_traced():
  assert divergences.unit_interval('skew_kl', 'alpha', 1) == 1
  for value in (-0.1, 1.1, jnp.float32(2), float('nan')):
    with pytest.raises(ValueError, match='alpha .* of skew_kl is outside'):
      divergences.unit_interval('skew_kl', 'alpha', value)
  clipped = jax.jit(lambda x: divergences.unit_interval('skew_kl', 'alpha', x))
  assert clipped(7.0) == 1 and clipped(-7.0) == 0 and clipped(0.3) == jnp.float32(0.3)
  for value in (0, -1.0, float('nan')):
    with pytest.raises(ValueError, match='must be positive'):
      divergences.assert_positive_temperature(value)
  jax.jit(lambda x: divergences.assert_positive_temperature(x))(-7.0)
