"""Supervised fine-tuning, and sequence-level distillation when the data are a teacher's annotations.

  loss = - (1 / N) sum over completion tokens of log q(y_t | x, y_<t),  N = completion tokens of the global batch

Left out: label smoothing, auxiliary z-loss, loss on prompts.
Reference: Kim and Rush, Sequence-Level Knowledge Distillation, arXiv:1606.07947.
"""

import dataclasses

import jax.numpy as jnp

from srm_jax import schema, sharding
from srm_jax.losses import cross_entropy, lm_head, vocabulary
from srm_jax.models import heads
from srm_jax.recipes.context import BatchConfig, Context, DataConfig, dataset, forward
from srm_jax.types import Batch, Mean, Objective, Recipe


@dataclasses.dataclass(frozen=True)
class SFTConfig:
  """head_chunk: tokens per step of the lm head; 0 forms all logits at once, None follows the memory budget."""

  name: str
  data: DataConfig
  batch: BatchConfig
  head_chunk: int | None


def count_tokens(batch: Batch):
  """Supervised tokens of a batch."""
  return jnp.sum(batch.loss_mask)


def token_loss(student_logits, teacher_logits, targets, *, axis_name):
  """Cross-entropy, with accuracy of the greedy token beside it."""
  del teacher_logits
  logprobs = cross_entropy.token_logprobs(student_logits, targets, axis_name=axis_name)
  chosen = vocabulary.select(student_logits, targets, axis_name=axis_name)
  greedy = chosen >= vocabulary.vocab_max(student_logits, axis_name=axis_name)
  return -logprobs, {'token_accuracy': greedy.astype(jnp.float32)}


def objective(model, *, head_chunk: int | None) -> Objective:
  """Cross-entropy on the supervised targets of a packed batch."""

  def terms(params, batch, frozen, rng):
    del frozen, rng
    head = lm_head.Head(forward(model, params['model'], batch).hidden, heads.unembedding(params['model']))
    total, aux = lm_head.reduced(
        token_loss, head, batch.targets, batch.loss_mask, chunk=head_chunk, mesh=sharding.current_mesh(),
        split=True,
    )
    count = count_tokens(batch)
    return {'cross_entropy': (1.0, total)}, {name: Mean(value, count) for name, value in aux.items()}

  resolved = {
      'loss': 'cross-entropy on targets', 'denominator': 'supervised tokens of the global batch',
      'mask': 'completion and end-of-text',
  }
  return Objective(terms, lambda batch: {'cross_entropy': count_tokens(batch)}, resolved)


def build(section, context: Context) -> Recipe:
  """Opens config.recipe for SFT."""
  config = schema.parse(SFTConfig, section, 'config.recipe')
  return Recipe(
      objective(context.model, head_chunk=config.head_chunk), dataset(config.data, config.batch, context), {}
  )
