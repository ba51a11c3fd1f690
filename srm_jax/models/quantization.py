"""Frozen matrices in 8 or 4 bits, made dense one at a time where they multiply.

int8: W = codes * absmax / 127, one absmax an output channel.
nf4: W = NF4[codes] * absmax, one absmax for BLOCK inputs of an output channel; two codes a byte, the first in the
upper half. Rows of the transposed matrix are what bitsandbytes cuts into blocks, so that its codes are these.
Left out: quantised absmax ("double quantization", 0.4 bits a parameter) and paged optimizers.
Reference: Dettmers et al., LLM.int8(), arXiv:2208.07339; QLoRA: Efficient Finetuning of Quantized LLMs,
arXiv:2305.14314.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

BLOCK = 64
# Appendix E of QLoRA: quantiles of the normal distribution, scaled to [-1, 1], with an exact zero.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
  """A matrix [..., in, out] in place of a kernel; leading axes (layers) are leading axes of both fields.

  codes: int8 [..., in, out], or for nf4 uint8 [..., in / 2, out]. absmax: float32 [..., blocks, out].
  """

  codes: jax.Array
  absmax: jax.Array
  kind: str = dataclasses.field(metadata=dict(static=True))


def _int8(matrix):
  absmax = jnp.max(jnp.abs(matrix), axis=0, keepdims=True)
  codes = jnp.round(matrix * (127.0 / jnp.where(absmax > 0, absmax, 1.0)))
  return codes.astype(jnp.int8), absmax


def _from_int8(codes, absmax):
  return codes.astype(jnp.float32) * (absmax / 127.0)


def _nf4(matrix):
  inputs, outputs = matrix.shape
  if inputs % BLOCK:
    raise ValueError(f'{inputs} inputs do not divide into blocks of {BLOCK}, as nf4 needs; leave the matrix out or '
                     "take 'int8'")
  blocks = matrix.reshape(-1, BLOCK, outputs)
  absmax = jnp.max(jnp.abs(blocks), axis=1, keepdims=True)
  scaled = (blocks / jnp.where(absmax > 0, absmax, 1.0)).reshape(inputs, outputs)
  table = jnp.asarray(NF4, jnp.float32)
  codes = jnp.searchsorted((table[1:] + table[:-1]) / 2, scaled).astype(jnp.uint8)
  return codes[::2] << 4 | codes[1::2], absmax[:, 0]


def _from_nf4(codes, absmax):
  halves = jnp.stack([codes >> 4, codes & 15], axis=1)  # [in / 2, 2, out]
  # Gathers are slow on a TPU; elsewhere compilers keep every round of selects, which takes five times the memory.
  values = jax.lax.platform_dependent(halves, tpu=_lookup_by_selects, default=_lookup)
  outputs = codes.shape[-1]
  return (values.reshape(-1, BLOCK, outputs) * absmax[:, None]).reshape(-1, outputs)


def _lookup(codes):
  """NF4[codes]."""
  return jnp.asarray(NF4, jnp.float32).at[codes.astype(jnp.int32)].get(mode='promise_in_bounds')


def _lookup_by_selects(codes):
  """NF4[codes], each bit halving what is left of the table."""
  values = [jnp.float32(value) for value in NF4]
  for bit in range(4):
    upper = (codes >> bit & 1) == 1
    values = [jnp.where(upper, high, low) for low, high in zip(values[::2], values[1::2])]
  return values[0]


# name -> (float32 [in, out] -> codes, absmax; the reverse)
QUANTIZERS: Mapping[str, tuple[Callable, Callable]] = {'int8': (_int8, _from_int8), 'nf4': (_nf4, _from_nf4)}


def quantize(matrix: jax.Array, kind: str) -> Quantized:
  """matrix [..., in, out] with each value at its nearest code; leading axes are walked one by one, to save memory.

  The error is at most absmax / 254 (int8) or absmax * 0.152 (nf4, half of the widest gap between codes).

  Raises:
    ValueError: an unknown kind, or for nf4 inputs that are no multiple of BLOCK.
  """
  if kind not in QUANTIZERS:
    raise ValueError(f'quantization {kind!r} unknown; choose from {sorted(QUANTIZERS)}')
  one = lambda x: QUANTIZERS[kind][0](x.astype(jnp.float32))
  for _ in range(matrix.ndim - 2):
    one = lambda x, inner=one: jax.lax.map(inner, x)
  return Quantized(*one(matrix), kind)


def dequantize(stored: Quantized, dtype=jnp.float32) -> jax.Array:
  """The dense [in, out] matrix of one layer, computed in float32 and given in `dtype`."""
  return QUANTIZERS[stored.kind][1](stored.codes, stored.absmax).astype(dtype)


@jax.custom_vjp
def matmul(x, stored: Quantized):
  """x [..., in] @ W [in, out] in the dtype of x; the backward pass makes W dense again, so that no layer keeps it.

  W is frozen: it has no gradient.
  """
  return x @ dequantize(stored, x.dtype)


matmul.defvjp(
    lambda x, stored: (matmul(x, stored), stored),
    lambda stored, dy: (dy @ dequantize(stored, dy.dtype).T, None),
)
