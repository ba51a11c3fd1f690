"""From tokens to groups of tokens that spell the same bytes, where student and teacher cut text differently.

`data.alignment` finds the groups: per-token arrays [B, T] carry a group number at each position that predicts a token
of the group, -1 elsewhere. Per-group arrays are [B, G], with a mask of the groups that exist, and are reduced as
per-token ones are (`losses.reductions`). The log-probability of a whole group is a sum over its tokens, so likelihoods
can be matched as they are: `CHUNK_LOSSES`. What compares distributions is in `losses.cross_tokenizer`.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from srm_jax.losses import divergences
from srm_jax.losses.kl_penalty import k2, k3

_SMALLEST_GAP = 1e-6  # between a log-probability and 0: a chunk that is certain must have a finite gradient


class ChunkLogprobs(NamedTuple):
  """Log-probabilities per group, float32 [B, G]: of all its tokens, and of those after the first; 0 where empty."""

  whole: jax.Array
  later: jax.Array


def first_positions(groups, *, num_groups):
  """The position that predicts the first token of each group: int [B, T] -> int32 [B, G], 0 where there is none."""
  chex.assert_rank(groups, 2)
  time = groups.shape[1]
  positions = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), groups.shape)
  first = jax.vmap(lambda values, ids: jnp.full(num_groups, time, jnp.int32).at[ids].min(values, mode='drop'))
  found = first(positions, _dropping(groups, num_groups))
  return jnp.where(found < time, found, 0)


def at_first_positions(values, groups, *, num_groups):
  """Values where the first token of each group is predicted: [B, T, D], int [B, T] -> [B, G, D]."""
  first = first_positions(groups, num_groups=num_groups)
  return jnp.take_along_axis(values, first[..., None], axis=1)


def chunk_logprobs(logprobs, groups, *, num_groups):
  """Log-probability of each group.

  whole_g = sum_{t in g} log p(x_t | x_<t),  later_g = the same without the first token of g

  Args:
    logprobs: [B, T] of the tokens that the positions predict.
    groups: int [B, T], -1 where the token is in no group.
    num_groups: G.

  Returns:
    ChunkLogprobs of float32 [B, G].

  Raises:
    AssertionError: if the shapes are not equal [B, T].
  """
  chex.assert_equal_shape([logprobs, groups])
  ids = _dropping(groups, num_groups)
  first = first_positions(groups, num_groups=num_groups)
  is_first = jnp.arange(groups.shape[1])[None] == jnp.take_along_axis(first, jnp.clip(groups, 0), axis=1)
  logprobs = logprobs.astype(jnp.float32)
  total = jax.vmap(lambda values, ids: jnp.zeros(num_groups, jnp.float32).at[ids].add(values, mode='drop'))
  return ChunkLogprobs(total(logprobs, ids), total(jnp.where(is_first, 0.0, logprobs), ids))


def to_tokens(values, groups):
  """The value of its group at every position, 0 outside groups: [B, G], int [B, T] -> [B, T]."""
  spread = jnp.take_along_axis(values, jnp.clip(groups, 0), axis=1)
  return jnp.where(groups >= 0, spread, jnp.zeros((), values.dtype))


def _dropping(groups, num_groups):
  """-1 as an index behind the end: a negative one would count from there."""
  return jnp.where(groups < 0, num_groups, groups)


def binary_kl(student_logprobs, teacher_logprobs, *, temperature=1.0):
  """KL between two coins: does the text go on with this chunk, or with anything else?

  p log(p / q) + (1 - p) log((1 - p) / (1 - q)),  p = p_teacher(chunk)^(1/T), q alike

  At T = 1 it bounds the KL between the two distributions over texts from below, but says little about long chunks,
  which are improbable under both models; T raises their probabilities (the paper takes 100).

  Args:
    student_logprobs, teacher_logprobs: [B, G] of whole groups.
    temperature: T, positive.

  Returns:
    [B, G], float32.

  Raises:
    AssertionError: if the shapes differ.
    ValueError: if the temperature is not positive.

  Reference: Minixhofer, Vulić, Ponti, Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching,
  arXiv 2503.20083.
  """
  chex.assert_equal_shape([student_logprobs, teacher_logprobs])
  if not temperature > 0:
    raise ValueError(f'temperature {temperature} of binary_kl must be positive; 1 leaves the probabilities as they are')
  log_q, log_p = (
      divergences.finite(jnp.minimum(logprobs, 0.0), temperature) - _SMALLEST_GAP
      for logprobs in (student_logprobs, jax.lax.stop_gradient(teacher_logprobs))
  )
  return jnp.exp(log_p) * (log_p - log_q) - jnp.expm1(log_p) * (_log1mexp(log_p) - _log1mexp(log_q))


def _log1mexp(x):
  """log(1 - exp(x)) for x < 0; each branch is exact on its side of log 1/2 and finite on the other."""
  return jnp.where(x < -0.6931472, jnp.log1p(-jnp.exp(x)), jnp.log(-jnp.expm1(x)))


# fn(student_logprobs [B, G], teacher_logprobs [B, G]) -> [B, G]. k2 is half the squared difference. k3 is for groups
# that the student sampled: elsewhere it grows like the teacher's probability over the student's. k1 is no loss (see
# `kl_penalty`), but -k1 of a sampled group is a reward for each of its tokens (`to_tokens`).
CHUNK_LOSSES = {'binary_kl': binary_kl, 'k2': k2, 'k3': k3}
