"""On-policy RL with verifiable rewards: a row of four choices (advantage, surrogate, reduction, KL).

  loss = reduction( surrogate(log q(y_t), log q_sampler(y_t), A) + kl_coef k(log q(y_t), log q_ref(y_t)) )

log q is at the sampling temperature. Left out: a critic, several epochs over one set of rollouts, dynamic sampling.
Reference: Shao et al., DeepSeekMath (GRPO), arXiv:2402.03300; Liu et al., Dr. GRPO, arXiv:2503.20783.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from srm_jax import schema, sharding
from srm_jax.losses import cross_entropy, lm_head
from srm_jax.losses.advantages import ADVANTAGES
from srm_jax.losses.kl_penalty import KL_ESTIMATORS
from srm_jax.losses.policy_gradient import SURROGATES
from srm_jax.losses.reductions import DENOMINATORS, REDUCTIONS
from srm_jax.models import heads
from srm_jax.recipes import on_policy
from srm_jax.recipes.context import Context, DataConfig, forward, load_teacher
from srm_jax.types import Max, Mean, Objective, Recipe, Rollouts


@dataclasses.dataclass(frozen=True)
class ChoiceConfig:
  """A registry name and the options that go with it."""

  name: str
  options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class KLConfig:
  """Penalty to a reference policy inside the loss; coef 0 loads no reference. reference: workdir of the model."""

  coef: float
  estimator: str
  reference: str


@dataclasses.dataclass(frozen=True)
class PolicyGradientConfig:
  name: str
  data: DataConfig
  rollouts: on_policy.RolloutConfig
  advantage: ChoiceConfig
  surrogate: ChoiceConfig
  reduction: ChoiceConfig
  kl: KLConfig
  head_chunk: int | None


def _bind(kind, choice: ChoiceConfig, registry):
  return schema.bind(kind, choice.name, choice.options, registry)


def token_scores(student_logits, teacher_logits, targets, *, temperature, axis_name):
  """Log-probability of the sampled token and entropy, at the sampling temperature."""
  del teacher_logits
  return {
      'logprobs': cross_entropy.token_logprobs(student_logits, targets, temperature=temperature, axis_name=axis_name),
      'entropy': cross_entropy.entropy(student_logits, temperature=temperature, axis_name=axis_name),
  }


def _score(model, params, batch, temperature, chunk):
  head = lm_head.Head(forward(model, params, batch).hidden, heads.unembedding(params))
  fn = functools.partial(token_scores, temperature=temperature)
  return lm_head.per_token(fn, head, batch.targets, chunk=chunk, mesh=sharding.current_mesh())


def objective(config: PolicyGradientConfig, model, reference_model=None) -> Objective:
  """Surrogate (and KL) objective on Rollouts."""
  surrogate = _bind('surrogate', config.surrogate, SURROGATES)
  reduce = _bind('reduction', config.reduction, REDUCTIONS)
  count = _bind('reduction', config.reduction, DENOMINATORS)
  estimate = schema.choose('kl.estimator', config.kl.estimator, KL_ESTIMATORS)
  temperature = config.rollouts.temperature or 1.0

  def terms(params, rollouts: Rollouts, frozen, rng):
    del rng
    mask = rollouts.batch.loss_mask
    scores = _score(model, params['model'], rollouts.batch, temperature, config.head_chunk)
    values = surrogate(
        scores['logprobs'], rollouts.sampler_logprobs, rollouts.advantages, mask, old_logprobs=rollouts.old_logprobs
    )
    metrics = {**on_policy.metrics(rollouts), **_diagnostics(scores, rollouts)}
    if config.kl.coef:
      reference = jax.lax.stop_gradient(
          _score(reference_model, frozen['reference'], rollouts.batch, temperature, config.head_chunk)['logprobs']
      )
      # Masked before the exponential: where it overflows on a token that does not count, its gradient would be 0 * inf.
      penalty = estimate(*(jnp.where(mask > 0, logprobs, 0.0) for logprobs in (scores['logprobs'], reference)))
      values = values + config.kl.coef * penalty
      metrics['kl'] = Mean(jnp.sum(penalty), jnp.sum(mask))
    return {'policy': (1.0, reduce(values, mask).total)}, metrics

  return Objective(terms, lambda rollouts: {'policy': count(rollouts.batch.loss_mask)}, _resolved(config, temperature))


def _resolved(config, temperature):
  kl = f'{config.kl.coef:g} {config.kl.estimator} in the loss' if config.kl.coef else 'none'
  return {
      'advantage': f'{config.advantage.name} {dict(config.advantage.options)}',
      'surrogate': f'{config.surrogate.name} {dict(config.surrogate.options)}',
      'denominator': f'{config.reduction.name} {dict(config.reduction.options)} of the global batch',
      'kl': kl, 'temperature': temperature, 'mask': 'tokens that the student sampled',
  }


def _diagnostics(scores, rollouts: Rollouts):
  """Entropy, mismatch between sampler and trainer, and the share of groups that teach nothing."""
  mask = rollouts.batch.loss_mask
  tokens = jnp.sum(mask)
  gap = jnp.where(mask > 0, jnp.abs(scores['logprobs'] - rollouts.sampler_logprobs), 0.0)
  still = jnp.sum(jnp.all(rollouts.advantages == 0, axis=1).astype(jnp.float32))
  return {
      'entropy': Mean(jnp.sum(jnp.where(mask > 0, scores['entropy'], 0.0)), tokens),
      'sampler_gap': Mean(jnp.sum(gap), tokens), 'sampler_gap_max': Max(jnp.max(gap)),
      'zero_advantage': Mean(still, jnp.asarray(mask.shape[0], jnp.float32)),
  }


def build(section, context: Context) -> Recipe:
  """Opens config.recipe for policy-gradient RL."""
  config = schema.parse(PolicyGradientConfig, section, 'config.recipe')
  frozen, reference_config = {}, None
  if config.kl.coef:
    reference = load_teacher(config.kl.reference, context)
    frozen, reference_config = {'reference': (reference.config, reference.params)}, reference.config
  advantage = _bind('advantage', config.advantage, ADVANTAGES)
  return Recipe(
      objective(config, context.model, reference_config),
      on_policy.source(config.rollouts, config.data, context, advantage=advantage), frozen,
  )
