"""The decoder-only Transformer: one block, two drivers.

  x = embedding[inputs];  per layer: x += attention(norm(x)); x += mlp(norm(x));  hidden = norm(x)

Weights may be quantised, and the collection 'adapters' may add to them (`models.adapters`): apply({'params': params,
'adapters': adapters}, ...).
Training scans over stacked parameters with rematerialisation, one period of the layer pattern an iteration; decoding
unrolls over a tuple of per-layer parameters and an explicit cache. Both call the same `Block`.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from srm_jax.models import cache as kv
from srm_jax.models import heads
from srm_jax.models.attention import Attention, Branches, Visibility, branched
from srm_jax.models.config import TransformerConfig
from srm_jax.models.experts import Experts
from srm_jax.models.layers import GatedMLP, RMSNorm
from srm_jax.models.rope import angles as rotary_angles
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
  """Attention and MLP with residuals, each normalised before and, with post_norms, after.

  kind is the layer's letter in config.pattern.
  """

  config: TransformerConfig
  kind: str = 'g'
  taps: tuple[str, ...] = ()

  @nn.compact
  def __call__(self, x, angles, visible: Visibility | Branches, layer_cache=None):
    """x [B, T, D], angles {kind: cos and sin} -> (x [B, T, D], (layer cache, {tap: array}))."""
    c = self.config
    mixed, layer_cache, seen = Attention(c, self.kind, name='attention')(
        RMSNorm(c, name='attention_norm')(x), angles[self.kind], visible, layer_cache, self.taps
    )
    x = x + (RMSNorm(c, name='attention_post_norm')(mixed) if c.post_norms else mixed)
    mixed = (Experts if c.num_experts else GatedMLP)(c, name='mlp')(RMSNorm(c, name='mlp_norm')(x))
    x = x + (RMSNorm(c, name='mlp_post_norm')(mixed) if c.post_norms else mixed)
    x = constrain(x, 'batch', 'time', 'features')
    if 'hidden' in self.taps:
      seen['hidden'] = x
    return x, (layer_cache, seen)


def _remat(apply, policy: str, *, scanned: bool):
  """Outside a loop the compiler could merge the second forward pass with the first, and must be kept from it."""
  if policy == 'none':
    return apply
  dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return jax.checkpoint(apply, prevent_cse=not scanned, policy=dots if policy == 'dots' else None)


class Transformer(nn.Module):
  """Decoder-only Transformer; families are presets of its config.

  Reference: Vaswani et al., arXiv:1706.03762, with the pre-norm, rotary, gated form of Llama, arXiv:2302.13971.
  """

  config: TransformerConfig

  @nn.compact
  def __call__(
      self, inputs, *, positions=None, segment_ids=None, cache=None, logits_at=None, taps=(), trunk=0, branches=1,
  ):
    """Args: inputs int [B, T]; positions and segment_ids [B, T] (by default one segment a row, positions counted from
    the row's start or the cache's index); cache from `init_cache`, whose keys the inputs then extend; logits_at: None
    for logits at all positions, int [B, n] for some, an empty tuple for none; taps: names from TAPS; trunk, branches:
    with trunk > 0 a row is a trunk of so many slots and `branches` equal parts, each of which continues the trunk as if
    the others were not there (positions are then the caller's, and there is neither cache nor tap).

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
    if c.embed_scale != 1.0:
      x = x * jnp.asarray(c.embed_scale, c.dtype)
    angles = {kind: rotary_angles(c, positions, segment_ids, kind) for kind in sorted(set(c.pattern))}
    if self.is_initializing():
      x, seen = self._create(x, angles, Visibility(segment_ids, segment_ids, 0)), {}
    elif cache is None:
      visible = branched(segment_ids, trunk, branches) if trunk else Visibility(segment_ids, segment_ids, 0)
      x, seen = self._scan(x, angles, visible, tuple(taps))
    else:
      x, cache, seen = self._unroll(x, angles, segment_ids, cache, tuple(taps))
    hidden = RMSNorm(c, name='final_norm')(x)
    return Output(hidden, self._logits(hidden, logits_at), cache, seen)

  def _create(self, x, angles, visible):
    """Makes the parameters of all layers, stacked: layers of every kind have the same."""
    c = self.config
    stacked = nn.scan(
        Block, variable_axes={'params': 0}, split_rngs={'params': True}, in_axes=nn.broadcast, length=c.num_layers,
        metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    return stacked(c, c.pattern[0], name='layers')(x, angles, visible)[0]

  def _scan(self, x, angles, visible, taps):
    """Iterations of whole periods of the pattern, and what is left over after them."""
    c = self.config
    period = max(c.unroll, len(c.pattern))
    layers = {name: tree['layers'] for name, tree in self.variables.items()}
    # Under adapters the weights are frozen. A block then takes its own out of the stack, in the backward pass again:
    # as inputs of the iterations, all of them would be kept a second time between the passes.
    frozen = jax.lax.stop_gradient(layers.pop('params')) if 'adapters' in layers else None
    loops, rest = divmod(c.num_layers, period)
    whole = jax.tree.map(lambda leaf: leaf[: loops * period].reshape(loops, period, *leaf.shape[1:]), layers)

    def apply(kind, own, layer, *inputs):
      if frozen is not None:
        own = own | {'params': jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, 0, False), frozen)}
      return Block(c, kind, taps, parent=None).apply(own, *inputs)

    def some(x, part, *, scanned):
      stacked, first = part
      count, collected = jax.tree.leaves(stacked)[0].shape[0], []
      for layer, own in enumerate(_split_layers(stacked, count)):
        block = _remat(functools.partial(apply, c.kind(layer)), c.remat, scanned=scanned)
        x, (_, seen) = block(own, first if first is None else first + layer, x, angles, visible)
        collected.append(seen)
      return x, _stack(collected)

    first = None if frozen is None else period * jnp.arange(loops)
    x, seen = jax.lax.scan(functools.partial(some, scanned=True), x, (whole, first))
    seen = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), seen)
    if rest:
      last = jax.tree.map(lambda leaf: leaf[loops * period :], layers)
      x, last = some(x, (last, first if first is None else jnp.asarray(loops * period)), scanned=False)
      seen = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), seen, last)
    return x, seen

  def _unroll(self, x, angles, segment_ids, cache: kv.Cache, taps):
    segments = kv.write_segments(cache, segment_ids)
    visible = Visibility(segment_ids, segments, cache.index)
    c, collected, keys, values = self.config, [], [], []
    # Traced and lowered once a kind, not once a layer.
    blocks = {kind: jax.jit(Block(c, kind, taps, parent=None).apply) for kind in set(c.pattern)}
    split = {name: layer_params(tree) for name, tree in self.variables.items()}
    for layer, (key, value) in enumerate(zip(cache.keys, cache.values, strict=True)):
      own = {name: layers[layer] for name, layers in split.items()}
      x, ((key, value), seen) = blocks[c.kind(layer)](own, x, angles, visible, (key, value, cache.index))
      keys.append(key)
      values.append(value)
      collected.append(seen)
    index = cache.index + segment_ids.shape[1]
    return x, kv.Cache(tuple(keys), tuple(values), segments, index), _stack(collected)

  def _logits(self, hidden, logits_at):
    if logits_at is None:
      return heads.logits(self.config, self.variables['params'], hidden)
    if len(logits_at) == 0:
      return None
    rows = jnp.arange(hidden.shape[0])[:, None]
    return heads.logits(self.config, self.variables['params'], hidden[rows, logits_at])


def _stack(collected):
  """One tree a layer -> one tree with a leading axis of layers."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *collected)


def _split_layers(stacked, count: int):
  """`count` trees from one with a leading axis; gradients are put back by one concatenation, not by adding padded ones.
  """
  leaves, tree = jax.tree.flatten(stacked)
  parts = [jax.lax.split(leaf, (1,) * count, axis=0) for leaf in leaves]
  return [jax.tree.unflatten(tree, [part[i][0] for part in parts]) for i in range(count)]


def layer_params(params: Params) -> tuple[Any, ...]:
  """Per-layer parameters as a tuple, from stacked or already unstacked 'layers'."""
  layers = params['layers']
  if isinstance(layers, tuple):
    return layers
  count = jax.tree.leaves(layers)[0].shape[0]
  return tuple(jax.tree.map(lambda leaf: leaf[i], layers) for i in range(count))


def variables(params: Params) -> dict[str, Any]:
  """What `Transformer.apply` takes: parameters, and the adapters that they may carry under 'adapters'."""
  model = {name: tree for name, tree in params.items() if name != 'adapters'}
  return {'params': model} | ({'adapters': params['adapters']} if 'adapters' in params else {})


def unstack_layers(params: Params) -> Params:
  """The same parameters with 'layers' as a tuple, so that a decode loop slices nothing."""
  return {**params, 'layers': layer_params(params)}


def cast(params: Params, dtype) -> Params:
  """Floating leaves in `dtype`."""
  return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)


@functools.lru_cache(maxsize=64)  # a tenth of a second each, asked for at every load, save and rollout
def abstract_params(config: TransformerConfig):
  """Boxed abstract parameters, with their logical axis names; nothing is computed. Not to be written to."""
  return jax.eval_shape(functools.partial(_init, config), jax.random.key(0))


def _init(config, rng):
  return Transformer(config).init(rng, jnp.zeros((1, 1), jnp.int32), logits_at=())['params']


def param_names(config: TransformerConfig):
  """Tree of logical axis names, of the structure of the parameters."""
  return logical_names(abstract_params(config))


def init_params(config: TransformerConfig, rng: jax.Array) -> Params:
  """Fresh parameters (unboxed). Call under jit with out_shardings to create them where they belong."""
  return nn.meta.unbox(_init(config, rng))
