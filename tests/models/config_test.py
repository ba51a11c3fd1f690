"""A config refuses what cannot work, and counts what the model really has and does."""

import dataclasses
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from srm_jax.models import config as c
from srm_jax.models.transformer import Transformer, abstract_params

TINY = c.TransformerConfig(
    vocab_size=61, num_layers=2, embed_dim=24, num_heads=4, num_kv_heads=2, head_dim=10, mlp_dim=36
)


@pytest.mark.parametrize('change, message', [
    ({'num_kv_heads': 3}, 'num_heads=4 is not a multiple of num_kv_heads=3'),
    ({'head_dim': 9}, 'head_dim=9 is odd'),
    ({'remat': 'some'}, "remat 'some' unknown; choose from"),
    ({'unroll': 3}, 'unroll=3 does not divide num_layers=2'),
    ({'rope_dim': 12}, 'rope_dim=12 is odd or beyond head_dim=10'),
    ({'activation': 'relu'}, "activation 'relu' unknown; choose from"),
    ({'pattern': 'gx'}, "pattern 'gx' is not made of the letters 'gln'"),
    ({'pattern': ''}, "pattern '' is not made of"),
    ({'pattern': 'lg'}, "window=0 and pattern='lg': local layers need a window"),
    ({'window': 4}, "window=4 and pattern='g'"),
    ({'pattern': 'ggn', 'unroll': 2}, "unroll=2 is not a multiple of the 3 layers of pattern='ggn'"),
    ({'num_experts': 4}, 'experts_per_token=0 is not between 1 and num_experts=4'),
])
def test_refuses(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TINY, **change)


@pytest.mark.parametrize('change', [
    {}, {'tie_embeddings': False}, {'qkv_bias': True}, {'qk_norm': True}, {'num_kv_heads': 4, 'num_layers': 3},
    {'post_norms': True}, {'num_experts': 5, 'experts_per_token': 2}, {'pattern': 'gn'},
])
def test_num_params_counts_the_tree(change):
  config = dataclasses.replace(TINY, **change)
  leaves = jax.tree.leaves(nn.meta.unbox(abstract_params(config)))
  assert c.num_params(config) == sum(math.prod(leaf.shape) for leaf in leaves)


def test_active_params_by_hand():
  layer = 24 * 40 + 2 * 24 * 20 + 40 * 24 + 3 * 24 * 36
  assert c.active_params(TINY) == 2 * layer + 61 * 24


def test_a_token_meets_the_experts_it_is_sent_to():
  config = dataclasses.replace(TINY, num_experts=5, experts_per_token=2)
  layer = 24 * 40 + 2 * 24 * 20 + 40 * 24 + 24 * 5 + 2 * 3 * 24 * 36
  assert c.active_params(config) == 2 * layer + 61 * 24


def test_a_config_survives_json():
  scaling = c.RopeScaling('longrope', original_length=8, short_factor=(1.0, 2.0), long_factor=(3.0, 4.0))
  config = dataclasses.replace(TINY, rope_scaling=scaling, pattern='gn')
  assert c.TransformerConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_flops_by_hand():
  tokens, context = 7, 5.0
  attention = 2 * 2 * (4 * 10) * context * 2  # q k and weights v, multiply and add, every head, both layers
  assert c.forward_flops(TINY, tokens, context) == tokens * (2 * c.active_params(TINY) + attention)
  assert c.train_flops(TINY, tokens, context) == 3 * c.forward_flops(TINY, tokens, context)


def test_flops_match_the_compiler():
  """The compiler counts a loop's body once, so all layers are unrolled; norms and softmax are its few percent more."""
  config = dataclasses.replace(TINY, embed_dim=64, head_dim=16, mlp_dim=192, vocab_size=256, unroll=2)
  tokens = jnp.zeros((2, 32), jnp.int32)
  params = nn.meta.unbox(abstract_params(config))
  forward = jax.jit(lambda p: Transformer(config).apply({'params': p}, tokens).logits)
  counted = forward.lower(params).compile().cost_analysis()['flops']
  assert counted == pytest.approx(c.forward_flops(config, tokens.size, context=32), rel=0.08)
  assert counted > c.forward_flops(config, tokens.size, context=32)
