"""Families of published models. A further one is a file with a Family, an entry here, and a test row."""

from srm_jax.models.config import TransformerConfig
from srm_jax.models.families.family import Family
from srm_jax.models.families.gemma import GEMMA3
from srm_jax.models.families.llama import LLAMA
from srm_jax.models.families.phi import PHI
from srm_jax.models.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from srm_jax.models.families.smollm import SMOLLM3

FAMILIES: dict[str, Family] = {
    'llama': LLAMA,
    'qwen2': QWEN2,
    'qwen3': QWEN3,
    'qwen3_moe': QWEN3_MOE,
    'gemma3': GEMMA3,
    'smollm3': SMOLLM3,
    'phi': PHI,
}
PRESETS: dict[str, TransformerConfig] = {
    name: preset for family in FAMILIES.values() for name, preset in family.presets.items()
}
