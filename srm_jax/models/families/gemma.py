"""Gemma 3 text models: norms before and after with weights around one, scaled embeddings, five local layers to a global
one, each kind with its own rotary base.

Reference: Gemma Team, Gemma 3 Technical Report, arXiv:2503.19786.
"""

import math

from srm_jax.models.config import RopeScaling, TransformerConfig
from srm_jax.models.families.family import (
    Family, Piece, Table, dense_table, in_layers, read_common, read_pattern, read_rope, refuse, rope_section,
    write_common, write_pattern,
)


def _preset(num_layers, embed_dim, num_heads, num_kv_heads, mlp_dim, *, window, max_length, vocab_size, scaling):
  return TransformerConfig(
      vocab_size=vocab_size, num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads,
      num_kv_heads=num_kv_heads, head_dim=256, mlp_dim=mlp_dim, max_length=max_length, rope_base=1e6, qk_norm=True,
      rope_scaling=scaling, pattern='lllllg', window=window, activation='gelu_tanh', query_scale=256**-0.5,
      embed_scale=math.sqrt(embed_dim), norm_offset=1.0, post_norms=True,
  )


_SMALL = dict(window=512, max_length=32_768, vocab_size=262_144, scaling=RopeScaling())
PRESETS = {
    'gemma3-270m': _preset(18, 640, 4, 1, 2048, **_SMALL),
    'gemma3-1b': _preset(26, 1152, 4, 1, 6912, **_SMALL),
    'gemma3-4b': _preset(
        34, 2560, 8, 4, 10_240, window=1024, max_length=131_072, vocab_size=262_208,
        scaling=RopeScaling('linear', factor=8.0),
    ),
}


def read(hf) -> TransformerConfig:
  """Of a text model, or of the text part of one that also sees pictures."""
  hf = _DEFAULTS | hf.get('text_config', hf)
  refuse(
      hf, hidden_activation='gelu_pytorch_tanh', attention_bias=False, final_logit_softcapping=None,
      attn_logit_softcapping=None, use_bidirectional_attention=False,
  )
  local = rope_section(hf, 'sliding_attention') if 'rope_parameters' in hf else {}
  every = hf.get('sliding_window_pattern') or hf.get('_sliding_window_pattern') or 6
  types = hf.get('layer_types') or [
      'full_attention' if (layer + 1) % every == 0 else 'sliding_attention' for layer in range(hf['num_hidden_layers'])
  ]
  pattern = read_pattern(hf, types)
  return TransformerConfig(
      **read_common(hf), **read_rope(hf, base=1e6), **pattern, qk_norm=True,
      local_rope_base=float(local.get('rope_theta') or hf.get('rope_local_base_freq') or 10_000.0),
      activation='gelu_tanh', query_scale=hf['query_pre_attn_scalar'] ** -0.5,
      embed_scale=math.sqrt(hf['hidden_size']), norm_offset=1.0, post_norms=True,
  )


# Published files leave out what equals these.
_DEFAULTS = dict(
    vocab_size=262_208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
    num_key_value_heads=4, head_dim=256, max_position_embeddings=131_072, rms_norm_eps=1e-6, tie_word_embeddings=True,
    query_pre_attn_scalar=256, sliding_window=4096,
)


def write(config: TransformerConfig):
  return write_common(
      config, hidden_act=None, hidden_activation='gelu_pytorch_tanh', attention_bias=False,
      rope_local_base_freq=config.local_rope_base, query_pre_attn_scalar=round(config.query_scale**-2),
      sliding_window=config.window, layer_types=write_pattern(config),
  )


def table(config: TransformerConfig) -> Table:
  norms = {
      ('attention_post_norm', 'scale'): Piece('post_attention_layernorm.weight'),
      ('mlp_norm', 'scale'): Piece('pre_feedforward_layernorm.weight'),
      ('mlp_post_norm', 'scale'): Piece('post_feedforward_layernorm.weight'),
  }
  return dense_table(config) | in_layers(norms)


GEMMA3 = Family(
    ('Gemma3ForCausalLM', 'Gemma3ForConditionalGeneration'), 'gemma3_text', PRESETS, read, write, table,
    'A turn lies between <start_of_turn> and <end_of_turn>, the assistant is called model, and a system message is put '
    'before the first user turn. The text begins with <bos>.',
    ignored=('vision_tower.', 'multi_modal_projector.', 'model.vision_tower.', 'model.multi_modal_projector.'),
)
