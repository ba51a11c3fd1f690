"""The decoder-only Transformer: one block, two drivers.

  x = embedding[inputs];  per layer: x += attention(norm(x)); x += mlp(norm(x));  hidden = norm(x)

Training scans the block over stacked parameters with rematerialisation; decoding unrolls it over a tuple of
per-layer parameters and an explicit cache. Both call the same `Block`.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from srm_jax.models import cache as kv
from srm_jax.models import heads
from srm_jax.models.attention import Attention, Visibility
from srm_jax.models.config import TransformerConfig
from srm_jax.models.layers import GatedMLP, RMSNorm, rotary_angles
from srm_jax.sharding import constrain, logical_names
from srm_jax.types import Params

TAPS = ('hidden', 'q', 'k', 'v', 'attention')


class Output(NamedTuple):
  """hidden [B, T, D] after the last norm; logits [B, n, V] float32 or None; cache or None.

  taps: {name: [N, B, T, ...]}, one leading entry a layer; 'hidden' is each block's output.
  """

  hidden: jax.Array
  logits: jax.Array | None
  cache: kv.Cache | None
  taps: dict[str, jax.Array]


class Block(nn.Module):
  """Pre-norm attention and MLP with residuals."""

  config: TransformerConfig
  taps: tuple[str, ...] = ()

  @nn.compact
  def __call__(self, x, angles, visible: Visibility, layer_cache=None):
    """x [B, T, D] -> (x [B, T, D], (layer cache, {tap: array}))."""
    normed = RMSNorm(self.config, name='attention_norm')(x)
    mixed, layer_cache, seen = Attention(self.config, name='attention')(normed, angles, visible, layer_cache, self.taps)
    x = x + mixed
    x = x + GatedMLP(self.config, name='mlp')(RMSNorm(self.config, name='mlp_norm')(x))
    x = constrain(x, 'batch', 'time', 'features')
    if 'hidden' in self.taps:
      seen['hidden'] = x
    return x, (layer_cache, seen)


def _remat(block, policy: str):
  if policy == 'none':
    return block
  dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return nn.remat(block, prevent_cse=False, policy=dots if policy == 'dots' else None)


class Transformer(nn.Module):
  """Decoder-only Transformer; families are presets of its config.

  Reference: Vaswani et al., arXiv:1706.03762, with the pre-norm, rotary, gated form of Llama, arXiv:2302.13971.
  """

  config: TransformerConfig

  @nn.compact
  def __call__(self, inputs, *, positions=None, segment_ids=None, cache=None, logits_at=None, taps=()):
    """Args: inputs int [B, T]; positions and segment_ids [B, T] (by default one segment a row, positions counted from
    the row's start or the cache's index); cache from `init_cache`, whose keys the inputs then extend; logits_at: None
    for logits at all positions, int [B, n] for some, an empty tuple for none; taps: names from TAPS.

    Returns: Output. Raises ValueError on an unknown tap.
    """
    c = self.config
    unknown = set(taps) - set(TAPS)
    if unknown:
      raise ValueError(f'taps {sorted(unknown)} unknown; choose from {TAPS}')
    if positions is None:
      start = 0 if cache is None else cache.index
      positions = jnp.broadcast_to(start + jnp.arange(inputs.shape[1])[None], inputs.shape)
    if segment_ids is None:
      segment_ids = jnp.ones_like(inputs)
    embedding = self.param(
        'embedding', nn.with_logical_partitioning(nn.initializers.normal(c.embed_dim**-0.5), ('vocab', 'embed')),
        (c.vocab_size, c.embed_dim), jnp.dtype(c.param_dtype),
    )
    if not c.tie_embeddings:
      init = nn.with_logical_partitioning(nn.initializers.normal(c.embed_dim**-0.5), ('embed', 'vocab'))
      self.param('head', init, (c.embed_dim, c.vocab_size), jnp.dtype(c.param_dtype))
    x = constrain(embedding[inputs].astype(c.dtype), 'batch', 'time', 'features')  # gradients add up in param_dtype
    angles = rotary_angles(positions, c.head_dim, c.rope_base)
    if cache is None:
      x, seen = self._scan(x, angles, Visibility(segment_ids, segment_ids, 0), tuple(taps))
    else:
      x, cache, seen = self._unroll(x, angles, segment_ids, cache, tuple(taps))
    hidden = RMSNorm(c, name='final_norm')(x)
    return Output(hidden, self._logits(hidden, logits_at), cache, seen)

  def _scan(self, x, angles, visible, taps):
    c = self.config
    scanned = nn.scan(
        _remat(Block, c.remat), variable_axes={'params': 0}, split_rngs={'params': True}, in_axes=nn.broadcast,
        length=c.num_layers, unroll=c.unroll, metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    x, (_, seen) = scanned(c, taps, name='layers')(x, angles, visible)
    return x, seen

  def _unroll(self, x, angles, segment_ids, cache: kv.Cache, taps):
    segments = kv.write_segments(cache, segment_ids)
    visible = Visibility(segment_ids, segments, cache.index)
    block = jax.jit(Block(self.config, taps, parent=None).apply)  # traced and lowered once, not once a layer
    collected, keys, values = [], [], []
    for params, key, value in zip(layer_params(self.variables['params']), cache.keys, cache.values, strict=True):
      x, ((key, value), seen) = block({'params': params}, x, angles, visible, (key, value, cache.index))
      keys.append(key)
      values.append(value)
      collected.append(seen)
    stacked = {name: jnp.stack([seen[name] for seen in collected]) for name in taps}
    return x, kv.Cache(tuple(keys), tuple(values), segments, cache.index + segment_ids.shape[1]), stacked

  def _logits(self, hidden, logits_at):
    if logits_at is None:
      return heads.logits(self.config, self.variables['params'], hidden)
    if len(logits_at) == 0:
      return None
    rows = jnp.arange(hidden.shape[0])[:, None]
    return heads.logits(self.config, self.variables['params'], hidden[rows, logits_at])


def layer_params(params: Params) -> tuple[Any, ...]:
  """Per-layer parameters as a tuple, from stacked or already unstacked 'layers'."""
  layers = params['layers']
  if isinstance(layers, tuple):
    return layers
  count = jax.tree.leaves(layers)[0].shape[0]
  return tuple(jax.tree.map(lambda leaf: leaf[i], layers) for i in range(count))


def unstack_layers(params: Params) -> Params:
  """The same parameters with 'layers' as a tuple, so that a decode loop slices nothing."""
  return {**params, 'layers': layer_params(params)}


def cast(params: Params, dtype) -> Params:
  """Floating leaves in `dtype`."""
  return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)


def abstract_params(config: TransformerConfig):
  """Boxed abstract parameters, with their logical axis names; nothing is computed."""
  return jax.eval_shape(functools.partial(_init, config), jax.random.key(0))


def _init(config, rng):
  return Transformer(config).init(rng, jnp.zeros((1, 1), jnp.int32), logits_at=())['params']


def param_names(config: TransformerConfig):
  """Tree of logical axis names, of the structure of the parameters."""
  return logical_names(abstract_params(config))


def init_params(config: TransformerConfig, rng: jax.Array) -> Params:
  """Fresh parameters (unboxed). Call under jit with out_shardings to create them where they belong."""
  return nn.meta.unbox(_init(config, rng))
