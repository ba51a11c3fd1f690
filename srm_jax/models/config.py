"""Shape and numerics of a decoder-only Transformer, and its parameter and FLOP counts."""

from __future__ import annotations

import dataclasses

REMAT_POLICIES = ('none', 'dots', 'full')
ATTENTION_CHUNK = 1024  # queries per block beyond which scores are not held whole


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Everything that a forward pass needs to know. Dimension letters: V, D, N, H, K, F as in the code.

  dtype is the compute type, param_dtype the storage type. remat says what the backward pass recomputes:
  'none' keeps all, 'dots' keeps products with weights, 'full' keeps layer inputs only.
  unroll is how many layers one iteration of the training scan holds.
  """

  vocab_size: int
  num_layers: int
  embed_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  max_length: int = 2048
  rope_base: float = 10_000.0
  norm_eps: float = 1e-6
  tie_embeddings: bool = True
  qkv_bias: bool = False
  qk_norm: bool = False
  param_dtype: str = 'float32'
  dtype: str = 'float32'
  remat: str = 'none'
  unroll: int = 1

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f'num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}')
    if self.head_dim % 2:
      raise ValueError(f'head_dim={self.head_dim} is odd; rotary embedding turns pairs')
    if self.remat not in REMAT_POLICIES:
      raise ValueError(f'remat {self.remat!r} unknown; choose from {REMAT_POLICIES}')
    if self.num_layers % self.unroll:
      raise ValueError(f'unroll={self.unroll} does not divide num_layers={self.num_layers}')


def matrix_params(config: TransformerConfig) -> int:
  """Weights that multiply every token: projections of all layers and the unembedding."""
  heads = config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
  layer = config.embed_dim * heads + 3 * config.embed_dim * config.mlp_dim
  return config.num_layers * layer + config.vocab_size * config.embed_dim


def num_params(config: TransformerConfig) -> int:
  """All parameters: matrices, embedding (if untied), norms and biases."""
  norms = config.num_layers * (2 * config.embed_dim + 2 * config.head_dim * config.qk_norm) + config.embed_dim
  biases = config.num_layers * config.qkv_bias * config.head_dim * (config.num_heads + 2 * config.num_kv_heads)
  untied = 0 if config.tie_embeddings else config.vocab_size * config.embed_dim
  return matrix_params(config) + untied + norms + biases


def forward_flops(config: TransformerConfig, tokens: int, context: float = 0.0) -> float:
  """Multiply-adds times two of a forward pass over `tokens` tokens that each attend to `context` others on average."""
  attention = 4.0 * config.num_layers * config.num_heads * config.head_dim * context
  return tokens * (2.0 * matrix_params(config) + attention)


def train_flops(config: TransformerConfig, tokens: int, context: float = 0.0) -> float:
  """Forward and backward: three forward passes (recomputation by remat is not useful work and not counted)."""
  return 3.0 * forward_flops(config, tokens, context)
