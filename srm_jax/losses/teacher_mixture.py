"""Several teachers as one: a mixture of their next-token distributions, with weights that may differ by token."""

import jax
import jax.numpy as jnp

from srm_jax.losses import vocabulary


def mixture_logprobs(logits, weights, *, axis_name=None):
  """Log-probabilities of a mixture of teachers.

    log p(v) = log sum_k w_k p_k(v) - log sum_k w_k,   p_k = softmax(logits_k)

  A weight of 0 leaves a teacher out, whatever its logits hold: weights of 0 and 1 route every token to its teacher.
  Gradients flow to the logits.

  Args:
    logits: tuple of K arrays [..., V].
    weights: [..., K], non-negative, one of them positive.
    axis_name: mesh axis that splits V, or None.

  Returns:
    float32 [..., V]; as logits they are the mixture's, since log_softmax leaves them as they are.

  Raises:
    ValueError: not one weight for each teacher.

  Reference: You et al., Learning from Multiple Teacher Networks, KDD 2017; Liu et al., FuseLLM, arXiv:2401.10491.
  """
  if weights.shape[-1] != len(logits):
    raise ValueError(f'{weights.shape[-1]} weights for {len(logits)} teachers; give one each')
  parts = []
  for k, one in enumerate(logits):
    there = weights[..., k : k + 1] > 0
    share = jnp.where(there, weights[..., k : k + 1], 1.0)
    one = vocabulary.log_softmax(jnp.where(there, one, 0.0), axis_name=axis_name)
    parts.append(jnp.where(there, jnp.log(share) + one, -jnp.inf))
  total = jnp.sum(weights, axis=-1, keepdims=True)
  return jax.nn.logsumexp(jnp.stack(parts), axis=0) - jnp.log(total)
