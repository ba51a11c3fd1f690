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


# By how much LongRoPE slows each of the 48 pairs of coordinates beyond 4096 tokens.
_LONG_FACTOR = (
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
    2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555,
    7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283,
    20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7,
    32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
)

PRESETS = {
    'phi4-mini': read(dict(
        vocab_size=200_064, num_hidden_layers=32, hidden_size=3072, num_attention_heads=24, num_key_value_heads=8,
        intermediate_size=8192, max_position_embeddings=131_072, original_max_position_embeddings=4096,
        rms_norm_eps=1e-5, rope_theta=10_000.0, partial_rotary_factor=0.75, tie_word_embeddings=True,
        rope_scaling=dict(type='longrope', short_factor=[1.0] * 48, long_factor=_LONG_FACTOR),
    )),
}

PHI = Family(
    ('Phi3ForCausalLM',), 'phi3', PRESETS, read, write, table,
    'A turn is <|role|>text<|end|> without line breaks; generation ends at <|end|> as well as at <|endoftext|>.',
)
