"""Phi-4-mini: three quarters of a head are turned, frequencies are divided by searched numbers, weights are fused.

Reference: Microsoft, Phi-4-Mini Technical Report, arXiv:2503.01743.
"""

from srm_jax.models.config import TransformerConfig
from srm_jax.models.families.family import (
    Family, Piece, Table, UnsupportedError, in_layers, outer_table, read_common, read_rope, refuse, write_common,
)


def read(hf) -> TransformerConfig:
  refuse(hf, hidden_act='silu', attention_bias=False, mlp_bias=False)
  window = hf.get('sliding_window') or hf['max_position_embeddings']
  rope, options = read_rope(hf), {}
  if window < hf['max_position_embeddings']:
    if rope['rope_scaling'].kind != 'none':
      raise UnsupportedError(f'config.json: sliding_window={window} together with rope_scaling is not supported')
    options = dict(pattern='l', window=window, local_rope_base=rope['rope_base'])
  return TransformerConfig(**read_common(hf, **options), **rope)


def write(config: TransformerConfig):
  return write_common(
      config, attention_bias=False, mlp_bias=False, partial_rotary_factor=config.rotary_dim / config.head_dim,
      sliding_window=config.window or None, resid_pdrop=0.0, embd_pdrop=0.0, pad_token_id=None,
      original_max_position_embeddings=config.rope_scaling.original_length or config.max_length,
  )


def table(config: TransformerConfig) -> Table:
  heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
  qkv, mlp = 'self_attn.qkv_proj.weight', 'mlp.gate_up_proj.weight'
  return outer_table(config) | in_layers({
      ('attention', 'q', 'kernel'): Piece(qkv, 1, 0, heads + 2 * kv),
      ('attention', 'k', 'kernel'): Piece(qkv, 1, heads, heads + 2 * kv),
      ('attention', 'v', 'kernel'): Piece(qkv, 1, heads + kv, heads + 2 * kv),
      ('attention', 'out', 'kernel'): Piece('self_attn.o_proj.weight', 2),
      ('mlp', 'gate', 'kernel'): Piece(mlp, 1, 0, 2 * config.mlp_dim),
      ('mlp', 'up', 'kernel'): Piece(mlp, 1, config.mlp_dim, 2 * config.mlp_dim),
      ('mlp', 'down', 'kernel'): Piece('mlp.down_proj.weight', 1),
      ('attention_norm', 'scale'): Piece('input_layernorm.weight'),
      ('mlp_norm', 'scale'): Piece('post_attention_layernorm.weight'),
  })


PHI = Family(
    ('Phi3ForCausalLM',), 'phi3', {}, read, write, table,
    'A turn is <|role|>text<|end|> without line breaks; generation ends at <|end|> as well as at <|endoftext|>.',
)
