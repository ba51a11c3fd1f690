"""Parameterised pieces of a block: projections, RMS norm, gated MLP."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from srm_jax.models.config import TransformerConfig
from srm_jax.sharding import constrain


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


class Projection(nn.Module):
  """y = x W (+ b), contracting the last `contract` axes of x with the first `contract` axes of W.

  shape and axes describe W; W is stored in param_dtype and multiplied in dtype.
  """

  config: TransformerConfig
  shape: Sequence[int]
  axes: Sequence[str]
  contract: int = 1
  bias: bool = False

  @nn.compact
  def __call__(self, x):
    fan_in = math.prod(self.shape[: self.contract])
    kernel = self.param(
        'kernel', nn.with_logical_partitioning(_fan_in(fan_in), tuple(self.axes)), tuple(self.shape),
        jnp.dtype(self.config.param_dtype),
    )
    # One two-dimensional product: backends are at their best there, and the reshapes are free.
    flat = x.reshape(*x.shape[: x.ndim - self.contract], fan_in)
    y = matmul(flat, kernel.reshape(fan_in, -1).astype(self.config.dtype))
    y = y.reshape(*flat.shape[:-1], *self.shape[self.contract :])
    if self.bias:
      out_axes = tuple(self.axes[self.contract :])
      bias = self.param(
          'bias', nn.with_logical_partitioning(nn.initializers.zeros, out_axes), tuple(self.shape[self.contract :]),
          jnp.dtype(self.config.param_dtype),
      )
      y = y + jnp.expand_dims(bias.astype(y.dtype), range(y.ndim - bias.ndim))
    return y


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
