"""Small random models of the published architectures, made by transformers, for every family of FAMILIES.

Weights are not trivial: matrices of std 1/sqrt(fan in), norm weights and biases drawn with std 0.3. With transformers'
own initialisation biases are 0 and norm weights 1, and logits do not notice when they are ignored.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from srm_jax.models.config import RopeScaling

SHAPE = dict(
    vocab_size=96, hidden_size=64, intermediate_size=80, num_attention_heads=4, num_key_value_heads=2,
    num_hidden_layers=3, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    tie_word_embeddings=False, rms_norm_eps=1e-6,
)
ORIGINAL = 32  # length before rope was stretched, where it is: texts of LONG tokens lie beyond it
LONG = 72


class Published(NamedTuple):
  """How transformers makes a model of a family, and what must change its logits.

  mutations: {name: change of (config, params) -> (config, params)}; each is a mistake that a port could make.
  """

  model: str
  config: str
  options: Mapping[str, Any]
  mutations: Mapping[str, Callable]


def replaced(**change):
  return lambda config, params: (dataclasses.replace(config, **change), params)


def scaled(**change):
  """Numbers of the config times a factor."""
  def mutate(config, params):
    return dataclasses.replace(config, **{key: getattr(config, key) * by for key, by in change.items()}), params

  return mutate


def rescaled(**change):
  """Fields of the rope scaling as functions of it."""
  def mutate(config, params):
    new = {key: function(config.rope_scaling) for key, function in change.items()}
    return dataclasses.replace(config, rope_scaling=dataclasses.replace(config.rope_scaling, **new)), params

  return mutate


def filled(value: float, *names: str):
  """The parameters whose path ends with these names set to a constant."""
  def mutate(config, params):
    def one(path, leaf):
      return np.full_like(leaf, value) if tuple(key.key for key in path)[-len(names) :] == names else leaf

    return config, jax.tree_util.tree_map_with_path(one, params)

  return mutate


def swapped(left: tuple[str, ...], right: tuple[str, ...]):
  """Two subtrees of a layer exchanged."""
  def mutate(config, params):
    layers = jax.tree.map(lambda leaf: leaf, params['layers'])
    parents = []
    for path in (left, right):
      parent = layers
      for key in path[:-1]:
        parent = parent[key]
      parents.append(parent)
    (a, x), (b, y) = zip(parents, (left[-1], right[-1]))
    a[x], b[y] = b[y], a[x]
    return config, {**params, 'layers': layers}

  return mutate


def tied(config, params):
  return dataclasses.replace(config, tie_embeddings=True), {k: v for k, v in params.items() if k != 'head'}


def interleaved(config, params):
  """Neighbouring coordinates turned together, as in the first Llama code, instead of those half a head apart."""
  def one(path, leaf):
    names = tuple(key.key for key in path)
    if names[-2:] not in (('q', 'kernel'), ('k', 'kernel')):
      return leaf
    half = config.rotary_dim // 2
    order = [i // 2 + half * (i % 2) for i in range(2 * half)] + list(range(2 * half, config.head_dim))
    return np.asarray(leaf)[..., order]

  return config, jax.tree_util.tree_map_with_path(one, params)


COMMON = {
    'attention norm ignored': filled(1.0, 'attention_norm', 'scale'),
    'mlp norm ignored': filled(1.0, 'mlp_norm', 'scale'),
    'last norm ignored': filled(1.0, 'final_norm', 'scale'),
    'norms swapped': swapped(('attention_norm',), ('mlp_norm',)),
    'gate and up swapped': swapped(('mlp', 'gate'), ('mlp', 'up')),
    'keys and values swapped': swapped(('attention', 'k'), ('attention', 'v')),
    'rope base': scaled(rope_base=1.5),
    'rope pairing': interleaved,
    'activation': replaced(activation='gelu_tanh'),
    'scale of queries': replaced(query_scale=0.2),
    'epsilon of norms': replaced(norm_eps=0.1),
    'scale of embeddings': replaced(embed_scale=1.1),
    'head tied': tied,
}
STRETCHED = {'rope scaling ignored': replaced(rope_scaling=RopeScaling())}
HEAD_NORMS = {
    'norm of queries ignored': filled(1.0, 'q_norm', 'scale'),
    'norm of keys ignored': filled(1.0, 'k_norm', 'scale'),
    'norms of queries and keys swapped': swapped(('attention', 'q_norm'), ('attention', 'k_norm')),
}


def _but(*names: str, **changed):
  return {key: value for key, value in COMMON.items() if key not in names} | changed


CASES: dict[str, Published] = {
    'llama': Published(
        'LlamaForCausalLM', 'LlamaConfig',
        SHAPE | dict(head_dim=24, rope_theta=500.0, rope_scaling=dict(
            rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=ORIGINAL,
        )),
        COMMON | STRETCHED,
    ),
    'qwen2': Published(
        'Qwen2ForCausalLM', 'Qwen2Config',
        SHAPE | dict(rope_scaling=dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=ORIGINAL)),
        COMMON | STRETCHED | {
            'bias of queries ignored': filled(0.0, 'q', 'bias'), 'bias of keys ignored': filled(0.0, 'k', 'bias'),
            'bias of values ignored': filled(0.0, 'v', 'bias'),
            'attention factor ignored': rescaled(attention_factor=lambda scaling: 1.0),
        },
    ),
    'qwen3': Published('Qwen3ForCausalLM', 'Qwen3Config', SHAPE | dict(head_dim=24), COMMON | HEAD_NORMS),
    'qwen3_moe': Published(
        'Qwen3MoeForCausalLM', 'Qwen3MoeConfig',
        SHAPE | dict(head_dim=16, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True),
        COMMON | HEAD_NORMS | {
            'weights of experts not normalised': replaced(normalize_experts=False),
            'one expert too many': replaced(experts_per_token=4),
            'router ignored': filled(0.0, 'router', 'kernel'),
        },
    ),
    'gemma3': Published(
        'Gemma3ForCausalLM', 'Gemma3TextConfig',
        SHAPE | dict(
            head_dim=16, num_hidden_layers=8, sliding_window=9, query_pre_attn_scalar=24, tie_word_embeddings=True,
            rope_scaling=dict(rope_type='linear', factor=8.0),
        ),
        _but('head tied') | STRETCHED | HEAD_NORMS | {
            'activation': replaced(activation='silu'),
            'norms not around one': replaced(norm_offset=0.0),
            'norm after attention ignored': filled(0.0, 'attention_post_norm', 'scale'),
            'norm after the MLP ignored': filled(0.0, 'mlp_post_norm', 'scale'),
            'norms before and after swapped': swapped(('attention_norm',), ('attention_post_norm',)),
            'no norms after': replaced(post_norms=False),
            'window one too wide': replaced(window=10),
            'window one too narrow': replaced(window=8),
            'global layer one too early': replaced(pattern='llllgl'),
            'all layers global': replaced(pattern='g', window=0),
            'one base for all layers': replaced(local_rope_base=1e6),
        },
    ),
    'smollm3': Published(
        'SmolLM3ForCausalLM', 'SmolLM3Config', SHAPE | dict(num_hidden_layers=5),
        COMMON | {
            'all layers see positions': replaced(pattern='g'),
            'layer without positions one too early': replaced(pattern='ggng'),
        },
    ),
    'phi': Published(
        'Phi3ForCausalLM', 'Phi3Config',
        SHAPE | dict(
            partial_rotary_factor=0.75, original_max_position_embeddings=ORIGINAL, rope_scaling=dict(
                type='longrope', short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                long_factor=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            ),
        ),
        COMMON | STRETCHED | {
            'long and short factors swapped': rescaled(
                short_factor=lambda scaling: scaling.long_factor, long_factor=lambda scaling: scaling.short_factor
            ),
            'too many coordinates turned': replaced(rope_dim=0, rope_scaling=RopeScaling()),
        },
    ),
}


def torch_model(name: str, seed: int = 0, **options):
  """A random float32 transformers model of the family, in evaluation mode."""
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  transformers.logging.set_verbosity_error()
  case = CASES[name]
  config = getattr(transformers, case.config)(**{**case.options, **options})
  model = getattr(transformers, case.model)(config).eval()
  generator = torch.Generator().manual_seed(seed)
  centre = 0.0 if name == 'gemma3' else 1.0
  with torch.no_grad():
    for path, parameter in model.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if parameter.ndim > 1:
        parameter.copy_(noise / parameter.shape[-1] ** 0.5)
      else:
        parameter.copy_(0.3 * noise + (0.0 if path.endswith('bias') else centre))
  return model
