"""What every sampled token of a batch of rollouts is worth, before any of them is learnt.

  sequence: A = advantage(r - kl_coef sum_t k1_t) for all tokens of a completion
  token:    A_t = advantage(r_t), r_t = -kl_coef k1_t, and the completion's reward at its last token

with k1_t = log q_sampler(y_t) - log q_ref(y_t) where the KL stands in the reward, else 0.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from srm_jax import hosts, schema, sharding
from srm_jax.losses.advantages import ADVANTAGES, TOKEN_ADVANTAGES, whiten
from srm_jax.recipes.context import Context
from srm_jax.recipes.scoring import ALONE, Groups, score
from srm_jax.types import Mean, Params, Rollouts


def finisher(config, context: Context, reference, groups: Groups = ALONE) -> Callable[[Params, Rollouts], Rollouts]:
  """(params, rollouts) -> rollouts with advantages, and what else the objective needs that is fixed before an update.

  Args:
    config: PolicyGradientConfig.
    context: of the policy.
    reference: checkpoints.Model of the reference policy, or None.
    groups: how rows share prompts.

  Raises:
    ConfigError: an unknown advantage or option.
  """
  advantage = bind(config.advantage)
  several = config.updates.epochs * config.updates.minibatches > 1
  asked = {'old_logprobs': several and config.truncation is not None, 'values': config.critic is not None}
  penalised = config.kl.place == 'reward' and config.kl.coef
  shape = config.rollouts.prompts, config.rollouts.samples

  def scored(model):
    options = dict(temperature=config.temperature, chunk=config.head_chunk, groups=groups)
    return jax.jit(lambda params, batch, head: score(model, params, batch, value_head=head, **options))

  own, theirs = scored(context.model), reference and scored(reference.config)

  def of_trainer(params, rollouts: Rollouts) -> Rollouts:
    if not any(asked.values()):
      return rollouts
    found = own(params['model'], _placed(rollouts.batch), params.get('value_head'))
    known = {'old_logprobs': found['logprobs'], 'values': found.get('values')}
    return rollouts._replace(**{name: hosts.whole(known[name]) for name, wanted in asked.items() if wanted})

  def of_reference(rollouts: Rollouts) -> Rollouts:
    if not penalised:
      return rollouts
    found = theirs(reference.params, _placed(rollouts.batch), None)['logprobs']
    return rollouts._replace(reference_logprobs=hosts.whole(found))

  def finish(params, rollouts: Rollouts) -> Rollouts:
    rollouts = of_reference(of_trainer(params, rollouts))
    mask, penalty = rollouts.batch.loss_mask, np.zeros_like(rollouts.sampler_logprobs)
    if penalised:
      penalty = config.kl.coef * mask * (rollouts.sampler_logprobs - rollouts.reference_logprobs)
    if config.advantage.name in ADVANTAGES:
      rewards, valid = rollouts.rewards - penalty.sum(axis=1), rollouts.valid
      found = np.asarray(advantage(rewards.reshape(shape), valid.reshape(shape)))
      advantages, returns = found.reshape(-1, 1) * mask, None
    else:
      scorable = mask * rollouts.valid[:, None]
      rewards = _last(mask) * rollouts.rewards[:, None] - penalty
      advantages, returns = map(np.asarray, advantage(rewards, scorable, rollouts.values))
    if config.whiten:
      advantages = np.asarray(whiten(advantages, mask * rollouts.valid[:, None]))
    return rollouts._replace(advantages=advantages, returns=returns if config.critic else None)

  return finish


def bind(choice) -> Callable:
  """fn(rewards [P, G], valid) of a sequence's advantage, fn(rewards [B, T], mask, values=None) of a token's."""
  kinds = ADVANTAGES | TOKEN_ADVANTAGES
  fn = schema.bind('advantage', choice.name, choice.options, kinds, given=('valid', 'values'))
  if choice.name in ADVANTAGES:
    return lambda rewards, valid: fn(rewards, valid=valid)
  return lambda rewards, mask, values=None: fn(rewards, mask, values=rewards if values is None else values)


def _placed(batch):
  mesh = sharding.current_mesh()
  return batch if mesh is None else sharding.shard_whole(batch, jax.sharding.get_mesh())


def _last(mask: np.ndarray) -> np.ndarray:
  """1 on the last sampled token of every row that has one: [B, T]."""
  later = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
  return mask * (later == 1)


def critic_metrics(values, returns, mask) -> dict[str, Mean]:
  """Mean value and return, and the squared error whose ratio to the returns' spread is what a critic leaves open."""
  mean = lambda x: Mean(jnp.sum(jnp.where(mask > 0, x, 0.0)), jnp.sum(mask))
  return {'value': mean(values), 'return': mean(returns), 'value_error': mean(jnp.square(values - returns))}
