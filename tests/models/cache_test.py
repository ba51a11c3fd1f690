"""The cache holds what was written, where it was written."""

import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.models import cache as kv
from srm_jax.models.config import TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=7, num_layers=3, embed_dim=8, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=8, dtype='bfloat16'
)


def test_init():
  cache = kv.init_cache(CONFIG, 5, 6)
  assert len(cache.keys) == len(cache.values) == 3
  assert {(buffer.shape, buffer.dtype.name) for buffer in cache.keys + cache.values} == {((5, 2, 6, 4), 'bfloat16')}
  assert cache.segment_ids.shape == (5, 6) and not cache.segment_ids.any() and cache.index == 0


def test_write_and_write_segments_at_the_index():
  cache = kv.init_cache(CONFIG, 1, 4)._replace(index=jnp.asarray(1))
  new = jnp.arange(16, dtype=jnp.float32).reshape(1, 2, 2, 4)
  written = kv.write(cache.keys[0], new, cache.index)
  assert written.dtype == jnp.bfloat16
  np.testing.assert_array_equal(written[:, :, 1:3], new)
  assert not written[:, :, 0].any() and not written[:, :, 3].any()
  np.testing.assert_array_equal(kv.write_segments(cache, jnp.array([[5, 6]])), [[0, 5, 6, 0]])


def test_grow_keeps_everything():
  cache = kv.init_cache(CONFIG, 1, 2)
  full = cache._replace(
      keys=tuple(buffer + 1 for buffer in cache.keys), segment_ids=jnp.array([[3, 4]]), index=jnp.asarray(2)
  )
  grown = kv.grow(full, 5)
  assert grown.index == 2 and grown.keys[2].shape == (1, 2, 5, 4)
  np.testing.assert_array_equal(grown.segment_ids, [[3, 4, 0, 0, 0]])
  np.testing.assert_array_equal(grown.keys[2][0, 0, :, 0], [1, 1, 0, 0, 0])
  with pytest.raises(ValueError, match='cannot shrink a cache of 5 slots to 4'):
    kv.grow(grown, 4)
