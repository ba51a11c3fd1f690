"""What a model says of tokens that are given: of rollouts, or of completions to prefer."""

import functools

from srm_jax import sharding
from srm_jax.losses import cross_entropy, lm_head
from srm_jax.models import heads
from srm_jax.recipes.context import forward


def token_scores(student_logits, teacher_logits, targets, *, temperature, axis_name):
  """Log-probability of the sampled token and entropy, at the sampling temperature."""
  del teacher_logits
  return {
      'logprobs': cross_entropy.token_logprobs(student_logits, targets, temperature=temperature, axis_name=axis_name),
      'entropy': cross_entropy.entropy(student_logits, temperature=temperature, axis_name=axis_name),
  }


def score(model, params, batch, *, temperature, chunk, value_head=None):
  """{'logprobs', 'entropy', and with a value head 'values'} of a batch: [B, T] each, [:, t] about target t."""
  hidden = forward(model, params, batch).hidden
  head = lm_head.Head(hidden, heads.unembedding(params))
  fn = functools.partial(token_scores, temperature=temperature)
  found = lm_head.per_token(fn, head, batch.targets, chunk=chunk, mesh=sharding.current_mesh())
  return found if value_head is None else {**found, 'values': heads.value(value_head, hidden)}
