"""GRPO through its real parts: the trainer sees the sampler's log-probabilities, and the gradient is the policy
gradient.
"""

import functools
import shutil

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
from srm_jax.recipes import on_policy, policy_gradient
from srm_jax.recipes.context import Context
from srm_jax.train import train
from srm_jax.train_step import value_and_grad
from tests import tiny
from tests.tiny import one_device, tiny_tasks  # noqa: F401

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


@pytest.mark.parametrize('microbatches', [1, 2, 4])
def test_prompts_that_a_group_shares_are_computed_once_without_changing_the_step(
    params, rollouts, outcome, microbatches, monkeypatch,
):
  """Against the same rows one by one; a fourth of the batch holds half a group, which shares all the same."""
  built = policy_gradient.build(section(), CONTEXT)
  assert built.objective.group == 4
  seen, branches = [], transformer.Transformer.__call__

  def watched(self, inputs, **options):
    seen.append((options.get('trunk', 0), options.get('branches', 1)))
    return branches(self, inputs, **options)

  monkeypatch.setattr(transformer.Transformer, '__call__', watched)
  parsed = schema.parse(policy_gradient.PolicyGradientConfig, section(), 'recipe')
  alone = policy_gradient.objective(parsed, MODEL)
  with jax.default_matmul_precision('highest'):
    step = jax.jit(functools.partial(value_and_grad, built.objective, microbatches=microbatches))
    found = step(params, rollouts[1.0], {}, jax.random.key(0))
    assert set(seen) == {(3, 4 if microbatches < 4 else 2)}
    seen.clear()
    expected = jax.jit(functools.partial(value_and_grad, alone))(params, rollouts[1.0], {}, jax.random.key(0))
    assert set(seen) == {(0, 1)}
  assert float(found[0]) == pytest.approx(float(expected[0]), abs=1e-6)
  gap = optax.tree.norm(jax.tree.map(jnp.subtract, found[1], expected[1]))
  assert gap < 2e-4 * optax.tree.norm(expected[1])
  for name, one in expected[2].items():
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), one, found[2][name])


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


# The terms by themselves: the policy is a table of log-probabilities, one for every token of the batch.


@pytest.fixture
def table(monkeypatch):
  """A model whose parameters are the log-probabilities; entropy and values are told apart from them."""

  def score(model, params, batch, *, temperature, chunk, value_head=None, groups):
    del model, batch, temperature, chunk, groups
    return {'logprobs': params, 'entropy': -params, 'values': value_head}

  monkeypatch.setattr(policy_gradient, 'score', score)


ROLLOUTS = tiny.random_rollouts()
INSIDE, TOKENS = ROLLOUTS.batch.loss_mask > 0, ROLLOUTS.batch.loss_mask.sum()
RNG = np.random.default_rng(7)
MOVED = (ROLLOUTS.sampler_logprobs + RNG.normal(0, 0.3, INSIDE.shape) * INSIDE).astype(np.float32)
REFERENCE = (ROLLOUTS.sampler_logprobs + RNG.normal(0, 0.5, INSIDE.shape) * INSIDE).astype(np.float32)


def run(params, *, frozen=None, rollouts=ROLLOUTS, step=0, microbatches=1, **options):
  options = {'reduction': base.choice('token_mean'), 'surrogate': base.choice('importance_sampling'), **options}
  config = base.policy_gradient(tiny.data('parity'), tiny.rollouts(), **options)
  objective = policy_gradient.objective(schema.parse(policy_gradient.PolicyGradientConfig, config, 'recipe'), MODEL)
  params = params if isinstance(params, dict) else {'model': params}
  key = jax.random.key(0)
  return value_and_grad(objective, params, rollouts, frozen or {}, key, step=step, microbatches=microbatches)


def mean(values):
  return np.where(INSIDE, values, 0).sum() / TOKENS


def policy_loss(moved=MOVED):
  return -mean(np.exp(moved - ROLLOUTS.sampler_logprobs) * ROLLOUTS.advantages)


def test_the_bonus_of_entropy_is_a_term_of_its_own(table):
  loss, grads, metrics = run(MOVED, entropy=0.1)
  assert loss == pytest.approx(policy_loss() - 0.1 * mean(-MOVED), rel=1e-5)
  assert float(metrics['loss/entropy'].total / metrics['loss/entropy'].count) == pytest.approx(mean(MOVED), rel=1e-5)
  without = run(MOVED)[1]['model']
  np.testing.assert_allclose(grads['model'] - without, 0.1 * INSIDE / TOKENS, atol=1e-6)


def test_tokens_of_another_program_are_weighed(table):
  """One update a batch: the ratio is 1, and min(q / q_sampler, cap) stands before the policy gradient."""
  loss, grads, metrics = run(MOVED, truncation=1.2)
  weights = np.minimum(np.exp(MOVED - ROLLOUTS.sampler_logprobs), 1.2)
  assert (weights[INSIDE] == np.float32(1.2)).any() and (weights[INSIDE] < 1).any()
  np.testing.assert_allclose(grads['model'], -weights * ROLLOUTS.advantages * INSIDE / TOKENS, atol=1e-6)
  assert loss == pytest.approx(-mean(weights * ROLLOUTS.advantages), rel=1e-5)
  assert float(metrics['importance'].total) == pytest.approx(weights[INSIDE].sum(), rel=1e-5)
  assert metrics['ratio_max'].value == 1


def test_with_several_updates_the_ratio_is_to_the_trainer_before_them(table):
  old = ROLLOUTS.sampler_logprobs + np.float32(0.1) * INSIDE
  loss, _, _ = run(MOVED, truncation=2.0, rollouts=ROLLOUTS._replace(old_logprobs=old))
  expected = -mean(np.exp(0.1) * np.exp(MOVED - old) * ROLLOUTS.advantages)
  assert loss == pytest.approx(expected, rel=1e-5)


def test_the_penalty_may_be_corrected_for_an_older_policy(table):
  gap = REFERENCE - MOVED
  k3, ratio = np.exp(gap) - gap - 1, np.exp(MOVED - ROLLOUTS.sampler_logprobs)
  frozen = {'reference': REFERENCE}
  for corrected, expected in ((False, mean(k3)), (True, mean(k3 * ratio))):
    loss, _, metrics = run(MOVED, kl=0.2, corrected=corrected, frozen=frozen)
    assert loss == pytest.approx(policy_loss() + 0.2 * expected, rel=1e-4)
    assert float(metrics['kl'].total) / TOKENS == pytest.approx(mean(k3), rel=1e-4)


def test_the_running_average_may_be_the_reference(table):
  options = dict(kl=0.2, reference='average')
  found = run(MOVED, frozen={'average': {'model': REFERENCE}}, **options)[0]
  assert found == pytest.approx(float(run(MOVED, kl=0.2, frozen={'reference': REFERENCE})[0]), rel=1e-6)
  with pytest.raises(schema.ConfigError, match='fix: config.ema_decay > 0'):
    run(MOVED, **options)


def test_weights_of_terms_follow_their_schedules(table):
  falling = {'name': 'linear', 'start': 0.4, 'end': 0.0, 'steps': 10}
  losses = [float(run(MOVED, kl=falling, frozen={'reference': REFERENCE}, step=step)[0]) for step in (0, 5, 10)]
  assert losses[2] == pytest.approx(policy_loss(), rel=1e-5)
  assert losses[0] - losses[2] == pytest.approx(2 * (losses[1] - losses[2]), rel=1e-4)


def test_a_critic_learns_the_returns(table):
  values = RNG.normal(size=INSIDE.shape).astype(np.float32)
  old = values - RNG.normal(0, 0.2, INSIDE.shape).astype(np.float32)
  returns = RNG.normal(size=INSIDE.shape).astype(np.float32)
  rollouts = ROLLOUTS._replace(values=old, returns=returns)
  params = {'model': MOVED, 'value_head': values}
  near = np.clip(values, old - 0.1, old + 0.1)
  worse = np.maximum((values - returns) ** 2, (near - returns) ** 2)
  options = dict(advantage=base.choice('gae'), rollouts=rollouts)
  loss, grads, metrics = run(params, critic=dict(coef=0.5, clip=0.1), **options)
  assert loss == pytest.approx(policy_loss() + 0.25 * mean(worse), rel=1e-4)
  assert float(metrics['value_error'].total) / TOKENS == pytest.approx(mean((values - returns) ** 2), rel=1e-4)
  loss, grads, _ = run(params, critic=dict(coef=0.5, clip=None), **options)
  np.testing.assert_allclose(grads['value_head'], 0.5 * (values - returns) * INSIDE / TOKENS, atol=1e-6)


@pytest.mark.parametrize('surrogate, low, high', [
    (base.choice('clipped', clip_low=0.1, clip_high=0.15), 0.9, 1.15), (base.choice('cispo', max_ratio=1.2), 0, np.inf),
])
def test_what_a_clip_takes_away_is_counted(table, surrogate, low, high):
  metrics = run(MOVED, surrogate=surrogate)[2]
  ratio, advantages = np.exp(MOVED - ROLLOUTS.sampler_logprobs), ROLLOUTS.advantages
  rate = lambda name: float(metrics[name].total) / float(metrics[name].count)
  assert rate('clip_high') == pytest.approx(mean((advantages > 0) & (ratio > high)), abs=1e-6)
  assert rate('clip_low') == pytest.approx(mean((advantages < 0) & (ratio < low)), abs=1e-6)
  assert (rate('clip_high') > 0) == (high < np.inf)
  assert metrics['ratio_max'].value == pytest.approx(ratio[INSIDE].max(), rel=1e-5)


def test_all_terms_together_do_not_depend_on_microbatches(monkeypatch):
  """Here what the policy says of a token follows from the token, so that it is cut with the batch."""
  def score(model, params, batch, *, temperature, chunk, value_head=None, groups):
    said = params * batch.targets.astype(jnp.float32) / 64 - 4.2
    values = None if value_head is None else value_head * batch.targets / 64.0
    return {'logprobs': said, 'entropy': -said, 'values': values}

  monkeypatch.setattr(policy_gradient, 'score', score)
  rollouts = ROLLOUTS._replace(values=ROLLOUTS.advantages, returns=2 * ROLLOUTS.advantages)
  params = {'model': jnp.float32(0.3), 'value_head': jnp.float32(0.7)}
  options = dict(
      kl=0.2, entropy=0.05, truncation=1.5, advantage=base.choice('gae'), critic=dict(coef=0.5, clip=0.1),
      surrogate=base.choice('clipped'), frozen={'reference': jnp.float32(-0.1)}, rollouts=rollouts,
      reduction=base.choice('sequence_mean_token_mean'),
  )
  whole, parts = (run(params, microbatches=count, **options) for count in (1, 4))
  assert whole[0] == pytest.approx(float(parts[0]), rel=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), whole[1], parts[1])
  for name, one in whole[2].items():
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, parts[2][name])


@pytest.mark.parametrize('change, message', [
    (dict(advantage=base.choice('gae')), "advantage 'gae' and a critic need each other"),
    (dict(critic=dict(coef=0.5, clip=None)), "advantage 'gae' and a critic need each other"),
    (dict(minibatches=3), 'updates.minibatches=3 does not divide the 8 rows'),
    (dict(kl=0.1, place='rewards'), "place is 'rewards'; choose from"),
    (dict(kl=0.1, place='reward', reference='average', estimator='k1'), "'average' is there in the loss alone"),
    (dict(kl=0.1, place='reward'), "in the reward the estimator is 'k1', not 'k3'"),
    (dict(entropy='much'), "config.recipe.entropy is 'much'; give a number, or a schedule"),
    (dict(advantage=base.choice('group_relative', scale='row')), "advantage: scale 'row' of group_relative unknown"),
    (dict(surrogate=base.choice('clipped', clip_low=-0.1)), 'surrogate: clip_low -0.1'),
    (dict(surrogate=base.choice('sapo', positive=0.0)), 'surrogate: positive 0.0'),
    (dict(reduction=base.choice('fixed_length', max_length=0)), 'reduction: max_length 0 of fixed_length'),
    (dict(truncation=0.0), 'truncation: cap 0.0 of the importance weights'),
    (dict(advantage=base.choice('gae'), critic=dict(coef=1.0, clip=0.0)), 'critic: clip 0.0 of clipped_value'),
])
def test_what_does_not_fit_together_is_refused(change, message):
  with pytest.raises(schema.ConfigError, match=message):
    policy_gradient.build(base.policy_gradient(tiny.data('parity'), tiny.rollouts(), **change), CONTEXT)


@pytest.mark.parametrize('name', ADVANTAGES)
def test_a_group_of_one_has_nothing_to_compare_with(name):
  with pytest.raises(schema.ConfigError, match='compares the completions of a prompt, and rollouts.samples=1; fix: at'):
    policy_gradient.build(
        base.policy_gradient(tiny.data('parity'), tiny.rollouts(samples=1), advantage=base.choice(name)), CONTEXT
    )
  policy_gradient.build(
      base.policy_gradient(tiny.data('parity'), tiny.rollouts(samples=1), advantage=base.choice('returns_to_go')),
      CONTEXT,
  )


@pytest.mark.parametrize('name, teaches', [
    ('group_relative', on_policy.within_groups), ('leave_one_out', on_policy.within_groups),
    ('returns_to_go', on_policy.within_batch), ('gae', on_policy.within_batch),
])
def test_patience_watches_what_the_advantage_compares(monkeypatch, name, teaches):
  asked, source = [], on_policy.source
  monkeypatch.setattr(on_policy, 'source', lambda *args, **options: asked.append(options) or source(*args, **options))
  critic = dict(coef=0.1, clip=None) if name == 'gae' else None
  policy_gradient.build(
      base.policy_gradient(tiny.data('parity'), tiny.rollouts(), advantage=base.choice(name), critic=critic), CONTEXT
  )
  assert asked[0]['teaches'] is teaches


@pytest.mark.parametrize('place, estimator', [('loss', 'k3'), ('reward', 'k1')])
def test_a_reference_is_checked_on_resuming_wherever_its_penalty_stands(tmp_path, place, estimator):
  config = tiny.grpo(num_steps=2, checkpoint_every=1)
  reference = tiny.write_model(tmp_path / 'one', MODEL)
  config.recipe.kl.update(coef=0.1, place=place, estimator=estimator, reference=reference)
  train(config, tmp_path / 'run')
  shutil.rmtree(reference)
  tiny.write_model(tmp_path / 'one', MODEL, seed=1)
  with pytest.raises(schema.ConfigError, match='the frozen models changed since the checkpoint'):
    train(config, tmp_path / 'run')
