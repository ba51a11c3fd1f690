"""Advantages of sampled tokens: of whole completions or of each token, with the penalty where it belongs."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from srm_jax import schema
from srm_jax.data import tokenizer
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import credit
from srm_jax.recipes.context import Context
from srm_jax.recipes.policy_gradient import PolicyGradientConfig
from tests import tiny

CONTEXT = Context(TransformerConfig(258, 1, 16, 2, 2, 8, 32, max_length=64), tokenizer.load('byte'), 1, 10)


def finish(monkeypatch=None, *, reference=None, values=None, **options):
  """The finisher of a config, whose models say what the test wants them to."""
  config = base.policy_gradient(tiny.data('parity'), tiny.rollouts(), **options)
  parsed = schema.parse(PolicyGradientConfig, config, 'config.recipe')
  if monkeypatch is not None:
    said = {'logprobs': reference, 'entropy': None, 'values': values}
    monkeypatch.setattr(credit, 'score', lambda model, params, batch, **_: said)
  model = types.SimpleNamespace(config=CONTEXT.model, params={}) if reference is not None else None
  return lambda rollouts: credit.finisher(parsed, CONTEXT, model)({'model': {}}, rollouts)


def test_a_completions_advantage_lies_on_its_tokens():
  made = tiny.random_rollouts()
  found = finish()(made)
  mask, rewards = made.batch.loss_mask, made.rewards.reshape(2, 4)
  assert not found.advantages[mask == 0].any() and found.returns is None
  for row in range(8):
    on_tokens = set(found.advantages[row][mask[row] > 0].tolist())
    assert len(on_tokens) <= 1
  assert rewards.std() > 0 and found.advantages.any()


def test_returns_are_the_reward_on_every_token_and_nothing_where_it_is_unknown():
  made = tiny.random_rollouts()
  found = finish(advantage=base.choice('returns_to_go'))(made)
  expected = (made.rewards * made.valid)[:, None] * made.batch.loss_mask
  np.testing.assert_allclose(found.advantages, expected, rtol=1e-6)


def test_whitening_is_over_the_tokens_that_can_be_scored():
  made = tiny.random_rollouts()
  found = finish(advantage=base.choice('returns_to_go'), whiten=True)(made).advantages
  inside = (made.batch.loss_mask * made.valid[:, None]) > 0
  assert abs(found[inside].mean()) < 1e-5 and found[inside].std() == pytest.approx(1, abs=1e-3)
  assert not found[~inside].any()


def with_reference(monkeypatch, made, coef, **options):
  """A reference that finds every sampled token less likely by 0.5, and anything elsewhere."""
  reference = np.where(made.batch.loss_mask > 0, made.sampler_logprobs - 0.5, 77.0).astype(np.float32)
  return finish(monkeypatch, reference=jnp.array(reference), kl=coef, estimator='k1', place='reward', **options)(made)


def test_the_penalty_of_a_completion_is_the_sum_over_its_tokens(monkeypatch):
  made = tiny.random_rollouts()
  found = with_reference(monkeypatch, made, 0.1, advantage=base.choice('centered'))
  lengths = made.batch.loss_mask.sum(axis=1)
  rewards, valid = (made.rewards - 0.05 * lengths).reshape(2, 4), made.valid.reshape(2, 4)
  means = (rewards * valid).sum(1, keepdims=True) / valid.sum(1, keepdims=True)
  expected = ((rewards - means) * valid).reshape(-1, 1) * made.batch.loss_mask
  np.testing.assert_allclose(found.advantages, expected, atol=1e-5)
  np.testing.assert_array_equal(found.reference_logprobs[:, 0] == 77.0, made.batch.loss_mask[:, 0] == 0)


def test_the_penalty_of_a_token_is_part_of_what_is_to_come(monkeypatch):
  made = tiny.random_rollouts()
  made = made._replace(valid=np.ones_like(made.valid))
  found = with_reference(monkeypatch, made, 0.1, advantage=base.choice('returns_to_go')).advantages
  for row, mask in enumerate(made.batch.loss_mask):
    places = np.flatnonzero(mask)
    for still, place in enumerate(places[::-1], start=1):
      assert found[row, place] == pytest.approx(made.rewards[row] - 0.05 * still, abs=1e-5)


def test_gae_has_the_critics_values(monkeypatch):
  made = tiny.random_rollouts()
  made = made._replace(valid=np.ones_like(made.valid))
  values = np.full(made.sampler_logprobs.shape, 0.25, np.float32)
  found = finish(
      monkeypatch, values=jnp.array(values), advantage=base.choice('gae', discount=1.0, trace_decay=1.0),
      critic=dict(coef=0.5, clip=None),
  )(made)
  inside = made.batch.loss_mask > 0
  np.testing.assert_allclose(found.advantages, (made.rewards[:, None] - 0.25) * inside, atol=1e-6)
  np.testing.assert_allclose(found.returns, made.rewards[:, None] * inside, atol=1e-6)
  np.testing.assert_array_equal(found.values, values)


@pytest.mark.parametrize('truncation, epochs, asked', [(2.0, 2, True), (2.0, 1, False), (None, 2, False)])
def test_the_trainer_is_asked_only_where_it_is_not_the_sampler(monkeypatch, truncation, epochs, asked):
  made = tiny.random_rollouts()
  theirs = made.sampler_logprobs + 0.1
  config = base.policy_gradient(tiny.data('parity'), tiny.rollouts(), truncation=truncation, epochs=epochs)
  parsed = schema.parse(PolicyGradientConfig, config, 'config.recipe')
  monkeypatch.setattr(credit, 'score', lambda *_, **__: {'logprobs': jnp.array(theirs), 'entropy': None})
  found = credit.finisher(parsed, CONTEXT, None)({'model': {}}, made)
  if asked:
    np.testing.assert_array_equal(found.old_logprobs, theirs)
  else:
    assert found.old_logprobs is None


def test_an_unknown_advantage_is_named():
  with pytest.raises(schema.ConfigError, match="advantage 'group' unknown"):
    finish(advantage=base.choice('group'))(tiny.random_rollouts())
