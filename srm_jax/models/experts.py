"""A mixture of gated MLPs: every token goes to its few best experts. Forward only: a teacher's layer.

Left out: a load-balancing loss and capacity limits, which training would need.
Reference: Shazeer et al., Sparsely-Gated Mixture-of-Experts, arXiv:1701.06538; Qwen3 Technical Report,
arXiv:2505.09388.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from srm_jax.models.config import TransformerConfig
from srm_jax.models.layers import ACTIVATIONS, Projection


class Experts(nn.Module):
  """y = sum over the chosen experts e of w_e (activation(x W_gate,e) * x W_up,e) W_down,e."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x):
    """x [B, T, D] -> [B, T, D]."""
    c = self.config
    tokens = x.reshape(-1, c.embed_dim)
    router = Projection(c, (c.embed_dim, c.num_experts), ('embed', 'experts'), name='router')(tokens)
    weights, chosen = route(router, c.experts_per_token, normalize=c.normalize_experts)
    order = jnp.argsort(chosen.reshape(-1), stable=True)  # tokens of one expert side by side
    sizes = jnp.bincount(chosen.reshape(-1), length=c.num_experts).astype(jnp.int32)
    rows = tokens[order // c.experts_per_token]
    up = jax.lax.ragged_dot(rows, self._kernels('up', 'embed', 'mlp'), sizes)
    gate = jax.lax.ragged_dot(rows, self._kernels('gate', 'embed', 'mlp'), sizes)
    out = jax.lax.ragged_dot(ACTIVATIONS[c.activation](gate) * up, self._kernels('down', 'mlp', 'embed'), sizes)
    back = out[jnp.argsort(order)].reshape(*chosen.shape, c.embed_dim)
    return jnp.sum(back * weights[..., None].astype(back.dtype), axis=1).reshape(x.shape)

  def _kernels(self, name: str, inputs: str, outputs: str):
    """The matrices of all experts, [E, inputs, outputs], in the compute dtype."""
    c = self.config
    sizes = {'embed': c.embed_dim, 'mlp': c.mlp_dim}
    init = nn.initializers.normal(stddev=1.0 / math.sqrt(sizes[inputs]))
    kernel = self.param(
        name, nn.with_logical_partitioning(init, ('experts', inputs, outputs)),
        (c.num_experts, sizes[inputs], sizes[outputs]), jnp.dtype(c.param_dtype),
    )
    return kernel.astype(c.dtype)


def route(logits: jax.Array, count: int, *, normalize: bool) -> tuple[jax.Array, jax.Array]:
  """The `count` best experts of every token and their weights: logits [T, E] -> float32 [T, count], int32 [T, count].

  Weights are the softmax over all experts, or over the chosen ones where `normalize`.
  """
  shares, chosen = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), count)
  return (shares / jnp.sum(shares, axis=-1, keepdims=True) if normalize else shares), chosen
