"""SmolLM2 (a Llama) and SmolLM3, whose every fourth layer sees no positions.

Reference: Ben Allal et al., SmolLM2, arXiv:2502.02737; layers without rotary embedding: Yang et al., arXiv:2501.18795.
"""

from srm_jax.models.config import TransformerConfig
from srm_jax.models.families.family import (
    Family, UnsupportedError, dense_table, read_common, read_rope, refuse, shortest_period, write_common,
)


def _smollm2(num_layers, embed_dim, num_heads, num_kv_heads, mlp_dim, rope_base):
  return TransformerConfig(
      vocab_size=49_152, num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads,
      head_dim=64, mlp_dim=mlp_dim, max_length=8192, rope_base=rope_base, norm_eps=1e-5,
  )


PRESETS = {
    'smollm2-135m': _smollm2(30, 576, 9, 3, 1536, 100_000.0),
    'smollm2-360m': _smollm2(32, 960, 15, 5, 2560, 100_000.0),
    'smollm2-1.7b': _smollm2(24, 2048, 32, 32, 8192, 130_000.0),
    'smollm3-3b': TransformerConfig(
        vocab_size=128_256, num_layers=36, embed_dim=2048, num_heads=16, num_kv_heads=4, head_dim=128, mlp_dim=11_008,
        max_length=65_536, rope_base=5e6, pattern='gggn',
    ),
}


def read(hf) -> TransformerConfig:
  refuse(hf, hidden_act='silu', attention_bias=False, mlp_bias=False, use_sliding_window=False)
  layers, every = hf['num_hidden_layers'], hf.get('no_rope_layer_interval') or 4
  turned = hf.get('no_rope_layers') or [int((layer + 1) % every != 0) for layer in range(layers)]
  if len(turned) != layers:
    raise UnsupportedError(f'config.json: no_rope_layers has {len(turned)} entries for {layers} layers')
  pattern = shortest_period(''.join('g' if one else 'n' for one in turned))
  tied = bool(hf.get('tie_word_embeddings', True))
  return TransformerConfig(**read_common(hf, tie_embeddings=tied, pattern=pattern), **read_rope(hf, base=2e6))


def write(config: TransformerConfig):
  turned = [int(config.kind(layer) != 'n') for layer in range(config.num_layers)]
  return write_common(
      config, attention_bias=False, mlp_bias=False, use_sliding_window=False, no_rope_layers=turned,
      layer_types=['full_attention'] * config.num_layers, pretraining_tp=1,
  )


SMOLLM3 = Family(
    ('SmolLM3ForCausalLM',), 'smollm3', PRESETS, read, write, dense_table,
    'SmolLM2 and SmolLM3 speak ChatML; SmolLM3 writes a system turn with the date and switches reasoning by /think and '
    '/no_think, and an empty <think></think> stands for none.',
)
