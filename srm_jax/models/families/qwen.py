"""Qwen2.5 and DeepSeek-R1's distillations into it (biases on queries, keys and values), Qwen3 (norms on queries and
keys instead), Qwen3-MoE.

Reference: Qwen Team, Qwen2.5 Technical Report, arXiv:2412.15115; Qwen3 Technical Report, arXiv:2505.09388; DeepSeek-AI,
DeepSeek-R1, arXiv:2501.12948.
"""

from srm_jax.models.config import TransformerConfig
from srm_jax.models.families.family import (
    Family, Piece, Table, UnsupportedError, dense_table, in_layers, outer_table, read_common, read_pattern, read_rope,
    refuse, write_common, write_pattern,
)


def _qwen2(num_layers, embed_dim, num_heads, num_kv_heads, mlp_dim, *, tied=True, vocab_size=151_936, rope_base=1e6,
           max_length=32_768, head_dim=128):
  return TransformerConfig(
      vocab_size=vocab_size, num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads,
      num_kv_heads=num_kv_heads, head_dim=head_dim, mlp_dim=mlp_dim, max_length=max_length, rope_base=rope_base,
      tie_embeddings=tied, qkv_bias=True,
  )


def _qwen3(num_layers, embed_dim, num_heads, mlp_dim, *, tied=True, **options):
  return TransformerConfig(**dict(
      vocab_size=151_936, num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=8,
      head_dim=128, mlp_dim=mlp_dim, max_length=40_960, rope_base=1e6, tie_embeddings=tied, qk_norm=True,
  ) | options)


_R1 = dict(tied=False, rope_base=10_000.0, max_length=131_072)
QWEN2_PRESETS = {
    'qwen2.5-0.5b': _qwen2(24, 896, 14, 2, 4864, head_dim=64),
    'qwen2.5-1.5b': _qwen2(28, 1536, 12, 2, 8960, max_length=131_072),
    'qwen2.5-3b': _qwen2(36, 2048, 16, 2, 11_008),
    'qwen2.5-7b': _qwen2(28, 3584, 28, 4, 18_944, tied=False, vocab_size=152_064, max_length=131_072),
    'deepseek-r1-distill-qwen-1.5b': _qwen2(28, 1536, 12, 2, 8960, **_R1),
    'deepseek-r1-distill-qwen-7b': _qwen2(28, 3584, 28, 4, 18_944, vocab_size=152_064, **_R1),
}
QWEN3_PRESETS = {
    'qwen3-0.6b': _qwen3(28, 1024, 16, 3072),
    'qwen3-1.7b': _qwen3(28, 2048, 16, 6144),
    'qwen3-4b': _qwen3(36, 2560, 32, 9728),
    'qwen3-8b': _qwen3(36, 4096, 32, 12_288, tied=False),
}
QWEN3_MOE_PRESETS = {
    'qwen3-30b-a3b': _qwen3(
        48, 2048, 32, 768, tied=False, num_kv_heads=4, num_experts=128, experts_per_token=8,
    ),
}


def _windows(hf):
  """pattern, window and its rotary base; published files name a window and do not use it."""
  if not hf.get('use_sliding_window'):
    return {}
  layers, first = hf['num_hidden_layers'], hf.get('max_window_layers', 28)
  types = hf.get('layer_types') or ['full_attention' if i < first else 'sliding_attention' for i in range(layers)]
  found, rope = read_pattern(hf, types), read_rope(hf)
  if 'l' in found['pattern'] and rope['rope_scaling'].kind != 'none':
    raise UnsupportedError('config.json: use_sliding_window together with rope_scaling is not supported')
  return found | dict(local_rope_base=rope['rope_base'])


def _written_windows(config):
  used = config.window > 0
  return dict(
      use_sliding_window=used, sliding_window=config.window or None, layer_types=write_pattern(config),
      max_window_layers=config.num_layers,
  )


def read_qwen2(hf) -> TransformerConfig:
  refuse(hf, hidden_act='silu')
  return TransformerConfig(**read_common(hf, qkv_bias=True), **read_rope(hf), **_windows(hf))


def write_qwen2(config: TransformerConfig):
  return write_common(config, **_written_windows(config))


def read_qwen3(hf) -> TransformerConfig:
  refuse(hf, hidden_act='silu', attention_bias=False)
  head_dim = hf.get('head_dim') or 128
  return TransformerConfig(**read_common(hf, head_dim=head_dim, qk_norm=True), **read_rope(hf), **_windows(hf))


def write_qwen3(config: TransformerConfig):
  return write_common(config, attention_bias=False, **_written_windows(config))


def read_moe(hf) -> TransformerConfig:
  refuse(hf, hidden_act='silu', attention_bias=False, decoder_sparse_step=1, use_sliding_window=False)
  if hf.get('mlp_only_layers'):
    raise UnsupportedError(f'config.json: mlp_only_layers={hf["mlp_only_layers"]} is not supported, only none')
  experts = hf.get('num_experts') or hf.get('num_local_experts')
  if not experts:
    raise UnsupportedError('config.json: num_experts is missing')
  return TransformerConfig(
      **read_common(hf, qk_norm=True, mlp_dim=hf['moe_intermediate_size'], num_experts=experts), **read_rope(hf),
      experts_per_token=hf['num_experts_per_tok'], normalize_experts=bool(hf.get('norm_topk_prob', False)),
  )


def write_moe(config: TransformerConfig):
  return write_common(
      config, attention_bias=False, decoder_sparse_step=1, mlp_only_layers=[], use_sliding_window=False,
      moe_intermediate_size=config.mlp_dim, num_experts=config.num_experts,
      num_experts_per_tok=config.experts_per_token, norm_topk_prob=config.normalize_experts,
  )


def moe_table(config: TransformerConfig) -> Table:
  dense = {path: piece for path, piece in dense_table(config).items() if path[:2] != ('layers', 'mlp')}
  return dense | in_layers({
      ('mlp', 'router', 'kernel'): Piece('mlp.gate.weight', 1),
      **{('mlp', name): Piece(f'mlp.experts.{{expert}}.{name}_proj.weight', 1) for name in ('gate', 'up', 'down')},
  })


_CHATML = (
    'A turn lies between <|im_start|>role and <|im_end|>, which also ends generation; the text itself would end with '
    '<|endoftext|>. '
)
QWEN2 = Family(
    ('Qwen2ForCausalLM',), 'qwen2', QWEN2_PRESETS, read_qwen2, write_qwen2, dense_table,
    _CHATML + 'Qwen2.5 adds a system turn of its own; the distillations of DeepSeek-R1 have its tokens and open the '
    'answer with <think>.',
)
QWEN3 = Family(
    ('Qwen3ForCausalLM',), 'qwen3', QWEN3_PRESETS, read_qwen3, write_qwen3, dense_table,
    _CHATML + 'Reasoning of earlier turns is dropped; enable_thinking=False answers behind an empty <think></think>.',
)
QWEN3_MOE = Family(
    ('Qwen3MoeForCausalLM',), 'qwen3_moe', QWEN3_MOE_PRESETS, read_moe, write_moe, moe_table, QWEN3.notes,
)
