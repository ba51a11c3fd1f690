"""Distances between what student and teacher tokens attend to, and between how their tokens resemble each other.

A relation of vectors a and b is softmax(a_t . b_s / sqrt(width)) over the keys s that a causal model may see: those of
the same packed segment, up to t itself. With a, b = q, k it is attention; with a = b it is a similarity of tokens,
which asks nothing of the widths of the two models, so neither loss needs a projector.

`RELATIONS` are fn(student QKV, teacher QKV, segment_ids [B, T], *, ..., block) -> [B, T], one layer of each model, to
be minimised under the mask of the caller; 0 on padding (segment 0), whatever it holds. Scores and softmax are float32.
The teacher receives no gradient. Queries run in blocks that the backward pass recomputes: what is alive is
[B, heads, block, T] of both models, never [B, heads, T, T].

Taps are what attention sees, after the rotary embedding. For q with k that is the attention itself. For q with q and k
with k it adds the distance of the tokens to the relation: likewise in both models where rotary base and head size
agree; otherwise the student is asked for a dependence on distance that its own rotation cannot make, and some loss
remains. Values are not rotated. Attention is taken over the whole segment at scale 1 / sqrt(D): of a layer with a
window choose another, and scale the q of a model with another factor before.
"""

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

# Finite, so that a row with nothing to see stays free of NaN.
_MASKED = -1e30


class QKV(NamedTuple):
  """One layer's taps: q [B, T, H, D], k and v [B, T, K, D], H a multiple of K."""

  q: Any
  k: Any
  v: Any


def minilm(student, teacher, segment_ids, *, block=256):
  """Attention and value relation of the last layer, head by head; student and teacher have equally many heads.

  mean_h KL(A^T_h || A^S_h) + mean_h KL(R^T_h || R^S_h),  A = softmax(q k / sqrt(D)),  R = softmax(v v / sqrt(D))

  Key heads are repeated for the query heads that share them, so their number may differ.

  Args:
    student: QKV of the student's last layer.
    teacher: QKV of the teacher's last layer.
    segment_ids: int [B, T], 0 on padding.
    block: queries at a time.

  Returns:
    [B, T] divergence per token, float32.

  Raises:
    AssertionError: if the shapes do not fit.
    ValueError: if the numbers of query heads differ, or block is not positive.

  Reference: Wang et al., MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained
  Transformers, arXiv 2002.10957.
  """
  _check(student, teacher, segment_ids, block)
  heads = student.q.shape[2]
  if heads != teacher.q.shape[2]:
    raise ValueError(
        f'minilm compares attention head by head, but the student has {heads} heads and the teacher '
        f'{teacher.q.shape[2]}; choose minilm_v2, whose relation heads are made to agree'
    )
  student, teacher = ([_repeated(x, heads) for x in model] for model in (student, teacher))
  pairs = [((student[i], student[j]), (teacher[i], teacher[j])) for i, j in ((0, 1), (2, 2))]
  return _divergence(pairs, segment_ids, block)


def minilm_v2(student, teacher, segment_ids, *, relation_heads, block=256):
  """Query, key and value relations in equally many relation heads, whatever heads the two models have.

  sum_{x in q, k, v} mean_r KL(R^T_xr || R^S_xr),  R_xr = softmax(x_r x_r / sqrt(width of x_r))

  The heads of each tap are concatenated and split again into relation heads; more of them than attention heads was
  better in the paper (48 and 64), which takes an upper, not the last, layer of a large teacher.

  Args:
    student: QKV of one layer of the student.
    teacher: QKV of one layer of the teacher.
    segment_ids: int [B, T], 0 on padding.
    relation_heads: a divisor of heads times head size of every tap of both models.
    block: queries at a time.

  Returns:
    [B, T] divergence per token, float32.

  Raises:
    AssertionError: if the shapes do not fit.
    ValueError: if relation_heads does not divide a tap's width, or block is not positive.

  Reference: Wang et al., MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained
  Transformers, arXiv 2012.15828.
  """
  _check(student, teacher, segment_ids, block)
  student, teacher = ([_resplit(x, relation_heads) for x in model] for model in (student, teacher))
  return _divergence([((s, s), (t, t)) for s, t in zip(student, teacher)], segment_ids, block)


def _divergence(pairs, segment_ids, block):
  """Sum over pairs of the mean over heads of KL(teacher's relation || student's): [B, T].

  pairs: of ((queries, keys) of the student, (queries, keys) of the teacher), each [B, T, heads, width].
  """
  # Padding may hold anything, and a masked score of NaN still has a gradient of NaN. As zeros it is alike in both.
  clean = lambda x: jnp.where((segment_ids > 0)[..., None, None], x, jnp.zeros((), x.dtype))
  pairs = [(jax.tree.map(clean, s), jax.tree.map(lambda x: jax.lax.stop_gradient(clean(x)), t)) for s, t in pairs]
  length = segment_ids.shape[1]
  block = min(block, length)
  starts = jnp.arange(0, length, block)
  queries = jax.tree.map(lambda x: _blocks(x, block), ([(s[0], t[0]) for s, t in pairs], segment_ids))
  keys = [(s[1], t[1]) for s, t in pairs]

  @jax.checkpoint
  def step(block_of):
    start, (block_queries, query_segments) = block_of
    visible = _visible(start, query_segments, segment_ids)
    return sum(_relation_kl(q, k, visible) for q, k in zip(block_queries, keys))

  values = jax.lax.map(step, (starts, queries))  # [blocks, B, block]
  return jnp.moveaxis(values, 0, 1).reshape(segment_ids.shape[0], -1)[:, :length]


def _relation_kl(queries, keys, visible):
  """Mean over heads of KL(teacher || student), (student, teacher) of [B, block, H, D] and [B, T, H, D]: [B, block]."""
  student, teacher = (_log_relation(q, k, visible) for q, k in zip(queries, keys))
  return jnp.mean(jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1), axis=1)


def _log_relation(queries, keys, visible):
  """log softmax of scaled products over the visible keys: float32 [B, H, block, T]."""
  scores = jnp.einsum('bthd,bshd->bhts', queries, keys, preferred_element_type=jnp.float32)
  scores = scores / math.sqrt(queries.shape[-1])
  return jax.nn.log_softmax(jnp.where(visible[:, None], scores, _MASKED))


def _visible(start, query_segments, key_segments):
  """Which keys each query of a block sees: bool [B, block, T]."""
  near = jnp.arange(key_segments.shape[1])[None, :] <= start + jnp.arange(query_segments.shape[1])[:, None]
  return near[None] & (query_segments[:, :, None] == key_segments[:, None, :])


def _blocks(x, block):
  """[B, T, ...] -> [blocks, B, block, ...], filled up with zeros, which are padding."""
  missing = -x.shape[1] % block
  x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
  return jnp.moveaxis(x.reshape((x.shape[0], -1, block) + x.shape[2:]), 1, 0)


def _repeated(x, heads):
  """[B, T, K, D] -> [B, T, heads, D]: head h takes key head h // (heads / K)."""
  return jnp.repeat(x, heads // x.shape[2], axis=2)


def _resplit(x, relation_heads):
  """[B, T, H, D] -> [B, T, relation_heads, H D / relation_heads]."""
  width = x.shape[2] * x.shape[3]
  if relation_heads < 1 or width % relation_heads:
    raise ValueError(
        f'relation_heads {relation_heads} of minilm_v2 does not divide the width {width} of a tap with {x.shape[2]} '
        f'heads of size {x.shape[3]}; choose a common divisor of the widths of q, k and v of both models'
    )
  return x.reshape(x.shape[:2] + (relation_heads, width // relation_heads))


def _check(student, teacher, segment_ids, block):
  chex.assert_rank([*student, *teacher, segment_ids], [4] * 6 + [2])
  chex.assert_equal_shape_prefix([*student, *teacher, segment_ids], 2)
  for model in (student, teacher):
    chex.assert_equal_shape([model.k, model.v])
    chex.assert_is_divisible(model.q.shape[2], model.k.shape[2])
    chex.assert_axis_dimension(model.k, 3, model.q.shape[3])
  if block < 1:
    raise ValueError(f'block {block} of a relation must be at least one query')


RELATIONS = {'minilm': minilm, 'minilm_v2': minilm_v2}
