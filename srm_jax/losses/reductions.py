"""From per-token values and a mask to `Mean(total, count)`, a mean that is not divided yet.

  name                       total                       count               used by
  token_mean                 sum_i sum_t m v             sum_i |o_i|         DAPO, SFT, distillation
  sequence_mean_token_mean   sum_i (sum_t m v) / |o_i|   rows                GRPO, GSPO
  fixed_length               sum_i sum_t m v             max_length * rows   Dr. GRPO

|o_i| = sum_t m_it, and rows is the number of rows with |o_i| > 0: a row that only fills the batch counts nowhere.
Totals and counts both add over microbatches, devices and hosts. `DENOMINATORS` computes the same count from the mask
alone, with the same options, so a train step knows the count of the global batch before it splits it, and the loss is
the sum of the microbatches' totals over that count. The last two need one sequence a row. No count is floored: a batch
without a token is for the caller to refuse.
"""

import chex
import jax.numpy as jnp

from srm_jax.types import Mean


def token_mean(values, mask):
  """Every token weighs alike, so a long completion weighs more.

  sum_i sum_t m v / sum_i |o_i|

  Args:
    values: [B, T].
    mask: [B, T], 1 on tokens that count.

  Returns:
    Mean of float32 scalars; count is `count_tokens(mask)`.

  Raises:
    AssertionError: if the shapes are not equal [B, T].

  Reference: Yu et al., DAPO: An Open-Source LLM Reinforcement Learning System at Scale, arXiv 2503.14476.
  """
  return Mean(jnp.sum(_row_sums(values, mask)), count_tokens(mask))


def sequence_mean_token_mean(values, mask):
  """Every sequence weighs alike, so a token of a long completion weighs less.

  sum_i (1 / |o_i|) sum_t m v / rows

  Args:
    values: [B, T], one sequence a row.
    mask: [B, T], 1 on tokens that count.

  Returns:
    Mean of float32 scalars; count is `count_sequences(mask)`.

  Raises:
    AssertionError: if the shapes are not equal [B, T].

  Reference: Shao et al., DeepSeekMath, arXiv 2402.03300.
  """
  sums = _row_sums(values, mask)
  return Mean(jnp.sum(sums / jnp.maximum(_lengths(mask), 1)), count_sequences(mask))


def fixed_length(values, mask, *, max_length):
  """Every token weighs alike, whatever the lengths in the batch; max_length 1 is the mean of the sequences' sums.

  sum_i sum_t m v / (max_length rows)

  Args:
    values: [B, T], one sequence a row.
    mask: [B, T], 1 on tokens that count.
    max_length: constant of the run, such as the limit on completion tokens; never the width of this batch.

  Returns:
    Mean of float32 scalars; count is `count_fixed_length(mask, max_length=max_length)`.

  Raises:
    AssertionError: if the shapes are not equal [B, T].
    ValueError: if max_length is not positive.

  Reference: Liu et al., Understanding R1-Zero-Like Training: A Critical Perspective, arXiv 2503.20783.
  """
  return Mean(jnp.sum(_row_sums(values, mask)), count_fixed_length(mask, max_length=max_length))


def count_tokens(mask):
  """Tokens that count: [B, T] -> float32 scalar."""
  return jnp.sum(_lengths(mask))


def count_sequences(mask):
  """Rows with at least one token that counts: [B, T] -> float32 scalar."""
  return jnp.sum(_lengths(mask) > 0).astype(jnp.float32)


def count_fixed_length(mask, *, max_length):
  """max_length times the rows with at least one token that counts: [B, T] -> float32 scalar."""
  if max_length <= 0:
    raise ValueError(f'max_length {max_length} of fixed_length must be positive; use the limit on completion tokens')
  return max_length * count_sequences(mask)


def _lengths(mask):
  chex.assert_rank(mask, 2)
  return jnp.sum(mask.astype(jnp.float32), axis=-1)


def _row_sums(values, mask):
  """sum_t m v: [B, T] -> float32 [B]; selected before multiplied, since 0 times NaN is NaN."""
  chex.assert_rank([values, mask], 2)
  chex.assert_equal_shape([values, mask])
  weights = mask.astype(jnp.float32)
  return jnp.sum(jnp.where(weights > 0, values.astype(jnp.float32), 0.0) * weights, axis=-1)


REDUCTIONS = {
    'token_mean': token_mean,
    'sequence_mean_token_mean': sequence_mean_token_mean,
    'fixed_length': fixed_length,
}

# The same names and options: fn(mask [B, T], ...) -> count.
DENOMINATORS = {
    'token_mean': count_tokens,
    'sequence_mean_token_mean': count_sequences,
    'fixed_length': count_fixed_length,
}
