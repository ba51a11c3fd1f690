"""On-policy RL: four choices (advantage, surrogate, reduction, KL), and what goes with them.

  loss = reduction( w_t surrogate(log q(y_t), log q_old(y_t), A_t) )
         + kl.coef reduction( k(log q(y_t), log q_ref(y_t)) )
         - entropy reduction( H(q) ) + critic.coef reduction( value loss )

log q is at the sampling temperature. q_old is the sampler's; with `truncation` it is the trainer's before the update,
and w_t = min(q_old / q_sampler, truncation). The KL stands in the loss, or with place='reward' in the reward.
A group's prompt is computed once for all its rows.
Left out: packed rows.
Reference: Shao et al., DeepSeekMath (GRPO), arXiv:2402.03300; Liu et al., Dr. GRPO, arXiv:2503.20783; Schulman et al.,
PPO, arXiv:1707.06347. configs/rl/ has a preset for every paper.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from srm_jax import schema
from srm_jax.losses.advantages import ADVANTAGES
from srm_jax.losses.kl_penalty import KL_ESTIMATORS
from srm_jax.losses.policy_gradient import SURROGATES, clipped_value, truncated_importance
from srm_jax.losses.reductions import DENOMINATORS, REDUCTIONS
from srm_jax.models import heads
from srm_jax.recipes import credit, on_policy, schedules, updates
from srm_jax.recipes.context import Context, DataConfig, load_teacher
from srm_jax.recipes.scoring import ALONE, Groups, score
from srm_jax.types import Max, Mean, Objective, Recipe, Rollouts


PLACES = ('loss', 'reward')
AVERAGE = 'average'


@dataclasses.dataclass(frozen=True)
class KLConfig:
  """Penalty to a reference policy.

  coef: a number, or in the loss a schedule; 0 loads no reference. estimator: of KL_ESTIMATORS. place: 'loss', or
  'reward' (k1 of each token is taken off its reward). reference: workdir of the model; 'average' is the running average
  of the policy itself, by config.ema_decay. corrected: in the loss, times q / q_old, for tokens of an older policy.
  """

  coef: Any
  estimator: str
  place: str
  reference: str
  corrected: bool

  def __post_init__(self):
    if self.place not in PLACES:
      raise ValueError(f'place is {self.place!r}; choose from {PLACES}')
    if self.place == 'reward' and not schedules.is_number(self.coef):
      raise ValueError("place='reward' takes a number for coef")
    if self.place == 'reward' and self.estimator != 'k1':
      raise ValueError(f"in the reward the estimator is 'k1', not {self.estimator!r}: others have a bias there")
    if self.place == 'reward' and self.reference == AVERAGE:
      raise ValueError("reference 'average' is there in the loss alone; fix: place='loss'")


@dataclasses.dataclass(frozen=True)
class CriticConfig:
  """A value head on the policy's own hidden states. coef: of its loss. clip: how far a value may move in one batch of
  rollouts before its loss stops to follow; None never.
  """

  coef: float
  clip: float | None


@dataclasses.dataclass(frozen=True)
class PolicyGradientConfig:
  """rewards: {name: kind, weight, options}; empty takes the task's grade. whiten: advantages get mean 0 and deviation
  1 over the sampled tokens. truncation: cap of the weights between sampler and trainer; None goes without. entropy:
  weight of the bonus, a number or a schedule. critic: None but for advantage 'gae'.
  """

  name: str
  data: DataConfig
  rollouts: on_policy.RolloutConfig
  rewards: Mapping[str, Any]
  advantage: schema.ChoiceConfig
  whiten: bool
  surrogate: schema.ChoiceConfig
  truncation: float | None
  reduction: schema.ChoiceConfig
  kl: KLConfig
  entropy: Any
  critic: CriticConfig | None
  updates: updates.UpdatesConfig
  head_chunk: int | None

  @property
  def temperature(self) -> float:
    """That divides the trainer's logits; greedy samples are scored as they are."""
    return self.rollouts.temperature or 1.0


class Prepared(NamedTuple):
  """Rollouts, and the weights of terms at this step: {term: [B]}, alike everywhere."""

  rollouts: Rollouts
  weights: Mapping[str, Any]


def objective(config: PolicyGradientConfig, model, reference_model=None, *, groups: Groups = ALONE) -> Objective:
  """The loss of the module's docstring, on Rollouts whose rows share prompts as `groups` says."""
  surrogate = _bind('surrogate', config.surrogate, SURROGATES, given=('old_logprobs',))
  reduce = _bind('reduction', config.reduction, REDUCTIONS)
  count = _bind('reduction', config.reduction, DENOMINATORS)
  estimate = schema.choose('kl.estimator', config.kl.estimator, KL_ESTIMATORS)
  weights = _weights(config)
  scored = functools.partial(score, temperature=config.temperature, chunk=config.head_chunk, groups=groups)

  def prepare(rollouts: Rollouts, step) -> Prepared:
    everywhere = lambda number: jnp.full(rollouts.batch.inputs.shape[:1], number, jnp.float32)
    return Prepared(rollouts, {name: everywhere(weight(step)) for name, weight in weights.items()})

  def terms(params, prepared: Prepared, frozen, rng):
    del rng
    rollouts = prepared.rollouts
    mask = rollouts.batch.loss_mask
    scores = scored(model, params['model'], rollouts.batch, value_head=params.get('value_head'))
    old = _old_logprobs(config, rollouts, scores)
    follow = functools.partial(
        surrogate, sampler_logprobs=rollouts.sampler_logprobs, advantages=rollouts.advantages, mask=mask,
        old_logprobs=old,
    )
    values = {'policy': follow(scores['logprobs'])}
    metrics = on_policy.metrics(rollouts) | _diagnostics(scores, rollouts, old) | _followed(follow, scores, rollouts)
    if config.truncation is not None:
      importance = truncated_importance(old, rollouts.sampler_logprobs, mask, cap=config.truncation)
      values['policy'] = importance * values['policy']
      metrics['importance'] = _mean(importance, mask)
    if 'kl' in weights:
      theirs = scored(reference_model or model, _reference(config, frozen), rollouts.batch)['logprobs']
      values['kl'] = penalty = estimate(*_inside(mask, scores['logprobs'], jax.lax.stop_gradient(theirs)))
      metrics['kl'] = _mean(penalty, mask)
      if config.kl.corrected:
        values['kl'] = penalty * jnp.exp(sum(_inside(mask, scores['logprobs'], -_or_sampler(old, rollouts))))
    if rollouts.reference_logprobs is not None:
      metrics['kl'] = _mean(rollouts.sampler_logprobs - rollouts.reference_logprobs, mask)
    if 'entropy' in weights:
      values['entropy'] = -scores['entropy']
    if config.critic is not None:
      found = clipped_value(scores['values'], rollouts.values, rollouts.returns, mask, clip=config.critic.clip)
      values['critic'] = found
      metrics |= credit.critic_metrics(scores['values'], rollouts.returns, mask)
    found = {name: (prepared.weights[name][0], reduce(value, mask).total) for name, value in values.items()}
    return found, metrics

  def denominators(prepared: Prepared):
    return dict.fromkeys(weights, count(prepared.rollouts.batch.loss_mask))

  return Objective(terms, denominators, _resolved(config), prepare, group=groups.size)


def _bind(kind, choice: schema.ChoiceConfig, registry, given=()):
  return schema.bind(kind, choice.name, choice.options, registry, given=given)


def _weights(config: PolicyGradientConfig):
  """{term: its weight by step} of the terms that are there."""
  given = {'kl': config.kl.coef if config.kl.place == 'loss' else 0, 'entropy': config.entropy}
  given['critic'] = 0 if config.critic is None else config.critic.coef
  return {'policy': schedules.schedule(1.0, 'policy')} | {
      name: schedules.schedule(weight, f'config.recipe.{name}') for name, weight in given.items() if weight != 0
  }


def _reference(config, frozen):
  if config.kl.reference != AVERAGE:
    return frozen['reference']
  if AVERAGE not in frozen:
    raise schema.ConfigError("kl.reference='average' is the running average of the policy; fix: config.ema_decay > 0")
  return frozen[AVERAGE]['model']


def _old_logprobs(config, rollouts: Rollouts, scores):
  """Of the policy around which the surrogate is drawn; None is the sampler's own."""
  if rollouts.old_logprobs is not None or config.truncation is None:
    return rollouts.old_logprobs
  return jax.lax.stop_gradient(scores['logprobs'])  # one update a batch: the trainer before it is the trainer now


def _or_sampler(old, rollouts: Rollouts):
  return rollouts.sampler_logprobs if old is None else old


def _inside(mask, *arrays):
  """The arrays with zeros outside the mask, before any exponential: an overflow that does not count has a gradient of 0
  times infinity.
  """
  return [jnp.where(mask > 0, array, 0.0) for array in arrays]


def _mean(values, mask) -> Mean:
  return Mean(jnp.sum(jnp.where(mask > 0, values, 0.0)), jnp.sum(mask))


def _diagnostics(scores, rollouts: Rollouts, old):
  """Entropy, mismatch between sampler and trainer, ratios, and the share of rows that teach nothing."""
  mask = rollouts.batch.loss_mask
  gap, moved = _inside(
      mask, jnp.abs(scores['logprobs'] - rollouts.sampler_logprobs), scores['logprobs'] - _or_sampler(old, rollouts)
  )
  still = jnp.sum(jnp.all(rollouts.advantages == 0, axis=1).astype(jnp.float32))
  return {
      'entropy': _mean(scores['entropy'], mask), 'sampler_gap': _mean(gap, mask), 'sampler_gap_max': Max(jnp.max(gap)),
      'ratio_max': Max(jnp.exp(jnp.max(moved))), 'policy_kl': _mean(jnp.expm1(moved) - moved, mask),
      'zero_advantage': Mean(still, jnp.asarray(mask.shape[0], jnp.float32)),
  }


def _followed(follow, scores, rollouts: Rollouts):
  """Shares of tokens with an advantage that the surrogate does not follow, below and above a ratio of 1: what its clip
  takes away, found by its gradient, whatever the surrogate.
  """
  logprobs = jax.lax.stop_gradient(scores['logprobs'])
  gradient = jax.grad(lambda given: jnp.sum(follow(given)))(logprobs)
  counted = rollouts.batch.loss_mask * (rollouts.advantages != 0)
  stopped = jnp.where(gradient == 0, 1.0, 0.0)
  positive = rollouts.advantages > 0  # a clip stops a positive advantage above 1 and a negative one below
  return {'clip_high': _mean(stopped * positive, counted), 'clip_low': _mean(stopped * ~positive, counted)}


def _resolved(config: PolicyGradientConfig):
  kl = f'{config.kl.coef} {config.kl.estimator} in the {config.kl.place}' if config.kl.coef else 'none'
  said = lambda choice: f'{choice.name} {dict(choice.options)}'
  found = {
      'advantage': f'{said(config.advantage)}{", whitened over the tokens" if config.whiten else ""}',
      'surrogate': said(config.surrogate), 'denominator': f'{said(config.reduction)} of the global batch', 'kl': kl,
      'rewards': ', '.join(f'{one["weight"]:g} {name}' for name, one in config.rewards.items()) or "the task's grade",
      'temperature': config.temperature, 'mask': 'tokens that the student sampled',
  }
  if config.updates.epochs * config.updates.minibatches > 1:
    found['updates'] = f'{config.updates.epochs} epochs of {config.updates.minibatches} minibatches'
  return found


def build(section, context: Context) -> Recipe:
  """Opens config.recipe for policy-gradient RL."""
  config = schema.parse(PolicyGradientConfig, section, 'config.recipe')
  reference = None
  if config.kl.coef and config.kl.reference != AVERAGE:
    reference = load_teacher(config.kl.reference, context)
  _check(config)
  groups = shared(config, on_policy.prompt_width(config.rollouts, config.data, context))
  made = objective(config, context.model, reference and reference.config, groups=groups)
  finish = credit.finisher(config, context, reference, groups)
  rewards, frozen = on_policy.open_rewards(config.rewards, config.data, context)
  drawn = on_policy.source(
      config.rollouts, config.data, context, advantage=None, rewards=rewards, prompt_width=groups.prompt_width,
      teaches=on_policy.within_groups if config.advantage.name in ADVANTAGES else on_policy.within_batch,
  )
  if reference:  # in the reward it is asked by the source; here it is checked when a run is resumed
    frozen = {**frozen, 'reference': (reference.config, reference.params)}
  source = updates.repeated(drawn, config.updates, context.seed, group=groups.size, finish=finish)
  return Recipe(made, source, frozen, critic_params(config, context.model))


def shared(config: PolicyGradientConfig, prompt_width: int) -> Groups:
  """How rows share prompts: by whole groups, where minibatches hold such."""
  samples = config.rollouts.samples
  whole = samples > 1 and config.rollouts.prompts % config.updates.minibatches == 0
  return Groups(samples, prompt_width) if whole else ALONE


def critic_params(config: PolicyGradientConfig, model):
  """rng -> {'value_head': ...}, a critic that begins without opinions; None where there is none."""
  if config.critic is None:
    return None
  fresh = functools.partial(heads.init_value_head, embed_dim=model.embed_dim)
  return lambda rng: {'value_head': jax.tree.map(jnp.zeros_like, fresh(rng))}


def _check(config: PolicyGradientConfig):
  """Raises ConfigError where parts of the section do not fit each other."""
  rows = config.rollouts.prompts * config.rollouts.samples
  if rows % config.updates.minibatches:
    raise schema.ConfigError(
        f'updates.minibatches={config.updates.minibatches} does not divide the {rows} rows of prompts x samples'
    )
  if (config.critic is None) == (config.advantage.name == 'gae'):
    raise schema.ConfigError("advantage 'gae' and a critic need each other; fix: recipe.critic, or another advantage")
  if config.advantage.name in ADVANTAGES and config.rollouts.samples < 2:
    raise schema.ConfigError(
        f'advantage {config.advantage.name!r} compares the completions of a prompt, and rollouts.samples='
        f"{config.rollouts.samples}; fix: at least 2, or an advantage without groups ('returns_to_go')"
    )
  _try(config)


def _try(config: PolicyGradientConfig):
  """Tries the choices on a few numbers, so that an impossible option is found when a config is opened."""
  one = np.zeros((1, 2), np.float32)
  surrogate = _bind('surrogate', config.surrogate, SURROGATES, given=('old_logprobs',))
  asked = {
      'surrogate': lambda: surrogate(one, one, one, one), 'advantage': lambda: credit.bind(config.advantage)(one, one),
      'reduction': lambda: _bind('reduction', config.reduction, REDUCTIONS)(one, one),
      'truncation': lambda: config.truncation is None or truncated_importance(one, one, one, cap=config.truncation),
      'critic': lambda: config.critic is None or clipped_value(one, one, one, one, clip=config.critic.clip),
  }
  for key, fn in asked.items():
    try:
      fn()
    except (TypeError, ValueError) as error:
      raise schema.ConfigError(f'config.recipe.{key}: {error}') from error
