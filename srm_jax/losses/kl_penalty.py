"""Estimators of KL(policy || reference) from the log-probabilities of sampled tokens.

With d = log pi_ref - log pi at a token sampled from pi:

  name   value            as a value                          as a loss: expected gradient
  k1     -d               unbiased, high variance, any sign   0: do not put it into a loss
  k2     d^2 / 2          biased, low variance, >= 0          gradient of KL(pi || ref)
  k3     exp(d) - 1 - d   unbiased, low variance, >= 0        gradient of KL(ref || pi)
  k3_straight_through      that of k3                         that of k2

So an estimator is chosen by where the penalty sits: k1 in the reward, k2 in the loss for the gradient of the KL itself;
GRPO puts k3 into the loss. The reference receives no gradient.

Reference: Schulman, Approximating KL Divergence, 2020, joschu.net/blog/kl-approx.html.
"""

import chex
import jax
import jax.numpy as jnp


def k1(logprobs, reference_logprobs):
  """The log-ratio itself.

  log pi - log pi_ref

  Args:
    logprobs: [B, T] policy log-probabilities of the sampled tokens.
    reference_logprobs: [B, T] of the reference policy.

  Returns:
    [B, T] estimates, float32.

  Raises:
    AssertionError: if the shapes are not equal [B, T].

  Reference: Schulman, Approximating KL Divergence, 2020.
  """
  return -_log_ratio(logprobs, reference_logprobs)


def k2(logprobs, reference_logprobs):
  """Half the squared log-ratio.

  (log pi_ref - log pi)^2 / 2

  Args:
    logprobs: [B, T] policy log-probabilities of the sampled tokens.
    reference_logprobs: [B, T] of the reference policy.

  Returns:
    [B, T] estimates, float32.

  Raises:
    AssertionError: if the shapes are not equal [B, T].

  Reference: Schulman, Approximating KL Divergence, 2020.
  """
  return 0.5 * jnp.square(_log_ratio(logprobs, reference_logprobs))


def k3(logprobs, reference_logprobs):
  """The log-ratio with the control variate r - 1, r = pi_ref / pi.

  r - 1 - log r

  Args:
    logprobs: [B, T] policy log-probabilities of the sampled tokens.
    reference_logprobs: [B, T] of the reference policy.

  Returns:
    [B, T] estimates, float32.

  Raises:
    AssertionError: if the shapes are not equal [B, T].

  Reference: Schulman, Approximating KL Divergence, 2020; in a loss: Shao et al., DeepSeekMath, arXiv 2402.03300.
  """
  log_ratio = _log_ratio(logprobs, reference_logprobs)
  # expm1: near log r = 0 the estimate is a difference of almost equal numbers.
  return jnp.expm1(log_ratio) - log_ratio


def k3_straight_through(logprobs, reference_logprobs):
  """The value of k3 with the gradient of k2: reported without bias, and descended as the KL itself.

  k2 + sg(k3 - k2)

  Args:
    logprobs: [B, T] policy log-probabilities of the sampled tokens.
    reference_logprobs: [B, T] of the reference policy.

  Returns:
    [B, T] estimates, float32.

  Raises:
    AssertionError: if the shapes are not equal [B, T].

  Reference: Zhang et al., On the Design of KL-Regularized Policy Gradient Algorithms, arXiv 2505.17508.
  """
  through = k2(logprobs, reference_logprobs)
  return through + jax.lax.stop_gradient(k3(logprobs, reference_logprobs) - through)


def _log_ratio(logprobs, reference_logprobs):
  """log(pi_ref / pi), float32 [B, T]."""
  chex.assert_rank([logprobs, reference_logprobs], 2)
  chex.assert_equal_shape([logprobs, reference_logprobs])
  return jax.lax.stop_gradient(reference_logprobs).astype(jnp.float32) - logprobs.astype(jnp.float32)


KL_ESTIMATORS = {'k1': k1, 'k2': k2, 'k3': k3, 'k3_straight_through': k3_straight_through}
