"""Shapes of the Qwen2.5 and Qwen3 models.

Qwen2.5 adds biases to the query, key and value projections; Qwen3 normalises queries and keys per head instead.
Reference: Qwen Team, Qwen2.5 Technical Report, arXiv:2412.15115; Qwen3 Technical Report, arXiv:2505.09388.
"""

from srm_jax.models.config import TransformerConfig

PRESETS = {
    'qwen2.5-0.5b': TransformerConfig(
        vocab_size=151_936, num_layers=24, embed_dim=896, num_heads=14, num_kv_heads=2, head_dim=64, mlp_dim=4864,
        max_length=32_768, rope_base=1e6, qkv_bias=True,
    ),
    'qwen2.5-1.5b': TransformerConfig(
        vocab_size=151_936, num_layers=28, embed_dim=1536, num_heads=12, num_kv_heads=2, head_dim=128, mlp_dim=8960,
        max_length=131_072, rope_base=1e6, qkv_bias=True,
    ),
    'qwen3-0.6b': TransformerConfig(
        vocab_size=151_936, num_layers=28, embed_dim=1024, num_heads=16, num_kv_heads=8, head_dim=128, mlp_dim=3072,
        max_length=40_960, rope_base=1e6, qk_norm=True,
    ),
}
