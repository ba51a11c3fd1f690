"""Attention against a loop over queries in numpy, and its own backward pass against automatic differentiation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.models import attention
from srm_jax.models.attention import Visibility

B, T, H, K, D = 2, 7, 4, 2, 6
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [0, 0, 1, 1, 1, 2, 0]], np.int32)  # packed; padded on both sides


def _arrays(slots=T, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = (B, T, H, D), (B, K, slots, D), (B, K, slots, D), (B, T, H, D)
  return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def _reference(queries, keys, values, query_segments, key_segments, offset, window=100):
  """One query at a time, head h with key head h // G."""
  out, weights = np.zeros(queries.shape), np.zeros((B, H, T, keys.shape[2]))
  for b, t, h in np.ndindex(B, T, H):
    near = range(max(0, offset + t - window + 1), min(offset + t + 1, keys.shape[2]))
    seen = [s for s in near if key_segments[b, s] == query_segments[b, t]]
    scores = np.array([np.dot(queries[b, t, h], keys[b, h // (H // K), s]) for s in seen]) / np.sqrt(D)
    weights[b, h, t, seen] = np.exp(scores) / np.exp(scores).sum()
    out[b, t, h] = weights[b, h, t] @ values[b, h // (H // K)]
  return out, weights


def _dense(queries, keys, values, visible, window=0):
  """The same by plain operations, for automatic differentiation."""
  weights = attention.attention_weights(queries, keys, visible, window=window)
  return jnp.einsum('bhts,bhsd->bthd', weights, jnp.repeat(values, H // K, axis=1))


@functools.partial(jax.jit, static_argnames='attend')
def _value_and_gradients(attend, queries, keys, values, cotangent, visible):
  out, pull = jax.vjp(lambda *args: attend(*args, visible), queries, keys, values)
  return out, pull(cotangent)


def test_attend_and_weights_equal_the_loop():
  queries, keys, values, _ = _arrays()
  visible = Visibility(SEGMENTS, SEGMENTS, 0)
  out, weights = _reference(*map(np.asarray, (queries, keys, values)), SEGMENTS, SEGMENTS, 0)
  np.testing.assert_allclose(attention.attend(queries, keys, values, visible), out, atol=1e-5)
  np.testing.assert_allclose(attention.attention_weights(queries, keys, visible), weights, atol=1e-6)


def test_several_queries_against_a_longer_buffer():
  slots, offset = 12, 3
  queries, keys, values, _ = _arrays(slots)
  key_segments = np.ones((B, slots), np.int32)
  key_segments[0, :2] = 0  # left padding
  query_segments = np.ones((B, T), np.int32)
  expected, _ = _reference(*map(np.asarray, (queries, keys, values)), query_segments, key_segments, offset)
  visible = Visibility(query_segments, key_segments, jnp.asarray(offset))
  np.testing.assert_allclose(attention.attend(queries, keys, values, visible), expected, atol=1e-5)


@pytest.mark.parametrize('offset', [0, 3])
def test_window_and_scale_equal_the_loop(offset):
  """The scale stands for 1/sqrt(D), which the loop divides by: queries are multiplied by what is missing."""
  queries, keys, values, _ = _arrays(T + offset)
  query_segments, key_segments = np.ones((B, T), np.int32), np.ones((B, T + offset), np.int32)
  scaled = np.asarray(queries) * 0.7 * np.sqrt(D)
  expected, weights = _reference(scaled, *map(np.asarray, (keys, values)), query_segments, key_segments, offset, 3)
  visible = Visibility(query_segments, key_segments, jnp.asarray(offset))
  how = dict(window=3, scale=0.7)
  np.testing.assert_allclose(attention.attend(queries, keys, values, visible, **how), expected, atol=1e-5)
  np.testing.assert_allclose(attention.attention_weights(queries, keys, visible, **how), weights, atol=1e-6)


@pytest.mark.parametrize('chunk, window', [(2, 2), (3, 1), (2, 4), (3, 5)])  # two read slices of the keys, two all
@pytest.mark.parametrize('slots', [T, T + 4])
def test_blocks_within_a_window_equal_all_at_once(monkeypatch, chunk, window, slots):
  segments = np.pad(SEGMENTS, ((0, 0), (slots - T, 0)), mode='edge')
  arrays, visible = _arrays(slots), Visibility(SEGMENTS, segments, jnp.asarray(slots - T))
  near = functools.partial(attention.attend, window=window)
  whole = _value_and_gradients(near, *arrays, visible)
  monkeypatch.setattr(attention, 'ATTENTION_CHUNK', chunk)
  blocks = _value_and_gradients(lambda *args: near(*args), *arrays, visible)
  real = (SEGMENTS > 0)[..., None, None]  # padding sees whatever there is
  np.testing.assert_allclose(np.where(real, blocks[0], 0), np.where(real, whole[0], 0), atol=2e-5)


def test_gradients_within_a_window_equal_automatic_differentiation(monkeypatch):
  ones = np.ones((B, T), np.int32)
  arrays, visible = _arrays(), Visibility(ones, ones, 0)
  dense = _value_and_gradients(functools.partial(_dense, window=2), *arrays, visible)
  for chunk in (100, 3):  # all at once; blocks that read slices of the keys
    monkeypatch.setattr(attention, 'ATTENTION_CHUNK', chunk)
    ours = _value_and_gradients(functools.partial(attention.attend, window=2), *arrays, visible)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, dense)


def test_gradients_equal_automatic_differentiation():
  arrays, visible = _arrays(), Visibility(SEGMENTS, SEGMENTS, 0)
  ours, dense = (_value_and_gradients(f, *arrays, visible) for f in (attention.attend, _dense))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, dense)


@pytest.mark.parametrize('chunk', [3, 4])  # neither divides 7
def test_blocks_of_queries_equal_all_at_once(monkeypatch, chunk):
  arrays, visible = _arrays(), Visibility(SEGMENTS, SEGMENTS, 0)
  whole = _value_and_gradients(attention.attend, *arrays, visible)
  monkeypatch.setattr(attention, 'ATTENTION_CHUNK', chunk)
  blocks = _value_and_gradients(lambda *args: attention.attend(*args), *arrays, visible)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), blocks, whole)


def test_a_query_that_sees_nothing_is_finite_and_teaches_nothing():
  queries, keys, values, cotangent = _arrays()
  nobody = Visibility(np.full((B, T), 9, np.int32), SEGMENTS, 0)
  out, gradients = _value_and_gradients(attention.attend, queries, keys, values, 0 * cotangent, nobody)
  assert bool(jnp.isfinite(out).all())
  assert all(float(jnp.abs(leaf).max()) == 0 for leaf in gradients)


@pytest.mark.parametrize('heads', [2, 6])
def test_one_query_in_bfloat16_is_the_last_of_many(heads):
  """A CPU takes another way for it."""
  rng = np.random.default_rng(0)
  queries, keys, values = (
      jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((3, 7, heads, 4), (3, 2, 9, 4), (3, 2, 9, 4))
  )
  segments = jnp.asarray([[1] * 9, [0] * 4 + [1] * 5, [0] * 2 + [1] * 7])
  visible = attention.Visibility(segments[:, 2:], segments, 2)
  last = visible._replace(query_segments=segments[:, -1:], offset=8)
  many = attention.attend(queries, keys, values, visible)[:, -1:]
  one = attention.attend(queries[:, -1:], keys, values, last)
  assert one.dtype == jnp.bfloat16
  np.testing.assert_allclose(one.astype(np.float32), many.astype(np.float32), rtol=2**-7, atol=2**-9)


def test_decoding_in_bfloat16_writes_no_cache_in_float32():
  rows, size = 4, 512
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)
  cache = shape(rows, 2, size, 16)
  ints = jax.ShapeDtypeStruct((rows, size), jnp.int32)

  def token(query, keys, values, segments):
    return attention.attend(query, keys, values, attention.Visibility(segments[:, -1:], segments, size - 1))

  compiled = jax.jit(token).lower(shape(rows, 1, 2, 16), cache, cache, ints).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < rows * 2 * size * 16 * 4


def test_bfloat16_stays_near_float32():
  visible = Visibility(SEGMENTS, SEGMENTS, 0)
  exact = _value_and_gradients(attention.attend, *_arrays(), visible)
  rounded = _value_and_gradients(attention.attend, *_arrays(dtype=jnp.bfloat16), visible)
  for ours, theirs in zip(jax.tree.leaves(rounded), jax.tree.leaves(exact), strict=True):
    assert ours.dtype == jnp.bfloat16
    assert float(jnp.linalg.norm(ours.astype(jnp.float32) - theirs) / jnp.linalg.norm(theirs)) < 0.02
