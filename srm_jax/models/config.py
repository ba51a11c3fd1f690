"""Shape and numerics of a decoder-only Transformer, and its parameter and FLOP counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

REMAT_POLICIES = ('none', 'dots', 'full')
ACTIVATIONS = ('silu', 'gelu_tanh')
ROPE_SCALINGS = ('none', 'linear', 'llama3', 'yarn', 'longrope')
LAYER_KINDS = 'gln'  # global, local (a window, its own rope base), no rope
ATTENTION_CHUNK = 1024  # queries per block beyond which scores are not held whole


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched beyond `original_length` positions (`models.rope`).

  factor: by how much. low_freq_factor and high_freq_factor: llama3. beta_fast, beta_slow, truncate: yarn. short_factor
  and long_factor: longrope, one number a pair of coordinates. attention_factor multiplies cos and sin.
  """

  kind: str = 'none'
  factor: float = 1.0
  original_length: int = 0
  attention_factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  short_factor: tuple[float, ...] = ()
  long_factor: tuple[float, ...] = ()

  def __post_init__(self):
    for name in ('short_factor', 'long_factor'):
      object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON gives lists
    if self.kind not in ROPE_SCALINGS:
      raise ValueError(f'rope scaling {self.kind!r} unknown; choose from {ROPE_SCALINGS}')
    if self.kind in ('llama3', 'yarn', 'longrope') and self.original_length < 1:
      raise ValueError(f'rope scaling {self.kind!r} needs original_length, the length before it was stretched')


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Everything that a forward pass needs to know. Dimension letters: V, D, N, H, K, F as in the code.

  pattern gives each layer of a period its kind: 'g' sees all before it, 'l' the last `window` positions (itself
  included) with rotary base `local_rope_base`, 'n' sees all, without rotary embedding. rope_dim coordinates of a head
  are turned. query_scale multiplies queries. norm_offset is added to norm weights; post_norms normalises what
  attention and MLP put out as well. 0 stands for: head_dim (rope_dim), 1/sqrt(head_dim) (query_scale).
  With num_experts > 0 the MLP is a mixture: experts_per_token of num_experts, each of width mlp_dim, weighted by the
  router's softmax over all experts, or over the chosen ones where normalize_experts.
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
  pattern: str = 'g'
  window: int = 0
  local_rope_base: float = 10_000.0
  rope_dim: int = 0
  rope_scaling: RopeScaling = RopeScaling()
  activation: str = 'silu'
  query_scale: float = 0.0
  embed_scale: float = 1.0
  norm_offset: float = 0.0
  post_norms: bool = False
  num_experts: int = 0
  experts_per_token: int = 0
  normalize_experts: bool = True

  def __post_init__(self):
    if isinstance(self.rope_scaling, Mapping):  # from JSON
      object.__setattr__(self, 'rope_scaling', RopeScaling(**self.rope_scaling))
    for problem in _problems(self):
      raise ValueError(problem)

  @property
  def rotary_dim(self) -> int:
    """Coordinates of a head that rotary embedding turns."""
    return self.rope_dim or self.head_dim

  def kind(self, layer: int) -> str:
    """'g', 'l' or 'n'."""
    return self.pattern[layer % len(self.pattern)]


def _problems(c: TransformerConfig):
  """What cannot be, in words."""
  if c.num_heads % c.num_kv_heads:
    yield f'num_heads={c.num_heads} is not a multiple of num_kv_heads={c.num_kv_heads}'
  if c.rotary_dim % 2 or c.rotary_dim > c.head_dim:
    yield (
        f'{"rope_dim" if c.rope_dim else "head_dim"}={c.rotary_dim} is odd or beyond head_dim={c.head_dim}; rotary '
        'embedding turns pairs'
    )
  if c.remat not in REMAT_POLICIES:
    yield f'remat {c.remat!r} unknown; choose from {REMAT_POLICIES}'
  if c.activation not in ACTIVATIONS:
    yield f'activation {c.activation!r} unknown; choose from {ACTIVATIONS}'
  if not c.pattern or set(c.pattern) - set(LAYER_KINDS):
    yield f'pattern {c.pattern!r} is not made of the letters {LAYER_KINDS!r}'
  if ('l' in c.pattern) != (c.window > 0):
    yield f'window={c.window} and pattern={c.pattern!r}: local layers need a window, and only they have one'
  if c.num_layers % c.unroll:
    yield f'unroll={c.unroll} does not divide num_layers={c.num_layers}'
  if c.unroll > 1 and c.unroll % len(c.pattern):
    yield f'unroll={c.unroll} is not a multiple of the {len(c.pattern)} layers of pattern={c.pattern!r}'
  if c.num_experts and not 0 < c.experts_per_token <= c.num_experts:
    yield f'experts_per_token={c.experts_per_token} is not between 1 and num_experts={c.num_experts}'


def active_params(config: TransformerConfig) -> int:
  """Weights that multiply a token: projections of all layers (of the experts it is sent to) and the unembedding."""
  heads = config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
  mlps = config.experts_per_token if config.num_experts else 1
  layer = config.embed_dim * (heads + config.num_experts) + mlps * 3 * config.embed_dim * config.mlp_dim
  return config.num_layers * layer + config.vocab_size * config.embed_dim


def num_params(config: TransformerConfig) -> int:
  """All parameters: matrices, embedding (if untied), norms and biases."""
  norms = (4 if config.post_norms else 2) * config.embed_dim + 2 * config.head_dim * config.qk_norm
  biases = config.qkv_bias * config.head_dim * (config.num_heads + 2 * config.num_kv_heads)
  idle = max(0, config.num_experts - config.experts_per_token) * 3 * config.embed_dim * config.mlp_dim
  untied = 0 if config.tie_embeddings else config.vocab_size * config.embed_dim
  return active_params(config) + config.num_layers * (norms + biases + idle) + untied + config.embed_dim


def forward_flops(config: TransformerConfig, tokens: int, context: float = 0.0) -> float:
  """Multiply-adds times two of a forward pass over `tokens` tokens that each attend to `context` others on average."""
  attention = 4.0 * config.num_layers * config.num_heads * config.head_dim * context
  return tokens * (2.0 * active_params(config) + attention)


def train_flops(config: TransformerConfig, tokens: int, context: float = 0.0) -> float:
  """Forward and backward: three forward passes (recomputation by remat is not useful work and not counted)."""
  return 3.0 * forward_flops(config, tokens, context)
