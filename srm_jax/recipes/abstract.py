"""Recipes without their data: the objective and the shapes of a batch, which is all that a plan compiles."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from srm_jax import checkpoints, schema
from srm_jax.data import alignment
from srm_jax.models.config import TransformerConfig
from srm_jax.models.families import PRESETS
from srm_jax.recipes import (
    cached, context, cross_tokenizer, distill, on_policy, on_policy_distill, policy_gradient, preference, reward_model,
    sft, teachers,
)
from srm_jax.types import Batch, CachedBatch, Objective, Pairs, Rollouts


class Abstract(NamedTuple):
  """A recipe without its data: objective, {name: TransformerConfig} of frozen models, a batch of shapes, extra
  parameters.
  """

  objective: Objective
  frozen: Mapping[str, TransformerConfig]
  batch: Batch | CachedBatch | Rollouts | Pairs | reward_model.Compared | reward_model.Stepped
  extra_params: Callable | None = None


def _batch(rows: int, length: int) -> Batch:
  ints, mask = jax.ShapeDtypeStruct((rows, length), jnp.int32), jax.ShapeDtypeStruct((rows, length), jnp.float32)
  return Batch(ints, ints, mask, ints, ints)


def _rollouts(config: on_policy.RolloutConfig, *, advantages: bool) -> Rollouts:
  rows = config.prompts * config.samples
  tokens, numbers = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, config.length), (rows,)))
  group = jax.ShapeDtypeStruct((rows,), jnp.int32)
  return Rollouts(_batch(rows, config.length), tokens, tokens if advantages else None, numbers, numbers, group)


def _sft(section, model) -> Abstract:
  config = schema.parse(sft.SFTConfig, section, 'config.recipe')
  return Abstract(
      sft.objective(model, head_chunk=config.head_chunk), {}, _batch(config.batch.size, config.batch.length),
  )


def _shape_of(folder: str, student: TransformerConfig) -> TransformerConfig:
  """The config of a frozen model: a run's, or a published one, which computes as the student does. A preset's name
  stands for its shape.
  """
  known = PRESETS.get(folder)
  if known is None:
    known = checkpoints.model_config(folder)
    if not checkpoints.is_published(folder):
      return known
  return dataclasses.replace(known, dtype=student.dtype, param_dtype=student.dtype)


def _distill(section, model) -> Abstract:
  config = schema.parse(distill.DistillConfig, section, 'config.recipe')
  sources = tuple(context.parts_of(config.data))
  shapes = {name: _shape_of(folder, model) for name, folder in distill.resident_teachers(config).items()}
  given = (config.loss, model, teachers.Teachers(shapes, teachers.weights(config.teacher, sources)))
  there = cached.read_identity(config.cache) if config.cache else None
  cached.check(distill.open_terms(*given, sources=sources), there, model.vocab_size)
  batch = _batch(config.batch.size, config.batch.length)
  batch = batch._replace(sources=batch.segment_ids if sources else None)
  return Abstract(
      distill.objective(*given, sources=sources), shapes, _with_known(batch, there.k) if there else batch,
      distill.projectors(*given, sources=sources),
  )


def _with_known(batch: Batch, k: int) -> CachedBatch:
  ids, logprobs = (jax.ShapeDtypeStruct((*batch.inputs.shape, k), dtype) for dtype in (jnp.int32, jnp.float32))
  return CachedBatch(batch, {'ids': ids, 'logprobs': logprobs, 'tail': batch.loss_mask})


def _cross_tokenizer(section, model) -> Abstract:
  config = schema.parse(cross_tokenizer.CrossTokenizerConfig, section, 'config.recipe')
  teacher = _shape_of(config.teacher, model)
  rows, groups = (model.vocab_size, teacher.vocab_size), min(config.batch.length, config.teacher_length)
  ours, theirs = (_batch(config.batch.size, length) for length in (config.batch.length, config.teacher_length))
  mask = jax.ShapeDtypeStruct((config.batch.size, groups), jnp.bool_)
  batch = alignment.AlignedBatch(ours, theirs, ours.inputs, theirs.inputs, mask, mask)
  shared = (np.arange(min(rows), dtype=np.int32),) * 2  # as if the smaller vocabulary were part of the larger
  return Abstract(cross_tokenizer.objective(config.loss, model, teacher, rows, shared), {'teacher': teacher}, batch)


def _on_policy_distill(section, model) -> Abstract:
  config = schema.parse(on_policy_distill.OnPolicyDistillConfig, section, 'config.recipe')
  teacher = _shape_of(config.teacher, model)
  return Abstract(
      on_policy_distill.objective(config.loss, model, teacher), {'teacher': teacher},
      _rollouts(config.rollouts, advantages=False), distill.projectors(config.loss, model, teacher),
  )


def _policy_gradient(section, model) -> Abstract:
  config = schema.parse(policy_gradient.PolicyGradientConfig, section, 'config.recipe')
  reference = config.kl.coef and config.kl.reference != policy_gradient.AVERAGE
  frozen = {'reference': _shape_of(config.kl.reference, model)} if reference else {}
  rollouts = _rollouts(config.rollouts, advantages=True)
  if config.critic is not None:
    rollouts = rollouts._replace(values=rollouts.advantages, returns=rollouts.advantages)
  groups = policy_gradient.shared(config, config.rollouts.length - config.rollouts.max_new_tokens)
  part = lambda x: jax.ShapeDtypeStruct((x.shape[0] // config.updates.minibatches, *x.shape[1:]), x.dtype)
  return Abstract(
      policy_gradient.objective(config, model, frozen.get('reference'), groups=groups), frozen,
      jax.tree.map(part, rollouts), policy_gradient.critic_params(config, model),
  )


def _preference(section, model) -> Abstract:
  config = schema.parse(preference.PreferenceConfig, section, 'config.recipe')
  bound = preference.open_loss(config)
  frozen = {'reference': _shape_of(config.reference, model)} if bound.referenced else {}
  online = config.rollouts is not None
  rows = 2 * config.rollouts.prompts if online else config.batch.size
  batch = _batch(rows, (config.rollouts or config.batch).length)
  numbers = jax.ShapeDtypeStruct((rows,), jnp.float32)
  extra = (numbers, numbers) if online else ()
  pairs = Pairs(batch, numbers, batch if bound.unpaired else None, *extra)
  return Abstract(preference.objective(config, model, frozen.get('reference')), frozen, pairs)


def _reward_model(section, model) -> Abstract:
  config = schema.parse(reward_model.RewardModelConfig, section, 'config.recipe')
  rows = _batch(config.batch.size, config.batch.length)
  pairs = config.target == 'outcome'
  batch = reward_model.Compared(rows, rows) if pairs else reward_model.Stepped(rows, rows.loss_mask)
  objective = schema.choose('target', config.target, reward_model.TARGETS).objective
  return Abstract(objective(config, model), {}, batch, reward_model.extra_params(model))


RECIPES: dict[str, Callable[[Any, TransformerConfig], Abstract]] = {
    'sft': _sft, 'distill': _distill, 'cross_tokenizer': _cross_tokenizer, 'on_policy_distill': _on_policy_distill,
    'policy_gradient': _policy_gradient, 'preference': _preference, 'reward_model': _reward_model,
}
