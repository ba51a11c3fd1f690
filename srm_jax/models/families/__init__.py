"""Published shapes by name. A family is a file with PRESETS; this table is all of them."""

from srm_jax.models.config import TransformerConfig
from srm_jax.models.families import qwen

PRESETS: dict[str, TransformerConfig] = {**qwen.PRESETS}
