"""Divergences between two distributions given by their log-probabilities: what `distillation` and `top_k` share.

Log-probabilities are float32 [..., V], finite, and normalised over V; a probability of 0 is a log-probability of about
ABSENT (`finite` sees to that), never -inf, whose differences are NaN. So 0 log 0 is 0, and a divergence that is
infinite is some 1e30 times the probability in question. V may be split over the mesh axis `axis_name`.

Weights and temperatures may be numbers or traced scalars, so that a schedule can change them from step to step. A
number is checked, and takes the formula of its end point; what is traced cannot be looked at: it is clipped, and takes
its end point by `where`.
"""

import jax
import jax.numpy as jnp

from srm_jax.losses import vocabulary

# Stands for log 0: its differences are finite, so what it multiplies with probability 0 is 0.
ABSENT = -1e30
# exp of a float32 overflows at 88.
_MAX_LOG_RATIO = 80.0


def finite(logits, temperature):
  """Logits at a temperature, float32, no lower than ABSENT: -inf is how a token is ruled out. [...] -> [...].

  Divided in float32: a bfloat16 quotient would move the distributions.
  """
  return jnp.maximum(logits.astype(jnp.float32) / temperature, ABSENT)


def kl(log_a, log_b, *, axis_name=None):
  """KL(a || b) = sum_v a_v log(a_v / b_v): [..., V] each -> [...]."""
  return vocabulary.vocab_sum(jnp.exp(log_a) * (log_a - log_b), axis_name=axis_name)


def total_variation(log_a, log_b, *, axis_name=None):
  """1/2 sum_v |a_v - b_v|: [..., V] each -> [...]."""
  return 0.5 * vocabulary.vocab_sum(jnp.abs(jnp.exp(log_a) - jnp.exp(log_b)), axis_name=axis_name)


def log_mixture(log_a, log_b, weight):
  """log(weight a + (1 - weight) b), [..., V]: it is probabilities that are mixed, not log-probabilities."""
  return jnp.logaddexp(log_a + jnp.log(weight), log_b + jnp.log1p(-weight))


def jensen_shannon(log_p, log_q, *, beta, axis_name=None):
  """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, with end points: [..., V] each -> [...].

  KL(p || q) at beta 0, KL(q || p) at 1, where the formula itself is 0.
  """
  value = concrete(beta)
  if value == 0:
    return kl(log_p, log_q, axis_name=axis_name)
  if value == 1:
    return kl(log_q, log_p, axis_name=axis_name)
  log_m = log_mixture(log_p, log_q, beta)
  inner = beta * kl(log_p, log_m, axis_name=axis_name) + (1 - beta) * kl(log_q, log_m, axis_name=axis_name)
  if value is not None:
    return inner
  upper = jnp.where(beta == 1, kl(log_q, log_p, axis_name=axis_name), inner)
  return jnp.where(beta == 0, kl(log_p, log_q, axis_name=axis_name), upper)


def scaled_jensen_shannon(log_p, log_q, *, beta, axis_name=None):
  """KL(p || m) / (1 - beta) + KL(q || m) / beta, m = beta p + (1 - beta) q: [..., V] each -> [...].

  Continuous on [0, 1]: KL(p || q) at 0, KL(q || p) at 1.
  """
  towards_q = _scaled_skew(log_p, log_q, 1 - beta, beta, axis_name)
  return towards_q + _scaled_skew(log_q, log_p, beta, 1 - beta, axis_name)


def _scaled_skew(log_a, log_b, weight, rest, axis_name):
  """KL(a || m) / weight, m = rest a + weight b, rest = 1 - weight: 0 at weight 0, KL(a || b) at 1.

  As sum_v a_v (x_v - log(1 + x_v)) / weight with m_v / a_v = 1 + x_v: the x_v sum to 0 under a, so the value is the
  KL's; but every summand is small and positive, while those of the KL are as large as the weight and cancel in the
  sum, which divided by a small weight is noise.
  """
  gap = log_b - log_a
  x = weight * jnp.expm1(jnp.minimum(gap, _MAX_LOG_RATIO))
  near = jnp.abs(x) < 0.5
  far = jnp.logaddexp(gap + jnp.log(weight), jnp.log(rest))
  logarithm = jnp.where(near, jnp.log1p(jnp.where(near, x, 0.0)), far)
  a = jnp.exp(log_a)
  first = jnp.where(gap > _MAX_LOG_RATIO, weight * (jnp.exp(log_b) - a), a * x)
  tiny = jnp.finfo(jnp.float32).tiny
  return vocabulary.vocab_sum(first - a * logarithm, axis_name=axis_name) / jnp.maximum(weight, tiny)


def concrete(value):
  """The number as a float, or None where it is traced."""
  return None if isinstance(value, jax.core.Tracer) else float(value)


def unit_interval(divergence, option, value):
  """The value: a number in [0, 1] as it is, or raises; clipped to [0, 1] where it is traced."""
  number = concrete(value)
  if number is None:
    return jnp.clip(value, 0.0, 1.0)  # A schedule that ends at 1 may round past it, into log(0 - rounding) = NaN.
  if not 0 <= number <= 1:
    raise ValueError(f'{option} {number} of {divergence} is outside [0, 1]')
  return value


def assert_positive_temperature(temperature):
  number = concrete(temperature)
  if number is not None and not number > 0:
    raise ValueError(f'temperature {number:g} of a divergence must be positive; 1 leaves the logits as they are')
