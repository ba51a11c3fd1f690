"""Parameterised pieces of a block: projections, RMS norm, gated MLP."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from srm_jax.models import quantization
from srm_jax.models.config import TransformerConfig
from srm_jax.models.quantization import Quantized
from srm_jax.sharding import constrain

# Logical axes of a kernel -> how many of them it sums over; the remaining ones index its output.
INPUT_AXES: Mapping[tuple[str, ...], int] = {
    ('embed', 'heads', 'head_dim'): 1,
    ('embed', 'kv_heads', 'head_dim'): 1,
    ('heads', 'head_dim', 'embed'): 2,
    ('embed', 'mlp'): 1,
    ('mlp', 'embed'): 1,
}

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    'silu': nn.silu,
    'gelu_tanh': functools.partial(nn.gelu, approximate=True),
}


def _fan_in(fan_in: int):
  return nn.initializers.normal(stddev=1.0 / math.sqrt(fan_in))


@jax.custom_vjp
def matmul(x, kernel):
  """x [..., D] @ kernel [D, F], with the weight gradient as x^T dy.

  Automatic differentiation writes it as (dy^T x)^T, which the CPU compiler turns into a product with both operands
  transposed and a copy of dy: four times the cost of the forward product.
  """
  return x @ kernel


def _matmul_forward(x, kernel):
  return x @ kernel, (x, kernel)


def _matmul_backward(residuals, dy):
  x, kernel = residuals
  tokens, dtokens = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
  return dy @ kernel.T, jax.lax.dot_general(tokens, dtokens, (((0,), (0,)), ((), ())))


matmul.defvjp(_matmul_forward, _matmul_backward)


def dense(kernel: jax.Array | Quantized, dtype) -> jax.Array:
  """One layer's [in, out] matrix in `dtype`, whether it is stored whole or quantised."""
  return quantization.dequantize(kernel, dtype) if isinstance(kernel, Quantized) else kernel.astype(dtype)


def column_norms(kernel: jax.Array | Quantized, a, b, scale) -> jax.Array:
  """|| W + s A B || of every output, float32 [out], without forming A B.

  ||w + s A b||^2 = ||w||^2 + 2 s (W^T A)_o . b + s^2 b^T (A^T A) b, for kernel [in, out], a [in, r], b [r, out].
  """
  w, a, b = dense(kernel, jnp.float32), a.astype(jnp.float32), b.astype(jnp.float32)
  product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  cross = jnp.sum(product(a.T, w) * b, axis=0)
  square = jnp.sum(product(product(a.T, a), b) * b, axis=0)
  return jnp.sqrt(jnp.sum(w * w, axis=0) + 2 * scale * cross + scale * scale * square)


def adapt(x, y, kernel: jax.Array | Quantized, factors: Mapping[str, jax.Array]) -> jax.Array:
  """y = x W becomes x W + s (x A) B, and with a magnitude m that times m / || W + s A B ||.

  Args:
    x: [..., in]; y: [..., out], both in the compute dtype.
    kernel: W, frozen.
    factors: a [in, r], b [r, out], scale (scalar; 0 where the layer has no adapter), and for DoRA magnitude [out].

  The norm is a constant of the backward pass, as section 4.3 of DoRA has it.
  Reference: Hu et al., LoRA, arXiv:2106.09685; Liu et al., DoRA, arXiv:2402.09353.
  """
  a, b, scale = factors['a'], factors['b'], factors['scale']
  y = y + matmul(matmul(x, a.astype(x.dtype)) * scale.astype(x.dtype), b.astype(x.dtype))
  if 'magnitude' not in factors:
    return y
  norms = jax.lax.stop_gradient(column_norms(kernel, a, b, scale))
  ratio = jnp.where(scale > 0, factors['magnitude'] / norms, 1.0).astype(y.dtype)
  return y * jnp.expand_dims(ratio, range(y.ndim - 1))


class Projection(nn.Module):
  """y = x W (+ b), contracting the last `contract` axes of x with the first `contract` axes of W.

  shape and axes describe W; W is stored in param_dtype, or quantised, and multiplied in dtype. Where collection
  'adapters' has an entry of this module's path, it is added to the product (`adapt`), and W is taken to be frozen.
  """

  config: TransformerConfig
  shape: Sequence[int]
  axes: Sequence[str]
  contract: int = 1
  bias: bool = False

  @nn.compact
  def __call__(self, x):
    fan_in = math.prod(self.shape[: self.contract])
    kernel = self._kernel(fan_in)
    # One two-dimensional product: backends are at their best there, and the reshapes are free.
    flat = x.reshape(*x.shape[: x.ndim - self.contract], fan_in)
    if isinstance(kernel, Quantized):
      y = quantization.matmul(flat, kernel)
    else:
      y = matmul(flat, kernel.astype(self.config.dtype))
    if self.has_variable('adapters', 'a'):
      y = adapt(flat, y, kernel, self.variables['adapters'])
    y = y.reshape(*flat.shape[:-1], *self.shape[self.contract :])
    if self.bias:
      out_axes = tuple(self.axes[self.contract :])
      bias = self.param(
          'bias', nn.with_logical_partitioning(nn.initializers.zeros, out_axes), tuple(self.shape[self.contract :]),
          jnp.dtype(self.config.param_dtype),
      )
      y = y + jnp.expand_dims(bias.astype(y.dtype), range(y.ndim - bias.ndim))
    return y

  def _kernel(self, fan_in: int) -> jax.Array | Quantized:
    """W as a matrix, as it is stored."""
    stored = self.get_variable('params', 'kernel')
    if isinstance(stored, Quantized):
      return stored
    kernel = self.param(
        'kernel', nn.with_logical_partitioning(_fan_in(fan_in), tuple(self.axes)), tuple(self.shape),
        jnp.dtype(self.config.param_dtype),
    )
    return kernel.reshape(fan_in, -1)


class RMSNorm(nn.Module):
  """y = x / rms(x) * (norm_offset + w) over the last axis, in float32.

  Reference: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467.
  """

  config: TransformerConfig

  @nn.compact
  def __call__(self, x):
    offset = self.config.norm_offset
    init = nn.initializers.constant(1.0 - offset)
    scale = self.param(
        'scale', nn.with_logical_partitioning(init, ('norm',)), (x.shape[-1],), jnp.dtype(self.config.param_dtype)
    )
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.config.norm_eps)
    y = x32 * inverse * jnp.expand_dims(offset + scale.astype(jnp.float32), range(x.ndim - 1))
    return y.astype(self.config.dtype)


class GatedMLP(nn.Module):
  """y = (activation(x W_gate) * x W_up) W_down.

  Reference: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202.
  """

  config: TransformerConfig

  @nn.compact
  def __call__(self, x):
    c = self.config
    gate = Projection(c, (c.embed_dim, c.mlp_dim), ('embed', 'mlp'), name='gate')(x)
    up = Projection(c, (c.embed_dim, c.mlp_dim), ('embed', 'mlp'), name='up')(x)
    hidden = constrain(ACTIVATIONS[c.activation](gate) * up, 'batch', 'time', 'act_mlp')
    return Projection(c, (c.mlp_dim, c.embed_dim), ('mlp', 'embed'), name='down')(hidden)
