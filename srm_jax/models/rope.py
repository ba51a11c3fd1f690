"""Rotary position embedding and the ways in which it is stretched past the length that a model was trained at.

A pair of coordinates (i, i + R/2) of a head is turned by position * frequency_i; R is the rotary width. Frequencies are
constants of the model, computed on the host.
Reference: Su et al., RoFormer, arXiv:2104.09864.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from srm_jax.models.config import RopeScaling, TransformerConfig

Angles = tuple[jax.Array, jax.Array]  # cos and sin, float32 [B, T, R / 2]


def plain_frequencies(width: int, base: float) -> np.ndarray:
  """base^(-2i / width), float32 [width / 2]; float32 throughout, as the checkpoints were trained."""
  exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
  return np.float32(1.0) / np.float32(base) ** exponents


def linear(scaling: RopeScaling, frequencies: np.ndarray, base: float) -> np.ndarray:
  """Every position divided by the factor.

  Reference: Chen et al., Position Interpolation, arXiv:2306.15595.
  """
  del base
  return frequencies / np.float32(scaling.factor)


def llama3(scaling: RopeScaling, frequencies: np.ndarray, base: float) -> np.ndarray:
  """Long wavelengths divided by the factor, short ones kept, a ramp between.

  Reference: Llama Team, The Llama 3 Herd of Models, arXiv:2407.21783.
  """
  del base
  turns = scaling.original_length * frequencies / np.float32(2 * math.pi)  # within the original length
  ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
  kept = np.clip(ramp, 0.0, 1.0).astype(np.float32)
  return (1 - kept) * frequencies / np.float32(scaling.factor) + kept * frequencies


def yarn(scaling: RopeScaling, frequencies: np.ndarray, base: float) -> np.ndarray:
  """As `llama3`, with the ramp linear in the coordinate and its ends where a wavelength turns beta times.

  Reference: Peng et al., YaRN, arXiv:2309.00071.
  """
  count = len(frequencies)

  def coordinate(turns):
    return count * math.log(scaling.original_length / (turns * 2 * math.pi)) / math.log(base)

  low, high = coordinate(scaling.beta_fast), coordinate(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, 2 * count - 1)
  ramp = (np.arange(count, dtype=np.float32) - low) / (high - low if high != low else 0.001)
  kept = 1 - np.clip(ramp, 0.0, 1.0).astype(np.float32)
  return (1 - kept) * frequencies / np.float32(scaling.factor) + kept * frequencies


def longrope(scaling: RopeScaling, frequencies: np.ndarray, base: float) -> np.ndarray:
  """A searched divisor for every coordinate: float32 [2, width / 2], for texts within the original length and beyond.

  Reference: Ding et al., LongRoPE, arXiv:2402.13753.
  """
  del base
  divisors = np.asarray([scaling.short_factor, scaling.long_factor], np.float32)
  if divisors.shape != (2, len(frequencies)):
    raise ValueError(f'longrope needs {len(frequencies)} short and long factors, not {divisors.shape}')
  return frequencies / divisors


SCALINGS: dict[str, Callable[[RopeScaling, np.ndarray, float], np.ndarray]] = {
    'none': lambda scaling, frequencies, base: frequencies,
    'linear': linear,
    'llama3': llama3,
    'yarn': yarn,
    'longrope': longrope,
}


def yarn_attention_factor(factor: float, original_length: int, section: Mapping[str, Any]) -> float:
  """0.1 ln(factor) + 1, or the ratio of two such terms where a checkpoint names both (mscale, mscale_all_dim)."""
  del original_length

  def term(scale):
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

  both = section.get('mscale') and section.get('mscale_all_dim')
  return term(section['mscale']) / term(section['mscale_all_dim']) if both else term(1.0)


def longrope_attention_factor(factor: float, original_length: int, section: Mapping[str, Any]) -> float:
  """sqrt(1 + ln(factor) / ln(original length)), which keeps the entropy of attention."""
  del section
  return math.sqrt(1 + math.log(factor) / math.log(original_length)) if factor > 1 else 1.0


# What multiplies cos and sin where a checkpoint does not say: (factor, original length, rope section) -> number.
ATTENTION_FACTORS: dict[str, Callable[[float, int, Mapping[str, Any]], float]] = {
    'yarn': yarn_attention_factor,
    'longrope': longrope_attention_factor,
}


def angles(config: TransformerConfig, positions: jax.Array, segment_ids: jax.Array, kind: str) -> Angles | None:
  """cos and sin for the layers of one kind ('g' global, 'l' local); None for 'n', which see no positions.

  Args:
    positions, segment_ids: int [B, T].

  Returns:
    Two float32 arrays [B, T, R / 2].
  """
  if kind == 'n':
    return None
  scaling = RopeScaling() if kind == 'l' else config.rope_scaling
  base = config.local_rope_base if kind == 'l' else config.rope_base
  frequencies = SCALINGS[scaling.kind](scaling, plain_frequencies(config.rotary_dim, base), base)
  if scaling.kind == 'longrope':
    beyond = _longest(positions, segment_ids) >= scaling.original_length
    frequencies = jnp.where(beyond[..., None], frequencies[1][None, None], frequencies[0][None, None])
  else:
    frequencies = frequencies[None, None]
  turned = positions[..., None].astype(jnp.float32) * frequencies
  return jnp.cos(turned) * scaling.attention_factor, jnp.sin(turned) * scaling.attention_factor


def _longest(positions, segment_ids):
  """The last position of each token's segment: a text is turned as a whole, however it is packed."""
  same = segment_ids[:, :, None] == segment_ids[:, None, :]
  return jnp.max(jnp.where(same, positions[:, None, :], 0), axis=-1)


def rotate(x: jax.Array, angle: Angles | None) -> jax.Array:
  """Turns the first R coordinates of x [B, T, H, D]; coordinate i is paired with i + R/2, as in the checkpoints."""
  if angle is None:
    return x
  cos, sin = (part[:, :, None, :] for part in angle)
  half = cos.shape[-1]
  x32 = x.astype(jnp.float32)
  left, right = x32[..., :half], x32[..., half : 2 * half]
  turned = [left * cos - right * sin, right * cos + left * sin]
  return jnp.concatenate([*turned, x32[..., 2 * half :]], axis=-1).astype(x.dtype)
