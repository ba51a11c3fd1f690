"""Pieces of a block against hand values, reference formulas and automatic differentiation."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.models import layers
from srm_jax.models.config import ACTIVATIONS, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=7, num_layers=1, embed_dim=6, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=10, norm_eps=1e-3
)


def _normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def _init(module, x):
  return nn.meta.unbox(module.init(jax.random.key(0), x))['params']


@pytest.mark.parametrize('shape', [(5, 3), (2, 5, 3)])
def test_matmul_gradients_are_those_of_the_plain_product(shape):
  x, kernel, weights = _normal(0, *shape), _normal(1, 3, 4), _normal(2, *shape[:-1], 4)

  def loss(product):
    return lambda x, kernel: jnp.sum(jnp.sin(product(x, kernel)) * weights)

  ours = jax.value_and_grad(loss(layers.matmul), argnums=(0, 1))(x, kernel)
  plain = jax.value_and_grad(loss(jnp.matmul), argnums=(0, 1))(x, kernel)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, plain)


def test_matmul_gradients_keep_the_types():
  x, kernel = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16)
  dx, dkernel = jax.grad(lambda *args: jnp.sum(layers.matmul(*args)).astype(jnp.float32), argnums=(0, 1))(x, kernel)
  assert dx.dtype == dkernel.dtype == jnp.bfloat16


def test_projection_splits_and_merges_axes():
  x = _normal(0, 2, 3, 6)
  split = layers.Projection(CONFIG, (6, 2, 4), ('embed', 'heads', 'head_dim'), bias=True)
  params = _init(split, x)
  params['bias'] = _normal(1, 2, 4)
  y = split.apply({'params': params}, x)
  np.testing.assert_allclose(y, np.einsum('btd,dhk->bthk', x, params['kernel']) + np.asarray(params['bias']), atol=1e-5)
  merge = layers.Projection(CONFIG, (2, 4, 6), ('heads', 'head_dim', 'embed'), contract=2)
  params = _init(merge, y)
  merged = merge.apply({'params': params}, y)
  np.testing.assert_allclose(merged, np.einsum('bthk,hkd->btd', y, params['kernel']), atol=1e-5)


def test_projection_starts_with_unit_variance():
  x = _normal(0, 400, 64)
  projection = layers.Projection(CONFIG, (64, 32), ('embed', 'mlp'))
  y = projection.apply({'params': _init(projection, x)}, x)
  assert float(jnp.std(y)) == pytest.approx(1.0, abs=0.1)


def test_rms_norm_by_hand():
  x = jnp.array([[3.0, 4.0]])
  norm = layers.RMSNorm(CONFIG)
  y = norm.apply({'params': {'scale': jnp.array([2.0, -1.0])}}, x)
  rms = np.sqrt(12.5 + 1e-3)
  np.testing.assert_allclose(y, [[6 / rms, -4 / rms]], rtol=1e-6)
  np.testing.assert_allclose(_init(norm, x)['scale'], [1.0, 1.0])


def test_gated_mlp():
  x = _normal(0, 2, 3, 6)
  mlp = layers.GatedMLP(CONFIG)
  params = _init(mlp, x)
  gate, up, down = (np.asarray(params[name]['kernel']) for name in ('gate', 'up', 'down'))
  gated = np.asarray(x) @ gate
  expected = (gated / (1 + np.exp(-gated)) * (np.asarray(x) @ up)) @ down
  np.testing.assert_allclose(mlp.apply({'params': params}, x), expected, atol=1e-5)


def test_norm_with_an_offset_starts_and_stays_around_one():
  config = dataclasses.replace(CONFIG, norm_offset=1.0)
  x = jnp.array([[3.0, 4.0]])
  np.testing.assert_array_equal(_init(layers.RMSNorm(config), x)['scale'], [0.0, 0.0])
  y = layers.RMSNorm(config).apply({'params': {'scale': jnp.array([1.0, -2.0])}}, x)
  plain = layers.RMSNorm(CONFIG).apply({'params': {'scale': jnp.array([2.0, -1.0])}}, x)
  np.testing.assert_allclose(y, plain, rtol=1e-6)


def test_activations_by_hand():
  x = np.array([-2.0, 0.0, 0.5, 3.0])
  tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
  np.testing.assert_allclose(layers.ACTIVATIONS['gelu_tanh'](jnp.asarray(x)), tanh, atol=1e-6)
  np.testing.assert_allclose(layers.ACTIVATIONS['silu'](jnp.asarray(x)), x / (1 + np.exp(-x)), atol=1e-6)
  assert set(layers.ACTIVATIONS) == set(ACTIVATIONS)
