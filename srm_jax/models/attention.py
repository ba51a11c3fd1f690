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


def _product(equation, *operands):
  return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _group(queries, kv_heads: int):
  """Scaled queries by key head, batch axes first: [B, T, H, D] -> [B, K, G, T, D], head h to group h // G."""
  batch, length, heads, dim = queries.shape
  scaled = queries * (1.0 / math.sqrt(dim))
  return jnp.transpose(scaled.reshape(batch, length, kv_heads, heads // kv_heads, dim), (0, 2, 3, 1, 4))


def _scores(queries, keys, visible: Visibility):
  """Masked float32 scores: queries [B, K, G, T, D], keys [B, K, S, D] -> [B, K, G, T, S]."""
  scores = _product('bkgtd,bksd->bkgts', queries, keys)
  causal = jnp.arange(keys.shape[2])[None, :] <= visible.offset + jnp.arange(queries.shape[3])[:, None]
  same = visible.query_segments[:, :, None] == visible.key_segments[:, None, :]
  return jnp.where((causal[None] & same)[:, None, None], scores, MASKED)


@jax.custom_vjp
def _attend(queries, keys, values, visible: Visibility):
  """queries [B, K, G, T, D], keys and values [B, K, S, D] -> [B, K, G, T, D].

  The backward pass recomputes the weights from one number a query, so that no [T, S] array outlives a layer.
  Reference: Dao et al., FlashAttention, arXiv:2205.14135 (the recomputation, without the tiling).
  """
  return _attend_forward(queries, keys, values, visible)[0]


def _attend_forward(queries, keys, values, visible):
  scores = _scores(queries, keys, visible)
  largest = jnp.max(scores, axis=-1, keepdims=True)
  weights = jnp.exp(scores - largest)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  out = (_product('bkgts,bksd->bkgtd', weights.astype(values.dtype), values) / total).astype(values.dtype)
  return out, (queries, keys, values, visible, out, largest + jnp.log(total))


def _attend_backward(residuals, dout):
  queries, keys, values, visible, out, normalizer = residuals
  weights = jnp.exp(_scores(queries, keys, visible) - normalizer)
  dvalues = _product('bkgts,bkgtd->bksd', weights.astype(values.dtype), dout)
  dweights = _product('bkgtd,bksd->bkgts', dout, values)
  # sum_s weights * dweights, from the output: one number a query.
  mean = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
  dscores = (weights * (dweights - mean)).astype(queries.dtype)
  dqueries = _product('bkgts,bksd->bkgtd', dscores, keys)
  dkeys = _product('bkgts,bkgtd->bksd', dscores, queries)
  return dqueries.astype(queries.dtype), dkeys.astype(keys.dtype), dvalues.astype(values.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def attend(queries, keys, values, visible: Visibility):
  """Attention output in the dtype of values.

  softmax(q k / sqrt(D)) v over the visible keys, softmax in float32. More than ATTENTION_CHUNK queries run in blocks
  of that size, forward and backward, so that memory stays linear in the length.

  Args:
    queries: [B, T, H, D].
    keys, values: [B, K, S, D], H a multiple of K.
    visible: masks.

  Returns:
    [B, T, H, D].
  """
  length = queries.shape[1]
  grouped = _group(queries, keys.shape[1])
  if length <= ATTENTION_CHUNK:
    out = _attend(grouped, keys, values, visible)
  else:
    out = _attend_in_blocks(grouped, keys, values, visible)[..., :length, :]
  return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(queries.shape)


def _attend_in_blocks(queries, keys, values, visible: Visibility):
  """`_attend` by blocks of queries; the last block is filled up with queries that nobody reads."""
  blocks = math.ceil(queries.shape[3] / ATTENTION_CHUNK)
  missing = blocks * ATTENTION_CHUNK - queries.shape[3]
  queries = jnp.pad(queries, ((0, 0), (0, 0), (0, 0), (0, missing), (0, 0)))
  query_segments = jnp.pad(visible.query_segments, ((0, 0), (0, missing)))

  @jax.checkpoint
  def block(start):
    part = jax.lax.dynamic_slice_in_dim(queries, start, ATTENTION_CHUNK, axis=3)
    segments = jax.lax.dynamic_slice_in_dim(query_segments, start, ATTENTION_CHUNK, axis=1)
    return _attend(part, keys, values, Visibility(segments, visible.key_segments, visible.offset + start))

  out = jax.lax.map(block, jnp.arange(blocks) * ATTENTION_CHUNK)  # [blocks, B, K, G, chunk, D]
  return jnp.moveaxis(out, 0, 3).reshape(queries.shape)


def attention_weights(queries, keys, visible: Visibility):
  """The softmax itself, for attention distillation: -> [B, H, T, S] float32."""
  batch, length, heads, _ = queries.shape
  weights = jax.nn.softmax(_scores(_group(queries, keys.shape[1]), keys, visible), axis=-1)
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

    q = heads('q', c.num_heads, 'heads')
    k, v = heads('k', c.num_kv_heads, 'kv_heads'), heads('v', c.num_kv_heads, 'kv_heads')
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
    shape, axes = (c.num_heads, c.head_dim, c.embed_dim), ('heads', 'head_dim', 'embed')
    y = Projection(c, shape, axes, contract=2, name='out')(out)
    return y, layer_cache, {name: seen[name] for name in taps if name in seen}
