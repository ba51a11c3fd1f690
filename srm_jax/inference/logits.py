"""From logits to tokens: temperature, truncation, sampling, and the keys that make sampling reproducible.

A token depends on (seed, prompt id, sample, position) and on its logits, never on the row, batch or host it was
computed in. One uniform number a row picks it by inverting the cumulative distribution: a Gumbel draw would need one
random number per vocabulary entry, which on a CPU costs as much as a layer of a small model.
"""

import hashlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from srm_jax.types import SamplingParams

BLOCK = 64  # vocabulary entries per block of the two-level inversion


def check(sampling: SamplingParams) -> None:
  """Raises ValueError that names the field of `sampling` that makes no sense."""
  if sampling.temperature < 0:
    raise ValueError(f'temperature={sampling.temperature} is negative; 0 is greedy, 1 the model itself')
  if sampling.top_k < 0:
    raise ValueError(f'top_k={sampling.top_k} is negative; 0 switches it off')
  if not 0 < sampling.top_p <= 1:
    raise ValueError(f'top_p={sampling.top_p} is outside (0, 1]; 1 switches it off')
  for name in ('max_new_tokens', 'samples'):
    if getattr(sampling, name) < 1:
      raise ValueError(f'{name}={getattr(sampling, name)}; it must be at least 1')


def row_keys(seed: int, rows: Iterable[tuple[str, int]]) -> np.ndarray:
  """Key data of (prompt id, sample) pairs under a seed: uint32 [B, 2]."""

  def key(prompt_id, sample):
    return hashlib.sha256(f'{seed}\0{sample}\0{prompt_id}'.encode()).digest()[:8]

  return np.frombuffer(b''.join(key(*row) for row in rows), np.uint32).reshape(-1, 2)


def uniforms(keys: jax.Array, positions: jax.Array) -> jax.Array:
  """One number in [0, 1) per row: key data uint32 [B, 2] and positions int [B] -> float32 [B]."""

  def one(key, position):
    folded = jax.random.fold_in(jax.random.wrap_key_data(key, impl='threefry2x32'), position)
    return jax.random.uniform(folded, ())

  return jax.vmap(one)(keys, positions)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
  """-inf outside the k largest logits of each row [B, V]; logits that tie with the k-th stay. k = 0 keeps all."""
  if k == 0 or k >= logits.shape[-1]:
    return logits
  threshold = jax.lax.top_k(logits, k)[0][:, -1:]
  return jnp.where(logits < threshold, -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
  """-inf outside the smallest set of tokens with mass >= p, per row of [B, V]; ties with the last one stay.

  Reference: Holtzman et al., The Curious Case of Neural Text Degeneration, arXiv:1904.09751.
  """
  if p >= 1.0:
    return logits
  ordered = -jnp.sort(-logits, axis=-1)
  probabilities = jax.nn.softmax(ordered, axis=-1)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  threshold = jnp.min(jnp.where(before < p, ordered, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits < threshold, -jnp.inf, logits)


def invert_cdf(logits: jax.Array, uniform: jax.Array) -> jax.Array:
  """The smallest token whose cumulative probability exceeds `uniform`: [B, V] and [B] -> int32 [B].

  First over sums of BLOCK neighbours, then inside the block that was hit: two short cumulative sums instead of one of
  length V, and less rounding. A token of probability zero is never returned.
  """
  weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
  blocks = -(-weights.shape[1] // BLOCK)
  weights = jnp.pad(weights, ((0, 0), (0, blocks * BLOCK - weights.shape[1]))).reshape(-1, blocks, BLOCK)
  sums = weights.sum(axis=-1)
  block, rest = _first_above(sums, uniform * sums.sum(axis=-1))
  inside = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
  return block * BLOCK + _first_above(inside, rest)[0]


def _first_above(weights, target):
  """Index i [B] of the first cumulative sum above target [B], and what target exceeds the sum before i by."""
  cumulative = jnp.cumsum(weights, axis=-1)
  last = weights.shape[1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=-1)  # rounding may put target past the end
  index = jnp.minimum(jnp.sum(cumulative <= target[:, None], axis=-1), last).astype(jnp.int32)
  below = jnp.take_along_axis(cumulative - weights, index[:, None], axis=1)[:, 0]
  return index, jnp.maximum(target - below, 0.0)


def sample(logits, uniform, *, temperature, top_k: int = 0, top_p: float = 1.0):
  """One token per row and its log-probability.

  The log-probability is log_softmax(logits / temperature)[token], in float32 and before truncation: what a trainer
  computes for the same token. Greedy decoding is top_k = 1 at temperature 1 (`greedy_or_given`).

  Args:
    logits: [B, V].
    uniform: [B] in [0, 1).
    temperature: scalar > 0, may be traced.
    top_k, top_p: static truncations, top_k first; 0 and 1 switch them off.

  Returns:
    tokens int32 [B], logprobs float32 [B].
  """
  scaled = logits.astype(jnp.float32) / temperature
  if top_k == 1:
    tokens = jnp.argmax(scaled, axis=-1).astype(jnp.int32)
  else:
    tokens = invert_cdf(keep_top_p(keep_top_k(scaled, top_k), top_p), uniform)
  chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=1)[:, 0]
  return tokens, chosen - jax.nn.logsumexp(scaled, axis=-1)


def greedy_or_given(sampling: SamplingParams) -> tuple[float, int, float]:
  """(temperature, top_k, top_p) for `sample`. Temperature 0 is greedy, its log-probs those at temperature 1."""
  if sampling.temperature == 0:
    return 1.0, 1, 1.0
  return sampling.temperature, sampling.top_k, sampling.top_p
