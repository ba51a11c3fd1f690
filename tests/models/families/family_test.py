"""Sizes as published, and numbers as in transformers: Llama, Qwen2 (biases) and Qwen3 (normalised queries and keys)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.models import families
from srm_jax.models.config import TransformerConfig, num_params
from srm_jax.models.families import qwen
from srm_jax.models.transformer import Transformer, abstract_params

SHAPE = TransformerConfig(
    vocab_size=61, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=12, mlp_dim=40, max_length=64,
    rope_base=500.0,
)
# transformers' class -> what it adds to the common shape
ARCHITECTURES = {'Llama': {'tie_embeddings': False}, 'Qwen2': {'qkv_bias': True}, 'Qwen3': {'qk_norm': True}}
# Ours, below layers -> theirs, below model.layers.i
WEIGHTS = {
    'attention_norm/scale': 'input_layernorm.weight', 'mlp_norm/scale': 'post_attention_layernorm.weight',
    **{f'attention/{ours}/kernel': f'self_attn.{ours}_proj.weight' for ours in 'qkv'},
    **{f'attention/{ours}/bias': f'self_attn.{ours}_proj.bias' for ours in 'qkv'},
    'attention/q_norm/scale': 'self_attn.q_norm.weight', 'attention/k_norm/scale': 'self_attn.k_norm.weight',
    'attention/out/kernel': 'self_attn.o_proj.weight',
    **{f'mlp/{ours}/kernel': f'mlp.{ours}_proj.weight' for ours in ('gate', 'up', 'down')},
}


@pytest.mark.parametrize(
    'name, published', [('qwen2.5-0.5b', 0.494e9), ('qwen2.5-1.5b', 1.544e9), ('qwen3-0.6b', 0.596e9)]
)
def test_parameters_as_published(name, published):
  assert num_params(qwen.PRESETS[name]) == pytest.approx(published, rel=1e-3)


def test_every_preset_is_in_the_table():
  assert families.PRESETS.items() >= qwen.PRESETS.items()
  assert all(config.max_length >= 32_768 and config.tie_embeddings for config in qwen.PRESETS.values())


def _peer(name, config):
  """A random model of transformers, norms around one and biases not zero."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  shape = getattr(transformers, f'{name}Config')(
      vocab_size=config.vocab_size, hidden_size=config.embed_dim, intermediate_size=config.mlp_dim,
      num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, head_dim=config.head_dim,
      num_key_value_heads=config.num_kv_heads, max_position_embeddings=config.max_length, rms_norm_eps=config.norm_eps,
      rope_parameters={'rope_type': 'default', 'rope_theta': config.rope_base},
      tie_word_embeddings=config.tie_embeddings,
  )
  torch.manual_seed(0)
  model = getattr(transformers, f'{name}ForCausalLM')(shape).eval()
  with torch.no_grad():
    for key, weight in model.named_parameters():
      weight.copy_(torch.randn_like(weight) * 0.3 + ('norm' in key))
  return torch, model


def _ours(config, weights):
  """The peer's state dict as our parameters; a torch matrix is [out, in]."""

  def leaf(path, abstract):
    keys = [part.key for part in path if hasattr(part, 'key')]
    if keys[0] != 'layers':
      theirs = {
          'embedding': 'model.embed_tokens.weight', 'head': 'lm_head.weight', 'final_norm': 'model.norm.weight',
      }[keys[0]]
      return jnp.asarray(weights[theirs].T if keys[0] == 'head' else weights[theirs])
    theirs = WEIGHTS['/'.join(keys[1:])]
    stacked = [weights[f'model.layers.{i}.{theirs}'] for i in range(config.num_layers)]
    return jnp.stack([w.T if keys[-1] == 'kernel' else w for w in stacked]).reshape(abstract.shape)

  unboxed = jax.tree.map(lambda box: box.unbox(), abstract_params(config), is_leaf=lambda x: hasattr(x, 'unbox'))
  return jax.tree_util.tree_map_with_path(leaf, unboxed)


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_parity_with_transformers(name):
  config = dataclasses.replace(SHAPE, **ARCHITECTURES[name])
  torch, peer = _peer(name, config)
  weights = {key: value.detach().numpy() for key, value in peer.state_dict().items()}
  params = _ours(config, weights)
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(p.numel() for p in peer.parameters())
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 17))
  with torch.no_grad():
    expected = peer(torch.as_tensor(tokens), output_hidden_states=True)
  output = jax.jit(lambda p, x: Transformer(config).apply({'params': p}, x, taps=('hidden',)))(params, tokens)
  # The first hidden state of transformers is the embedding, its last one is normalised.
  np.testing.assert_allclose(output.taps['hidden'][0], expected.hidden_states[1].numpy(), atol=1e-4, rtol=1e-4)
  np.testing.assert_allclose(output.logits, expected.logits.numpy(), atol=2e-4, rtol=1e-4)
  assert np.std(expected.logits.numpy()) > 0.5
