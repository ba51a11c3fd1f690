"""The key-value cache as an explicit pytree: per-layer buffers, carried, updated in place, grown in buckets."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from srm_jax.models.config import TransformerConfig


class Cache(NamedTuple):
  """keys, values: one [B, K, S, D] buffer a layer. segment_ids: [B, S], 0 where nothing may be attended to.

  index: int32 scalar, the number of slots in use. All rows write to the same slot: prompts are padded on the left.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]
  segment_ids: jax.Array
  index: jax.Array


def init_cache(config: TransformerConfig, batch: int, size: int) -> Cache:
  """An empty cache of `size` slots in the compute dtype."""
  shape = (batch, config.num_kv_heads, size, config.head_dim)

  def buffers():
    return tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers))

  return Cache(buffers(), buffers(), jnp.zeros((batch, size), jnp.int32), jnp.zeros((), jnp.int32))


def grow(cache: Cache, size: int) -> Cache:
  """The same cache with room for `size` slots (a copy; nothing is lost).

  Raises:
    ValueError: `size` is smaller than the present size.
  """
  extra = size - cache.segment_ids.shape[1]
  if extra < 0:
    raise ValueError(f'cannot shrink a cache of {cache.segment_ids.shape[1]} slots to {size}')

  def pad(buffer):
    return jnp.pad(buffer, ((0, 0), (0, 0), (0, extra), (0, 0)))

  segments = jnp.pad(cache.segment_ids, ((0, 0), (0, extra)))
  return Cache(tuple(map(pad, cache.keys)), tuple(map(pad, cache.values)), segments, cache.index)


def write(buffer: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
  """Writes new [B, K, T, D] into buffer [B, K, S, D] at slot `index`."""
  zero = jnp.zeros((), jnp.int32)
  return jax.lax.dynamic_update_slice(buffer, new.astype(buffer.dtype), (zero, zero, index, zero))


def write_segments(cache: Cache, segment_ids: jax.Array) -> jax.Array:
  """The cache's [B, S] segment ids with [B, T] new ones at its index."""
  return jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (jnp.zeros((), jnp.int32), cache.index))
