"""A tiny model with every option of the architecture, and a tokenizer of bytes, for the tests of this folder."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=96, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, max_length=256,
    tie_embeddings=False, qkv_bias=True, qk_norm=True,
)


class Characters:
  """Printable ASCII as ids 1..95; 0 ends the text."""

  eos_id = pad_id = 0
  vocab_size = 96

  @staticmethod
  def encode(text):
    return [ord(letter) - 31 for letter in text]

  @staticmethod
  def decode(tokens):
    return ''.join(chr(token + 31) for token in tokens if token)


@functools.cache
def params(seed: int = 0):
  """Random parameters: norms near one, biases that are not zero, logits that are not flat."""
  rng = np.random.default_rng(seed)

  def draw(names, leaf):
    scale = 0.3 if len(leaf.shape) > 2 or names[0] in ('vocab', 'embed') else 0.1
    return jnp.asarray(rng.normal('norm' in names, scale, leaf.shape), jnp.float32)

  abstract = nn.meta.unbox(transformer.abstract_params(CONFIG))
  return jax.tree.map(draw, transformer.param_names(CONFIG), abstract, is_leaf=lambda x: isinstance(x, PartitionSpec))


@functools.partial(jax.jit, static_argnames='config')
def _full(config, tree, tokens):
  return transformer.Transformer(config).apply({'params': tree}, tokens).logits


def full_logits(tree, tokens, *, config=CONFIG, length=64):
  """Logits [T, V] of one unpadded sequence by a forward pass without a cache (right-padded to one compiled shape)."""
  padded = np.zeros((1, length), np.int32)
  padded[0, : len(tokens)] = tokens
  return np.asarray(_full(config, tree, padded))[0, : len(tokens)]
