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


def _reference(queries, keys, values, query_segments, key_segments, offset):
  """One query at a time, head h with key head h // G."""
  out, weights = np.zeros(queries.shape), np.zeros((B, H, T, keys.shape[2]))
  for b, t, h in np.ndindex(B, T, H):
    seen = [s for s in range(keys.shape[2]) if s <= offset + t and key_segments[b, s] == query_segments[b, t]]
    scores = np.array([np.dot(queries[b, t, h], keys[b, h // (H // K), s]) for s in seen]) / np.sqrt(D)
    weights[b, h, t, seen] = np.exp(scores) / np.exp(scores).sum()
    out[b, t, h] = weights[b, h, t] @ values[b, h // (H // K)]
  return out, weights


def _dense(queries, keys, values, visible):
  """The same by plain operations, for automatic differentiation."""
  weights = attention.attention_weights(queries, keys, visible)
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


def test_bfloat16_stays_near_float32():
  visible = Visibility(SEGMENTS, SEGMENTS, 0)
  exact = _value_and_gradients(attention.attend, *_arrays(), visible)
  rounded = _value_and_gradients(attention.attend, *_arrays(dtype=jnp.bfloat16), visible)
  for ours, theirs in zip(jax.tree.leaves(rounded), jax.tree.leaves(exact), strict=True):
    assert ours.dtype == jnp.bfloat16
    assert float(jnp.linalg.norm(ours.astype(jnp.float32) - theirs) / jnp.linalg.norm(theirs)) < 0.02
