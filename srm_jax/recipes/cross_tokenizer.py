"""Distillation from a teacher with another tokenizer, on a data set.

  loss = w_ce CE + (w_c / G) sum_g C(log q(g), log p(g)) + (w_s / E) sum_exact D(p, q) + (w_u / U) sum_rest ULD(p, q)

A group g is the shortest run of text that both models cut out of a completion: some tokens of the student, some of the
teacher, of the same bytes. G groups, of which E are one and the same token on either side and U = G - E are not; all
counts are of the global batch. C compares the probabilities of whole groups, D the parts of the vocabularies that
agree, ULD sorted probabilities. Each side is asked in its own format and with its own end-of-text.
Left out: samples of the student, a pretraining loss, learned maps between vocabularies.
Reference: Boizard et al., Universal Logit Distillation, arXiv:2402.12030; Minixhofer et al., Approximate Likelihood
Matching, arXiv:2503.20083; Patiño et al., GOLD, 2025.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from srm_jax import checkpoints, schema, sharding
from srm_jax.data import alignment, pipeline, records
from srm_jax.losses import cross_entropy, cross_tokenizer, lm_head, token_groups
from srm_jax.losses.distillation import DIVERGENCES
from srm_jax.models import heads
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes.context import BatchConfig, Context, DataConfig, examples_of, forward
from srm_jax.types import Mean, Objective, Recipe, Source


@dataclasses.dataclass(frozen=True)
class CrossLossConfig:
  """Weights of the four terms; what has weight 0 is left out.

  chunk_loss, chunk_options: from token_groups.CHUNK_LOSSES. divergence: from DIVERGENCES, for groups that are one token
  on either side. temperature: of divergence and ULD. head_chunk: tokens per step of the lm head.
  """

  cross_entropy: float
  chunk: float
  chunk_loss: str
  chunk_options: Mapping[str, Any]
  shared: float
  uld: float
  divergence: str
  temperature: float
  head_chunk: int | None


@dataclasses.dataclass(frozen=True)
class CrossTokenizerConfig:
  """teacher_length: positions of the teacher's rows, which hold the same texts as the student's."""

  name: str
  teacher: str
  data: DataConfig
  batch: BatchConfig
  teacher_length: int
  loss: CrossLossConfig


def objective(
    loss: CrossLossConfig, student: TransformerConfig, teacher: TransformerConfig, rows: tuple[int, int], shared,
) -> Objective:
  """The four terms on an AlignedBatch.

  Args:
    student, teacher: configs.
    rows: how many ids the two tokenizers have; what lies beyond is padding.
    shared: (student_ids, teacher_ids) of equal bytes, `data.alignment.shared_ids`.
  """
  chunk = _chunk_loss(loss)
  divergence = schema.choose('divergence', loss.divergence, DIVERGENCES)
  compare = functools.partial(
      cross_tokenizer.hybrid, student_ids=shared[0], teacher_ids=shared[1], divergence=divergence,
      temperature=loss.temperature,
  )
  if not loss.temperature > 0:
    raise schema.ConfigError(f'loss.temperature={loss.temperature:g} must be positive')
  weights = {name: getattr(loss, name) for name in ('cross_entropy', 'chunk', 'shared', 'uld')}
  if not any(weights.values()):
    raise schema.ConfigError(f'loss: the weights {weights} are all 0; nothing would be learnt')
  per_token = functools.partial(lm_head.per_token, chunk=loss.head_chunk)

  def terms(params, batch: alignment.AlignedBatch, frozen, rng):
    del rng
    sides = _sides(student, teacher, params, frozen, batch, rows)
    groups = batch.valid.shape[1]
    logprobs = [per_token(_logprobs, head, of.targets, mesh=sharding.current_mesh())['logprobs'] for head, of in sides]
    q, p = (
        token_groups.chunk_logprobs(values, of, num_groups=groups)
        for values, of in zip(logprobs, (batch.student_groups, batch.teacher_groups))
    )
    totals = {'cross_entropy': _total(-logprobs[0], batch.batch.loss_mask)}
    totals['chunk'] = _total(chunk(q.whole, p.whole), batch.valid)
    if loss.shared or loss.uld:
      found = _compare(compare, per_token, sides, batch, q, p)
      totals |= {'shared': jnp.sum(found['shared']), 'uld': jnp.sum(found['uld'])}
    counts = denominators(batch)
    metrics = {name: Mean(total, counts.get(name, _counts(batch)[name])) for name, total in totals.items()}
    metrics['exact_groups'] = Mean(_counts(batch)['shared'], _counts(batch)['chunk'])
    return {name: (weights[name], totals[name]) for name in counts}, metrics

  def denominators(batch):
    return {name: count for name, count in _counts(batch).items() if weights[name]}

  return Objective(terms, denominators, _resolved(loss, weights))


def _chunk_loss(loss: CrossLossConfig):
  """Traced on one number, so that an impossible option is found when a config is opened."""
  chunk = schema.bind('chunk_loss', loss.chunk_loss, loss.chunk_options, token_groups.CHUNK_LOSSES)
  try:
    jax.eval_shape(chunk, *2 * [jax.ShapeDtypeStruct((1, 1), jnp.float32)])
  except (TypeError, ValueError) as error:
    raise schema.ConfigError(f'loss.chunk_options: {error}') from error
  return chunk


def _counts(batch: alignment.AlignedBatch):
  exact = jnp.sum(batch.valid & batch.exact).astype(jnp.float32)
  valid = jnp.sum(batch.valid).astype(jnp.float32)
  return {'cross_entropy': jnp.sum(batch.batch.loss_mask), 'chunk': valid, 'shared': exact, 'uld': valid - exact}


def _total(values, mask):
  return jnp.sum(jnp.where(mask > 0, values, 0.0))


def _logprobs(logits, teacher_logits, targets, *, axis_name):
  del teacher_logits
  return {'logprobs': cross_entropy.token_logprobs(logits, targets, axis_name=axis_name)}


def _sides(student, teacher, params, frozen, batch, rows):
  """((Head, Batch) of the student, of the teacher); no gradient flows to the latter."""
  ours = forward(student, params['model'], batch.batch).hidden
  theirs = jax.lax.stop_gradient(forward(teacher, frozen['teacher'], batch.teacher).hidden)
  return (
      (lm_head.Head(ours, heads.unembedding(params['model'], rows[0])), batch.batch),
      (lm_head.Head(theirs, jax.lax.stop_gradient(heads.unembedding(frozen['teacher'], rows[1]))), batch.teacher),
  )


def _compare(compare, per_token, sides, batch, q, p):
  """{'shared', 'uld'} of every group: distributions where its first token is predicted."""
  (ours, _), (theirs, _) = sides
  groups = batch.valid.shape[1]
  at_first = lambda head, of: head._replace(
      hidden=token_groups.at_first_positions(head.hidden, of, num_groups=groups)
  )
  targets = cross_tokenizer.GroupTargets(batch.valid, batch.exact, q.later, p.later)
  found = per_token(
      compare, at_first(ours, batch.student_groups), jax.lax.stop_gradient(targets),
      teacher=at_first(theirs, batch.teacher_groups), mesh=sharding.current_mesh(),
  )
  return {'shared': found['shared'], 'uld': cross_tokenizer.with_later(found['uld'], found['slope'], q.later)}


def _resolved(loss: CrossLossConfig, weights):
  said = {
      'cross_entropy': 'cross-entropy', 'chunk': f'{loss.chunk_loss} of groups {dict(loss.chunk_options)}',
      'shared': f'{loss.divergence}(T={loss.temperature:g}) of shared ids', 'uld': f'ULD(T={loss.temperature:g})',
  }
  return {
      'loss': ' + '.join(f'{weight:g} {said[name]}' for name, weight in weights.items() if weight),
      'denominator': 'supervised tokens, groups, exact groups, other groups of the global batch',
      'mask': 'completion and end-of-text',
  }


def _source(config: CrossTokenizerConfig, context: Context, tokenizer) -> tuple[Source, dict[str, float]]:
  """The aligned data set, and how much of it is aligned."""
  ours, theirs = (examples_of(config.data, one) for one in (context.tokenizer, tokenizer))
  aligned = [alignment.align_examples(a, b, context.tokenizer, tokenizer) for a, b in zip(ours, theirs, strict=True)]
  lengths = dict(student_length=config.batch.length, teacher_length=config.teacher_length)
  plan = alignment.planner(aligned, **lengths)
  schedule = pipeline.Schedule(
      ours, batch_size=config.batch.size, length=config.batch.length, seed=context.seed, plan=plan
  )
  schedule.data_hash = records.content_hash([schedule.data_hash, [example.tokens for example in theirs]])

  def assemble(rows):
    alignment.require_groups(aligned, rows)
    return alignment.lay_out(aligned, rows, **lengths)

  source = pipeline.scheduled_source(
      schedule, assemble=assemble, process_index=jax.process_index(), process_count=jax.process_count()
  )
  return source, alignment.coverage(aligned)


def build(section, context: Context) -> Recipe:
  """Opens config.recipe for distillation across tokenizers."""
  config = schema.parse(CrossTokenizerConfig, section, 'config.recipe')
  teacher = checkpoints.load_model(config.teacher, dtype=context.model.dtype)
  source, coverage = _source(config, context, teacher.tokenizer)
  rows = (context.tokenizer.vocab_size, teacher.tokenizer.vocab_size)
  shared = alignment.shared_ids(context.tokenizer, teacher.tokenizer)
  made = objective(config.loss, context.model, teacher.config, rows, shared)
  aligned = ', '.join(f'{name} {value:.3g}' for name, value in coverage.items())
  return Recipe(
      made._replace(resolved={**made.resolved, 'aligned': f'{aligned}; {len(shared[0])} shared ids'}), source,
      {'teacher': (teacher.config, teacher.params)},
  )
