"""The first place that is not finite is named in the order of the forward pass."""

import jax
import jax.numpy as jnp
import pytest

from srm_jax.diagnostics import first_non_finite
from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig
from tests import tiny

MODEL = TransformerConfig(64, 3, 16, 2, 2, 8, 32)


@pytest.fixture(scope='module')
def params():
  return {'model': jax.jit(transformer.init_params, static_argnums=0)(MODEL, jax.random.key(0))}


def edited(params, change, *path):
  head, *rest = path
  return {**params, head: edited(params[head], change, *rest) if rest else change(params[head])}


def test_a_parameter(params):
  bad = edited(params, lambda x: x.at[1, 0, 0].set(jnp.nan), 'model', 'layers', 'mlp', 'up', 'kernel')
  assert first_non_finite(MODEL, bad, tiny.random_batch(), params) == 'parameter model/layers/mlp/up/kernel'


def test_the_output_of_a_layer(params):
  """Finite weights of layer 1 that overflow: the layers behind it are not finite either, and not named."""
  bad = edited(params, lambda x: x.at[1].set(3e38), 'model', 'layers', 'mlp', 'down', 'kernel')
  assert first_non_finite(MODEL, bad, tiny.random_batch(), params) == 'output of layer 1 of 3'


def test_a_gradient_and_the_loss(params):
  grads = edited(params, lambda x: x.at[0].set(jnp.inf), 'model', 'final_norm', 'scale')
  found = first_non_finite(MODEL, params, tiny.random_batch(), grads)
  assert found == 'the loss, or the gradient of model/final_norm/scale'
  assert first_non_finite(MODEL, params, tiny.random_batch(), params) == 'the loss'
