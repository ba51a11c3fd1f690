"""A tiny model with every option of the architecture, and a tokenizer of bytes, for the tests of this folder."""

import functools

import jax
import jax.numpy as jnp

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
def params(seed: int = 0, scale: float = 2.0):
  """Parameters with biases that are not zero and logits that are not flat."""
  tree = jax.jit(transformer.init_params, static_argnums=0)(CONFIG, jax.random.key(seed))
  leaves, treedef = jax.tree.flatten(tree)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
  tree = jax.tree.unflatten(treedef, noisy)
  return {**tree, 'head': tree['head'] * scale}


@functools.partial(jax.jit, static_argnames='config')
def _full(config, tree, tokens):
  return transformer.Transformer(config).apply({'params': tree}, tokens).logits


def full_logits(tree, tokens, *, config=CONFIG, length=64):
  """Logits [T, V] of one unpadded sequence by a forward pass without a cache (right-padded to one compiled shape)."""
  padded = jnp.zeros((1, length), jnp.int32).at[0, : len(tokens)].set(jnp.asarray(tokens, jnp.int32))
  return _full(config, tree, padded)[0, : len(tokens)]
