"""A mixture of MLPs against a loop over tokens and experts."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.models import experts
from srm_jax.models.config import TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=7, num_layers=1, embed_dim=6, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=10, num_experts=5,
    experts_per_token=2,
)


@pytest.fixture(scope='module')
def params():
  made = nn.meta.unbox(experts.Experts(CONFIG).init(jax.random.key(0), jnp.zeros((1, 1, 6)))['params'])
  return jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), made)


def test_route_by_hand():
  logits = jnp.log(jnp.array([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]]))
  weights, chosen = experts.route(logits, 2, normalize=False)
  np.testing.assert_array_equal(chosen, [[1, 2], [0, 2]])
  np.testing.assert_allclose(weights, [[0.6, 0.3], [0.5, 0.3]], rtol=1e-6)
  weights, _ = experts.route(logits, 2, normalize=True)
  np.testing.assert_allclose(weights, [[2 / 3, 1 / 3], [5 / 8, 3 / 8]], rtol=1e-6)


@pytest.mark.parametrize('normalize', [True, False])
def test_experts_equal_the_loop(params, normalize):
  config = dataclasses.replace(CONFIG, normalize_experts=normalize)
  x = np.asarray(jax.random.normal(jax.random.key(1), (2, 9, 6)), np.float64)
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  expected = np.zeros_like(x)
  for place in np.ndindex(2, 9):
    scores = np.exp(x[place] @ p['router']['kernel'])
    shares = scores / scores.sum()
    chosen = np.argsort(-shares)[:2]
    weights = shares[chosen] / (shares[chosen].sum() if normalize else 1.0)
    for weight, e in zip(weights, chosen, strict=True):
      gate = x[place] @ p['gate'][e]
      expected[place] += weight * ((gate / (1 + np.exp(-gate)) * (x[place] @ p['up'][e])) @ p['down'][e])
  found = jax.jit(experts.Experts(config).apply)({'params': params}, jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_experts_that_nobody_chooses_are_no_trouble(params):
  one = {**params, 'router': {'kernel': jnp.zeros((6, 5)).at[:, 3].set(50.0)}}
  x = jnp.abs(jax.random.normal(jax.random.key(2), (1, 4, 6)))
  found = experts.Experts(CONFIG).apply({'params': one}, x)
  gate, up = x @ params['gate'][3], x @ params['up'][3]
  np.testing.assert_allclose(found, (nn.silu(gate) * up) @ params['down'][3], rtol=1e-4, atol=1e-4)
