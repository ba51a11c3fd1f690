"""Per-token log-probabilities, cross-entropy and entropy of logits.

Everything is float32 and unreduced. With `axis_name` the vocabulary is split over that axis of an enclosing `shard_map`
and only per-token scalars cross it.
"""

import chex
import jax.numpy as jnp

from srm_jax.losses import vocabulary


def token_logprobs(logits, targets, *, temperature=1.0, axis_name=None):
  """Log-probability of each target under the tempered softmax.

  log p(y) = z_y - log sum_v exp z_v, with z = logits / temperature.

  Args:
    logits: [..., V], local slice of the vocabulary where `axis_name` is given.
    targets: int [...], global ids. An id outside the vocabulary has target logit 0: mask such tokens.
    temperature: the one used for sampling; above 0.
    axis_name: mesh axis that splits the vocabulary, or None.

  Returns:
    float32 [...].

  Raises:
    ValueError: temperature is a number that is not above 0.
  """
  chex.assert_equal_shape_prefix([logits, targets], targets.ndim)
  scaled = _tempered(logits, temperature)
  return vocabulary.select(scaled, targets, axis_name=axis_name) - vocabulary.log_normalizer(
    scaled, axis_name=axis_name
  )


def cross_entropy(logits, targets, *, temperature=1.0, axis_name=None):
  """Negative log-likelihood of each target: -log p(y).

  Args:
    logits: [..., V].
    targets: int [...].
    temperature: divides the logits; above 0.
    axis_name: mesh axis that splits the vocabulary, or None.

  Returns:
    float32 [...], in nats.

  Raises:
    ValueError: temperature is a number that is not above 0.
  """
  return -token_logprobs(logits, targets, temperature=temperature, axis_name=axis_name)


def entropy(logits, *, temperature=1.0, axis_name=None):
  """Entropy of the tempered softmax: H = -sum_v p_v log p_v.

  A vocabulary entry at -inf (forbidden token) adds 0, in the value and in the gradient.

  Args:
    logits: [..., V].
    temperature: divides the logits; above 0.
    axis_name: mesh axis that splits the vocabulary, or None.

  Returns:
    float32 [...], in nats, between 0 and log V.

  Raises:
    ValueError: temperature is a number that is not above 0.
  """
  logprobs = vocabulary.log_softmax(_tempered(logits, temperature), axis_name=axis_name)
  finite = jnp.where(jnp.isneginf(logprobs), 0.0, logprobs)
  return -vocabulary.vocab_sum(jnp.exp(logprobs) * finite, axis_name=axis_name)


def _tempered(logits, temperature):
  if isinstance(temperature, (int, float)) and not temperature > 0:
    raise ValueError(f'temperature {temperature} does not define a softmax; give a number above 0 (greedy: score at 1)')
  return logits.astype(jnp.float32) / temperature
