"""Shapes of recipes: every one can be planned, and plans the arrays that its source makes. Some are tested beside
their sources.
"""

import jax
import pytest

from configs import base
from srm_jax import schema
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import CONFIGS, RECIPES, abstract
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
