"""Grouped-query attention with segment, causal and window masks: one function on arrays, one linen module."""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from srm_jax.models import cache as kv
from srm_jax.models.config import ATTENTION_CHUNK, TransformerConfig
from srm_jax.models.layers import Projection, RMSNorm
from srm_jax.models.rope import Angles, rotate
from srm_jax.sharding import constrain

MASKED = -1e30  # finite, so that a row with nothing to attend to stays free of NaN


class Visibility(NamedTuple):
  """Who sees whom: query t sees key s iff segments agree and s <= offset + t (and > offset + t - window).

  query_segments [B, T], key_segments [B, S], offset: slot of the first query.
  """

  query_segments: jax.Array
  key_segments: jax.Array
  offset: jax.Array | int


class Branches(NamedTuple):
  """Who sees whom where a row is a trunk of W slots and N branches of T slots behind it: a branch sees the trunk and
  itself, not the others.

  trunk: of [P, W] queries. branch: of [P N, T] queries, whose keys are the trunk's and their own, [P N, W + T].
  """

  trunk: Visibility
  branch: Visibility


def branched(segment_ids, trunk: int, branches: int) -> Branches:
  """Of rows [P, W + N T]."""
  first, rest = segment_ids[:, :trunk], segment_ids[:, trunk:]
  own = rest.reshape(-1, rest.shape[1] // branches)
  keys = jnp.concatenate([jnp.repeat(first, branches, axis=0), own], axis=1)
  return Branches(Visibility(first, first, 0), Visibility(own, keys, trunk))


def _product(equation, *operands):
  return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _of_queries(equation, left, cached, *, summed: int):
  """`_product` of what queries have, [B, K, G, T, n], and a cache [B, K, S, D], summed over that axis of it.

  A CPU has no batched products of bfloat16. For one query it would write the whole cache out in float32, token by
  token; a loop converts what it reads.
  """

  def loop(left, cached):
    wide = jnp.expand_dims(left, -3 - summed).astype(jnp.float32)
    return jnp.sum(wide * cached[:, :, None, None].astype(jnp.float32), axis=summed)

  product = functools.partial(_product, equation)
  if left.shape[3] > 1 or left.dtype == jnp.float32:
    return product(left, cached)
  return jax.lax.platform_dependent(left, cached, cpu=loop, default=product)


def _group(queries, kv_heads: int, scale: float):
  """Scaled queries by key head, batch axes first: [B, T, H, D] -> [B, K, G, T, D], head h to group h // G."""
  batch, length, heads, dim = queries.shape
  scaled = queries * (scale or 1.0 / math.sqrt(dim))
  return jnp.transpose(scaled.reshape(batch, length, kv_heads, heads // kv_heads, dim), (0, 2, 3, 1, 4))


def _scores(queries, keys, visible: Visibility, window: int):
  """Masked float32 scores: queries [B, K, G, T, D], keys [B, K, S, D] -> [B, K, G, T, S]."""
  scores = _of_queries('bkgtd,bksd->bkgts', queries, keys, summed=-1)
  slot = visible.offset + jnp.arange(queries.shape[3])[:, None]
  key_slot = jnp.arange(keys.shape[2])[None, :]
  near = key_slot <= slot
  if window:
    near &= key_slot > slot - window
  same = visible.query_segments[:, :, None] == visible.key_segments[:, None, :]
  return jnp.where((near[None] & same)[:, None, None], scores, MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(queries, keys, values, visible: Visibility, window: int):
  """queries [B, K, G, T, D], keys and values [B, K, S, D] -> [B, K, G, T, D].

  The backward pass recomputes the weights from one number a query, so that no [T, S] array outlives a layer.
  Reference: Dao et al., FlashAttention, arXiv:2205.14135 (the recomputation, without the tiling).
  """
  return _attend_forward(queries, keys, values, visible, window)[0]


def _attend_forward(queries, keys, values, visible, window):
  scores = _scores(queries, keys, visible, window)
  largest = jnp.max(scores, axis=-1, keepdims=True)
  weights = jnp.exp(scores - largest)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  weighted = _of_queries('bkgts,bksd->bkgtd', weights.astype(values.dtype), values, summed=-2)
  out = (weighted / total).astype(values.dtype)
  return out, (queries, keys, values, visible, out, largest + jnp.log(total))


def _attend_backward(window, residuals, dout):
  queries, keys, values, visible, out, normalizer = residuals
  weights = jnp.exp(_scores(queries, keys, visible, window) - normalizer)
  dvalues = _product('bkgts,bkgtd->bksd', weights.astype(values.dtype), dout)
  dweights = _product('bkgtd,bksd->bkgts', dout, values)
  # sum_s weights * dweights, from the output: one number a query.
  mean = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
  dscores = (weights * (dweights - mean)).astype(queries.dtype)
  dqueries = _product('bkgts,bksd->bkgtd', dscores, keys)
  dkeys = _product('bkgts,bkgtd->bksd', dscores, queries)
  return dqueries.astype(queries.dtype), dkeys.astype(keys.dtype), dvalues.astype(values.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def attend(queries, keys, values, visible: Visibility | Branches, *, window: int = 0, scale: float = 0.0):
  """Attention output in the dtype of values.

  softmax(scale q k) v over the visible keys, softmax in float32. More than ATTENTION_CHUNK queries run in blocks of
  that size, forward and backward, so that memory stays linear in the length; within a window a block reads only the
  keys that it can see.

  Args:
    queries: [B, T, H, D].
    keys, values: [B, K, S, D], H a multiple of K.
    visible: masks.
    window: how many keys a query sees, itself included; 0 for all before it.
    scale: of the products; 0 for 1/sqrt(D).

  Returns:
    [B, T, H, D].
  """
  if isinstance(visible, Branches):
    return _attend_branches(queries, keys, values, visible, window=window, scale=scale)
  length = queries.shape[1]
  grouped = _group(queries, keys.shape[1], scale)
  if length <= ATTENTION_CHUNK:
    out = _attend(grouped, keys, values, visible, window)
  else:
    out = _attend_in_blocks(grouped, keys, values, visible, window)[..., :length, :]
  return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(queries.shape)


def _attend_branches(queries, keys, values, visible: Branches, **how):
  """The trunk among itself, then every branch as a row of its own that has the trunk's keys before its own."""
  rows, length = visible.trunk.query_segments.shape
  branches = visible.branch.query_segments.shape[0] // rows

  def own(x, axis):  # the branches' part of x, [P N, ...] with T slots on that axis
    rest = jax.lax.slice_in_dim(x, length, None, axis=axis)
    split = rest.reshape(*rest.shape[:axis], branches, -1, *rest.shape[axis + 1 :])
    return jnp.moveaxis(split, axis, 1).reshape(rows * branches, *x.shape[1:axis], -1, *x.shape[axis + 1 :])

  def extended(x):
    longer = jnp.concatenate([jnp.repeat(x[:, :, :length], branches, axis=0), own(x, 2)], axis=2)
    return constrain(longer, 'batch', 'act_heads', None, None)

  trunk = attend(queries[:, :length], keys[:, :, :length], values[:, :, :length], visible.trunk, **how)
  own_queries = constrain(own(queries, 1), 'batch', 'time', 'act_heads', None)
  branch = attend(own_queries, extended(keys), extended(values), visible.branch, **how)
  together = jnp.concatenate([trunk, branch.reshape(rows, -1, *queries.shape[2:])], axis=1)
  return constrain(together, 'batch', 'time', 'act_heads', None)


def _attend_in_blocks(queries, keys, values, visible: Visibility, window: int):
  """`_attend` by blocks of queries; the last block is filled up with queries that nobody reads."""
  blocks = math.ceil(queries.shape[3] / ATTENTION_CHUNK)
  missing = blocks * ATTENTION_CHUNK - queries.shape[3]
  queries = _pad(queries, 3, 0, missing)
  query_segments = _pad(visible.query_segments, 1, 0, missing)
  near = window and window + ATTENTION_CHUNK < keys.shape[2]
  if near:  # slot s moves to s + window, so that every block's keys are a slice of one length
    keys, values = (_pad(x, 2, window, ATTENTION_CHUNK) for x in (keys, values))
    visible = visible._replace(key_segments=_pad(visible.key_segments, 1, window, ATTENTION_CHUNK))

  @jax.checkpoint
  def block(start):
    part = jax.lax.dynamic_slice_in_dim(queries, start, ATTENTION_CHUNK, axis=3)
    segments = jax.lax.dynamic_slice_in_dim(query_segments, start, ATTENTION_CHUNK, axis=1)
    seen, offset = (keys, values, visible.key_segments), visible.offset + start
    if near:
      size = window + ATTENTION_CHUNK
      seen = [jax.lax.dynamic_slice_in_dim(x, offset, size, axis=axis) for x, axis in zip(seen, (2, 2, 1))]
      offset = window
    return _attend(part, seen[0], seen[1], Visibility(segments, seen[2], offset), window)

  out = jax.lax.map(block, jnp.arange(blocks) * ATTENTION_CHUNK)  # [blocks, B, K, G, chunk, D]
  return jnp.moveaxis(out, 0, 3).reshape(queries.shape)


def _pad(x, axis: int, before: int, after: int):
  widths = [(0, 0)] * x.ndim
  widths[axis] = (before, after)
  return jnp.pad(x, widths)


def attention_weights(queries, keys, visible: Visibility, *, window: int = 0, scale: float = 0.0):
  """The softmax itself, for attention distillation: -> [B, H, T, S] float32; window and scale as in `attend`."""
  batch, length, heads, _ = queries.shape
  weights = jax.nn.softmax(_scores(_group(queries, keys.shape[1], scale), keys, visible, window), axis=-1)
  return weights.reshape(batch, heads, length, keys.shape[2])


class Attention(nn.Module):
  """Grouped-query self-attention; kind is the layer's letter in config.pattern.

  Reference: Ainslie et al., GQA, arXiv:2305.13245.
  """

  config: TransformerConfig
  kind: str = 'g'

  @nn.compact
  def __call__(self, x, angles: Angles | None, visible: Visibility, layer_cache=None, taps=()):
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
    how = dict(window=c.window if self.kind == 'l' else 0, scale=c.query_scale)
    if 'attention' in taps:
      seen['attention'] = attention_weights(q, keys, visible, **how)
    out = attend(q, keys, values, visible, **how)
    shape, axes = (c.num_heads, c.head_dim, c.embed_dim), ('heads', 'head_dim', 'embed')
    y = Projection(c, shape, axes, contract=2, name='out')(out)
    return y, layer_cache, {name: seen[name] for name in taps if name in seen}
