"""The unembedding, tied or not, and the scale of projectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.models import heads
from srm_jax.models.config import TransformerConfig

CONFIG = TransformerConfig(vocab_size=5, num_layers=1, embed_dim=3, num_heads=1, num_kv_heads=1, head_dim=2, mlp_dim=4)
EMBEDDING, HEAD = np.arange(15.0).reshape(5, 3), -np.arange(15.0).reshape(3, 5)


def test_unembedding_is_the_head_where_there_is_one():
  np.testing.assert_array_equal(heads.unembedding({'embedding': EMBEDDING}), EMBEDDING.T)
  np.testing.assert_array_equal(heads.unembedding({'embedding': EMBEDDING, 'head': HEAD}), HEAD)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_logits_are_float32(dtype):
  config = TransformerConfig(**{**CONFIG.__dict__, 'dtype': dtype})
  logits = heads.logits(config, {'embedding': jnp.asarray(EMBEDDING)}, jnp.ones((2, 4, 3)))
  assert logits.dtype == jnp.float32 and logits.shape == (2, 4, 5)
  np.testing.assert_array_equal(logits[1, 2], EMBEDDING.sum(1))  # small integers are exact in bfloat16


def test_projector_keeps_unit_variance():
  projector = heads.init_projector(jax.random.key(0), 64, 48)
  features = jax.random.normal(jax.random.key(1), (500, 64))
  assert projector.shape == (64, 48)
  assert float(jnp.std(features @ projector)) == pytest.approx(1.0, abs=0.05)


def test_a_value_head_begins_with_scores_of_unit_variance():
  head = heads.init_value_head(jax.random.key(0), 63)
  scores = heads.value(head, jax.random.normal(jax.random.key(1), (40, 50, 63)))
  assert scores.shape == (40, 50)
  assert float(jnp.std(scores)) == pytest.approx(float(jnp.linalg.norm(head['kernel'])), rel=0.05)
  norms = [jnp.linalg.norm(heads.init_value_head(jax.random.key(seed), 63)['kernel']) for seed in range(50)]
  assert float(jnp.mean(jnp.square(jnp.array(norms)))) == pytest.approx(63 / 64, rel=0.1)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_values_are_float32_and_by_hand(dtype):
  head = {'kernel': jnp.array([1.0, -2.0, 0.5]), 'bias': jnp.array(0.25)}
  values = heads.value(head, jnp.array([[[1, 2, 4], [0, 1, 0]]], dtype))
  assert values.dtype == jnp.float32
  np.testing.assert_array_equal(values, [[-0.75, -1.75]])
