"""GRPO through its real parts: the trainer sees the sampler's log-probabilities, and the gradient is the policy
gradient.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from srm_jax import schema
from srm_jax.data import tokenizer
from srm_jax.losses.advantages import ADVANTAGES
from srm_jax.losses.kl_penalty import KL_ESTIMATORS
from srm_jax.losses.policy_gradient import SURROGATES
from srm_jax.losses.reductions import REDUCTIONS
from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import policy_gradient
from srm_jax.recipes.context import Context
from srm_jax.train_step import value_and_grad
from tests import tiny
from tests.tiny import tiny_tasks  # noqa: F401

MODEL = TransformerConfig(258, 1, 16, 2, 2, 8, 32, max_length=64)
CONTEXT = Context(MODEL, tokenizer.load('byte'), 1, 10)


@pytest.fixture(scope='module')
def params():
  """A policy whose distribution is far from flat, so that a wrong temperature or alignment shows."""
  tree = jax.jit(transformer.init_params, static_argnums=0)(MODEL, jax.random.key(0))
  return {'model': {**tree, 'embedding': tree['embedding'] * 3}}


def section(**options):
  return base.grpo(tiny.data('parity'), tiny.rollouts(**options))


@pytest.fixture(scope='module')
def rollouts(params):
  """{temperature: Rollouts of the recipe's own source}."""
  return {
      temperature: policy_gradient.build(section(temperature=temperature), CONTEXT).source.next(params, 0)
      for temperature in (1.0, 0.7)
  }


def logprobs(params, batch, temperature):
  """Trainer log-probabilities from whole logits."""
  out = transformer.Transformer(MODEL).apply(
      {'params': params['model']}, batch.inputs, positions=batch.positions, segment_ids=batch.segment_ids
  )
  scores = jax.nn.log_softmax(out.logits / temperature, axis=-1)
  return jnp.take_along_axis(scores, batch.targets[..., None], axis=-1)[..., 0]


@pytest.fixture(scope='module')
def outcome(params, rollouts):
  """{temperature: (loss, gradient, metrics)} through the recipe."""
  with jax.default_matmul_precision('highest'):
    return {
        temperature: jax.jit(lambda params, drawn, t=temperature: value_and_grad(
            policy_gradient.build(section(temperature=t), CONTEXT).objective, params, drawn, {}, jax.random.key(0)
        ))(params, drawn)
        for temperature, drawn in rollouts.items()
    }


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_sampler_and_trainer_agree(outcome, rollouts, temperature):
  metrics = outcome[temperature][2]
  assert rollouts[temperature].batch.loss_mask.sum() > 30
  assert metrics['sampler_gap_max'].value < 1e-4
  assert float(metrics['sampler_gap'].total) / float(metrics['sampler_gap'].count) < 1e-5


def test_the_gap_is_one_that_can_open(params, rollouts, outcome):
  """Log-probabilities at temperature 1 of what was sampled at 0.7, or of the token before, are far away."""
  drawn = rollouts[0.7]
  inside = drawn.batch.loss_mask > 0
  assert np.abs(np.asarray(logprobs(params, drawn.batch, 1.0)) - drawn.sampler_logprobs)[inside].max() > 0.1
  assert np.abs(np.roll(drawn.sampler_logprobs, 1, axis=1) - drawn.sampler_logprobs)[inside].max() > 0.1


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_the_gradient_is_the_policy_gradient(params, rollouts, outcome, temperature):
  """On-policy the ratio is 1: grad = - sum_i A_i (1 / |o_i|) sum_t grad log pi(y_t) / rows."""
  drawn = rollouts[temperature]
  rewards, valid = (np.asarray(x).reshape(2, 4) for x in (drawn.rewards, drawn.valid))
  advantages = np.zeros((2, 4))
  for group in range(2):
    known = rewards[group][valid[group] > 0]
    advantages[group] = np.where(valid[group] > 0, (rewards[group] - known.mean()) / (known.std(ddof=1) + 1e-6), 0)
  assert np.abs(advantages).max() > 0.5
  mask = drawn.batch.loss_mask
  weights = -advantages.reshape(-1, 1) * mask / mask.sum(1, keepdims=True) / len(mask)
  with jax.default_matmul_precision('highest'):
    expected = jax.jit(jax.grad(lambda params: jnp.sum(weights * logprobs(params, drawn.batch, temperature))))(params)
  gap = optax.tree.norm(jax.tree.map(jnp.subtract, outcome[temperature][1], expected))
  assert gap < 2e-4 * optax.tree.norm(expected)
  np.testing.assert_allclose(drawn.advantages, advantages.reshape(-1, 1) * mask, atol=1e-5)


def test_metrics(rollouts, outcome):
  metrics, drawn = outcome[1.0][2], rollouts[1.0]
  value = lambda name: float(metrics[name].total) / float(metrics[name].count)
  assert value('reward') == pytest.approx(drawn.rewards[drawn.valid > 0].mean())
  assert value('unscorable') == pytest.approx(1 - drawn.valid.mean())
  assert value('completion_tokens') == drawn.batch.loss_mask.sum(1).mean()
  assert value('zero_advantage') == np.mean(~np.any(drawn.advantages, axis=1))
  assert 0 < value('entropy') < np.log(258)


def penalised(params, rollouts, reference, *, estimator='k3', coef=0.5):
  config = section()
  config.kl.update(coef=coef, estimator=estimator)
  parsed = schema.parse(policy_gradient.PolicyGradientConfig, config, 'recipe')
  objective = policy_gradient.objective(parsed, MODEL, MODEL)
  return value_and_grad(objective, params, rollouts, {'reference': reference}, None)


def test_the_penalty_is_zero_where_policy_and_reference_are_one(params, rollouts, outcome):
  """k3 has its minimum there, so the gradient is that without a penalty."""
  run = jax.jit(lambda params, reference: penalised(params, rollouts[1.0], reference))
  loss, grads, metrics = run(params, params['model'])
  assert abs(float(metrics['kl'].total)) < 1e-5
  assert optax.tree.norm(jax.tree.map(jnp.subtract, grads, outcome[1.0][1])) < 1e-3 * optax.tree.norm(outcome[1.0][1])
  other = jax.tree.map(lambda x: 1.3 * x, params['model'])
  loss_there, _, metrics = run(params, other)
  kl = float(metrics['kl'].total) / float(metrics['kl'].count)
  assert kl > 0.01 and metrics['kl'].count == rollouts[1.0].batch.loss_mask.sum()
  assert loss_there > loss


def with_choice(kind, name, **options):
  config = section()
  config[kind] = dict(name=name, options=options)
  return config


@pytest.mark.parametrize('config', [
    *(with_choice('advantage', name) for name in ADVANTAGES), *(with_choice('surrogate', name) for name in SURROGATES),
    *(with_choice('reduction', name, **({'max_length': 8} if name == 'fixed_length' else {})) for name in REDUCTIONS),
], ids=lambda config: f'{config.advantage.name}-{config.surrogate.name}-{config.reduction.name}')
def test_every_choice_builds_and_says_what_it_is(config):
  recipe = policy_gradient.build(config, CONTEXT)
  resolved = recipe.objective.resolved
  assert resolved['advantage'].startswith(config.advantage.name)
  assert resolved['surrogate'].startswith(config.surrogate.name)
  prepared = recipe.objective.prepare(tiny.random_rollouts(), 0)
  assert recipe.objective.denominators(prepared)['policy'] > 0


@pytest.mark.parametrize('estimator', KL_ESTIMATORS)
def test_every_estimator_builds(estimator):
  config = section()
  config.kl.estimator = estimator
  assert policy_gradient.build(config, CONTEXT).frozen == {}
