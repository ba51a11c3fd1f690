"""What a model says of tokens that are given: of rollouts, or of completions to prefer.

Completions of one prompt share its keys and values: where rows come in groups, the prompt runs through the model once a
group instead of once a row. What a row's tokens depend on stays the same, and so do all gradients, up to rounding.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp

from srm_jax import sharding
from srm_jax.losses import cross_entropy, lm_head
from srm_jax.models import heads
from srm_jax.models.config import TransformerConfig
from srm_jax.models.transformer import Transformer, variables
from srm_jax.recipes.context import forward


class Groups(NamedTuple):
  """Rows in runs of `size` with one prompt, which ends at slot `prompt_width` in all of them."""

  size: int
  prompt_width: int


ALONE = Groups(1, 0)
_TILE = 128  # long prompts are padded to a multiple, so that what follows begins where a TPU's registers do


def token_scores(student_logits, teacher_logits, targets, *, temperature, axis_name):
  """Log-probability of the sampled token and entropy, at the sampling temperature."""
  del teacher_logits
  return {
      'logprobs': cross_entropy.token_logprobs(student_logits, targets, temperature=temperature, axis_name=axis_name),
      'entropy': cross_entropy.entropy(student_logits, temperature=temperature, axis_name=axis_name),
  }


def score(model, params, batch, *, temperature, chunk, value_head=None, groups: Groups = ALONE):
  """{'logprobs', 'entropy', and with a value head 'values'} of a batch: [B, T] each, [:, t] about target t.

  groups: how rows share prompts; where they do, what stands at slots before the last of a prompt is 0.
  """
  together = _together(model, groups, len(batch.inputs))
  if together > 1:
    hidden, span = _branches(model, params, batch, together, groups.prompt_width - 1)
  else:
    hidden, span = forward(model, params, batch).hidden, slice(0, batch.inputs.shape[1])
  head = lm_head.Head(hidden, heads.unembedding(params))
  fn = functools.partial(token_scores, temperature=temperature)
  found = lm_head.per_token(fn, head, batch.targets[:, span], chunk=chunk, mesh=sharding.current_mesh(), split=True)
  if value_head is not None:
    found['values'] = heads.value(value_head, hidden)
  around = ((0, 0), (span.start, batch.inputs.shape[1] - span.stop))
  return {name: jnp.pad(x, around) for name, x in found.items()}


def _together(model: TransformerConfig, groups: Groups, rows: int) -> int:
  """Rows that share a prompt's pass. Under LongRoPE a prompt's angles depend on how long its completion becomes."""
  if groups.prompt_width < 2 or model.rope_scaling.kind == 'longrope':
    return 1
  return sharding.rows_together(groups.size, rows)


def _branches(model: TransformerConfig, params, batch, together: int, trunk: int):
  """(hidden states [B, n, D] of the last prompt token and what follows, their slots)."""
  span = slice(trunk, batch.inputs.shape[1] - 1)  # in the last slot is the last token of a full row, or padding
  before = -trunk % _TILE if trunk > _TILE else 0

  def joined(x):  # [B, T] -> [B / N, before + trunk + N n]
    rows = x.reshape(-1, together, x.shape[1])
    first = jnp.pad(rows[:, 0, :trunk], ((0, 0), (before, 0)))
    return jnp.concatenate([first, rows[:, :, span].reshape(len(rows), -1)], axis=1)

  hidden = Transformer(model).apply(
      variables(params), joined(batch.inputs), positions=joined(batch.positions),
      segment_ids=joined(batch.segment_ids), trunk=before + trunk, branches=together, logits_at=(),
  ).hidden
  rows = hidden[:, before + trunk :].reshape(len(batch.inputs), span.stop - span.start, -1)
  return sharding.constrain(rows, 'batch', 'time', 'features'), span
