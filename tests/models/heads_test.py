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
