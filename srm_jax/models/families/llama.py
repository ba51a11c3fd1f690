"""Llama 3.1 and 3.2: rotary frequencies stretched by wavelength, an untied head from 8B on.

Also what a model is exported as that needs nothing special, since every reader knows it.
Reference: Llama Team, The Llama 3 Herd of Models, arXiv:2407.21783.
"""

from srm_jax.models.config import RopeScaling, TransformerConfig
from srm_jax.models.families.family import Family, dense_table, read_common, read_rope, refuse, write_common


def _preset(num_layers, embed_dim, num_heads, head_dim, mlp_dim, factor, *, tied):
  return TransformerConfig(
      vocab_size=128_256, num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=8,
      head_dim=head_dim, mlp_dim=mlp_dim, max_length=131_072, rope_base=500_000.0, norm_eps=1e-5, tie_embeddings=tied,
      rope_scaling=RopeScaling('llama3', factor=factor, original_length=8192),
  )


PRESETS = {
    'llama3.2-1b': _preset(16, 2048, 32, 64, 8192, 32.0, tied=True),
    'llama3.2-3b': _preset(28, 3072, 24, 128, 8192, 32.0, tied=True),
    'llama3.1-8b': _preset(32, 4096, 32, 128, 14_336, 8.0, tied=False),
}


def read(hf) -> TransformerConfig:
  refuse(hf, hidden_act='silu', attention_bias=False, mlp_bias=False)
  return TransformerConfig(**read_common(hf), **read_rope(hf))


def write(config: TransformerConfig):
  return write_common(config, attention_bias=False, mlp_bias=False)


LLAMA = Family(
    ('LlamaForCausalLM',), 'llama', PRESETS, read, write, dense_table,
    'A turn is headed by its role between header tokens and ends with <|eot_id|>, not with the end of text; the '
    'template writes the start token itself, and a date into the system turn.',
)
