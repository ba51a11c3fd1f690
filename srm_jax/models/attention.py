"""Grouped-query attention with segment and causal masks: one function on arrays, one linen module."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from srm_jax.models import cache as kv
from srm_jax.models.config import ATTENTION_CHUNK, TransformerConfig
from srm_jax.models.layers import Projection, RMSNorm, rotate
from srm_jax.sharding import constrain

MASKED = -1e30  # finite, so that a row with nothing to attend to stays free of NaN


class Visibility(NamedTuple):
  """Who sees whom: query t sees key s iff segments agree and s <= offset + t.

  query_segments [B, T], key_segments [B, S], offset: slot of the first query.
  """

  query_segments: jax.Array
  key_segments: jax.Array
  offset: jax.Array | int


def _scores(queries, keys, visible: Visibility):
  """Masked float32 scores: queries [B, T, K, G, D], keys [B, K, S, D] -> [B, K, G, T, S]."""
  scores = jnp.einsum('btkgd,bksd->bkgts', queries, keys, preferred_element_type=jnp.float32)
  slots = jnp.arange(keys.shape[2])
  causal = slots[None, :] <= visible.offset + jnp.arange(queries.shape[1])[:, None]
  same = visible.query_segments[:, :, None] == visible.key_segments[:, None, :]
  return jnp.where((causal[None] & same)[:, None, None], scores, MASKED)


def _attend_block(queries, keys, values, visible: Visibility):
  weights = jax.nn.softmax(_scores(queries, keys, visible), axis=-1)
  return jnp.einsum('bkgts,bksd->btkgd', weights.astype(values.dtype), values)


def attend(queries, keys, values, visible: Visibility):
  """Attention output in the dtype of values.

  softmax(q k / sqrt(D)) v over the visible keys, softmax in float32. Query blocks of ATTENTION_CHUNK are
  recomputed in the backward pass, so that memory stays linear in the length.

  Args:
    queries: [B, T, H, D].
    keys, values: [B, K, S, D], H a multiple of K.
    visible: masks.

  Returns:
    [B, T, H, D].
  """
  batch, length, heads, dim = queries.shape
  grouped = (queries * (1.0 / math.sqrt(dim))).reshape(batch, length, keys.shape[1], heads // keys.shape[1], dim)
  if length <= ATTENTION_CHUNK or length % ATTENTION_CHUNK:
    return _attend_block(grouped, keys, values, visible).reshape(queries.shape)
  blocks = length // ATTENTION_CHUNK

  @jax.checkpoint
  def block(start):
    part = jax.lax.dynamic_slice_in_dim(grouped, start, ATTENTION_CHUNK, axis=1)
    segments = jax.lax.dynamic_slice_in_dim(visible.query_segments, start, ATTENTION_CHUNK, axis=1)
    seen = Visibility(segments, visible.key_segments, visible.offset + start)
    return _attend_block(part, keys, values, seen)

  out = jax.lax.map(block, jnp.arange(blocks) * ATTENTION_CHUNK)  # [blocks, B, chunk, K, G, D]
  return jnp.moveaxis(out, 0, 1).reshape(queries.shape)


def attention_weights(queries, keys, visible: Visibility):
  """The softmax itself, for attention distillation: -> [B, H, T, S] float32."""
  batch, length, heads, dim = queries.shape
  grouped = (queries * (1.0 / math.sqrt(dim))).reshape(batch, length, keys.shape[1], heads // keys.shape[1], dim)
  weights = jax.nn.softmax(_scores(grouped, keys, visible), axis=-1)
  return weights.reshape(batch, heads, length, keys.shape[2])


class Attention(nn.Module):
  """Grouped-query self-attention.

  Reference: Ainslie et al., GQA, arXiv:2305.13245.
  """

  config: TransformerConfig

  @nn.compact
  def __call__(self, x, angles, visible: Visibility, layer_cache=None, taps=()):
    """x [B, T, D] -> (y [B, T, D], new layer cache or None, {tap: array}).

    layer_cache is (keys, values, index): the new keys go to slot `index`, and attention runs over the whole buffer.
    """
    c = self.config

    def heads(name, count, axis):
      shape, axes = (c.embed_dim, count, c.head_dim), ('embed', axis, 'head_dim')
      return Projection(c, shape, axes, bias=c.qkv_bias, name=name)(x)

    q, k, v = heads('q', c.num_heads, 'heads'), heads('k', c.num_kv_heads, 'kv_heads'), heads('v', c.num_kv_heads, 'kv_heads')
    if c.qk_norm:
      q, k = RMSNorm(c, name='q_norm')(q), RMSNorm(c, name='k_norm')(k)
    q, k = rotate(q, angles), rotate(k, angles)
    seen = {'q': q, 'k': k, 'v': v}
    q = constrain(q, 'batch', 'time', 'act_heads', None)
    keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    if layer_cache is not None:
      buffers, index = layer_cache[:2], layer_cache[2]
      keys, values = kv.write(buffers[0], keys, index), kv.write(buffers[1], values, index)
      layer_cache = (keys, values)
    if 'attention' in taps:
      seen['attention'] = attention_weights(q, keys, visible)
    out = attend(q, keys, values, visible)
    y = Projection(c, (c.num_heads, c.head_dim, c.embed_dim), ('heads', 'head_dim', 'embed'), contract=2, name='out')(out)
    return y, layer_cache, {name: seen[name] for name in taps if name in seen}
