"""Shapes of recipes: every one can be planned, and plans the arrays that its source makes. Some are tested beside
their sources.
"""

from typing import NamedTuple

import jax
import pytest

from configs import base
from srm_jax import plan, schema
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import CONFIGS, RECIPES, abstract, reward_model
from tests import tiny


def test_every_recipe_can_be_planned():
  assert abstract.RECIPES.keys() == RECIPES.keys() == CONFIGS.keys()


def test_rollouts_and_frozen_models_have_the_shapes_that_recipes_make():
  recipe = tiny.grpo().recipe.to_dict()
  model = TransformerConfig(**base.model(**{**tiny.MODEL, 'vocab_size': 64}))
  found = abstract.RECIPES['policy_gradient'](recipe, model)
  real = tiny.random_rollouts(rows=8, length=16)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), found.batch) == jax.tree.map(lambda x: (x.shape, x.dtype), real)
  with pytest.raises(schema.ConfigError, match='model.json'):
    abstract.RECIPES['distill'](
        base.distill('nowhere', tiny.data(), tiny.batch(), base.distillation()).to_dict(), model
    )


class Traced(NamedTuple):
  tokens: int
  params: dict


def traced(recipe, monkeypatch):
  """Tokens and parameters of the step that a plan would compile."""
  monkeypatch.setitem(plan.CHIPS, jax.devices()[0].device_kind, plan.Chip(1e12, 1.0, 1.0, 1.0))
  states = []

  def only(step):
    states.append(step.in_avals[0][0].params)
    return plan.Memory(1.0, 0.0, 0.0, 1.0, True), None

  monkeypatch.setattr(plan, '_compile', only)
  config = tiny.train(recipe, mesh=(1, 1, 1), model=dict(vocab_size=64))
  return Traced(plan.plan(config, jax.devices()[:1]).tokens, states[0])


@pytest.mark.parametrize('target', reward_model.TARGETS)
def test_reward_models_are_traced_with_their_head(target, monkeypatch):
  packing = 'one_per_row' if target == 'outcome' else 'plan'
  recipe = base.reward_model(tiny.data(), tiny.batch(4, 16, packing), target=target)
  found = traced(recipe, monkeypatch)
  assert found.tokens == 4 * 16 * (2 if target == 'outcome' else 1)
  assert found.params['value_head']['kernel'].shape == (16,)


def test_policies_are_traced_with_their_critic_on_a_minibatch(monkeypatch):
  recipe = base.policy_gradient(
      tiny.data('parity'), tiny.rollouts(), advantage=base.choice('gae'), critic=dict(coef=0.5, clip=0.2),
      minibatches=4,
  )
  found = traced(recipe, monkeypatch)
  assert found.tokens == 8 * 16 // 4 and found.params['value_head']['kernel'].shape == (16,)
