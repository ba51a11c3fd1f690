"""Reductions over the vocabulary axis, whole on one device or split over a mesh axis.

Losses see logits `[..., V]`. Inside `shard_map` V is the local slice and `axis_name` names the mesh axis that splits
it; with `axis_name=None` these are the plain reductions. Only per-token scalars cross the mesh axis.
"""

import jax
import jax.numpy as jnp


def vocab_sum(values, *, axis_name=None):
  """Sum over the last axis: [..., V] -> [...]."""
  total = jnp.sum(values, axis=-1)
  return total if axis_name is None else jax.lax.psum(total, axis_name)


def vocab_max(values, *, axis_name=None):
  """Maximum over the last axis, without gradient: [..., V] -> [...]."""
  largest = jnp.max(jax.lax.stop_gradient(values), axis=-1)
  return largest if axis_name is None else jax.lax.pmax(largest, axis_name)


def log_normalizer(logits, *, axis_name=None):
  """log sum exp over the vocabulary in float32: [..., V] -> [...]."""
  logits = logits.astype(jnp.float32)
  largest = vocab_max(logits, axis_name=axis_name)
  return largest + jnp.log(vocab_sum(jnp.exp(logits - largest[..., None]), axis_name=axis_name))


def log_softmax(logits, *, axis_name=None):
  """Log-probabilities in float32: [..., V] -> [..., V]."""
  return logits.astype(jnp.float32) - log_normalizer(logits, axis_name=axis_name)[..., None]


def vocab_ids(logits, *, axis_name=None):
  """Global vocabulary ids of the local slice: [..., V] -> int32 [V]."""
  size = logits.shape[-1]
  start = 0 if axis_name is None else jax.lax.axis_index(axis_name) * size
  return start + jnp.arange(size, dtype=jnp.int32)


def select(values, targets, *, axis_name=None):
  """values[..., targets] as a masked sum over an iota: [..., V], int [...] -> [...].

  Never `take_along_axis`: on a split vocabulary that gathers the whole row.
  """
  ids = vocab_ids(values, axis_name=axis_name)
  ids = jnp.reshape(ids, (1,) * targets.ndim + ids.shape)
  chosen = jnp.where(ids == targets[..., None], values, jnp.zeros((), values.dtype))
  return vocab_sum(chosen, axis_name=axis_name)
