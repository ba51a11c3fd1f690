"""Low-rank adapters on a frozen Transformer: y = x W + s (x A) B; s = alpha / r (LoRA) or alpha / sqrt(r) (rsLoRA).

DoRA scales every output by m / || W + s A B ||, m trained; QLoRA keeps W in int8 or nf4.

Three trees:
  adapters: what is trained, {'layers': {'attention': {'q': {'a': [n, in, r], 'b': [n, r, out]}}}}, n targeted layers
  collection (`bind`): of all N layers, with the scale; what `Transformer.apply` takes as collection 'adapters'
  params with 'adapters' (`join`): a model that carries its collection, wherever parameters of a model are expected

Left out: adapters of embeddings, heads, biases and experts; dropout; a rank of its own for some layers.
Reference: Hu et al., LoRA, arXiv:2106.09685; Kalajdzievski, rsLoRA, arXiv:2312.03732; Liu et al., DoRA,
arXiv:2402.09353; Dettmers et al., QLoRA, arXiv:2305.14314.
"""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import PartitionSpec

from srm_jax.models import quantization, transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.models.layers import INPUT_AXES, column_norms, dense
from srm_jax.models.quantization import QUANTIZERS, Quantized
from srm_jax.types import Params

KINDS = ('lora', 'dora')
SCALINGS: Mapping[str, Callable[[float, int], float]] = {
    'alpha/r': lambda alpha, rank: alpha / rank,
    'alpha/sqrt(r)': lambda alpha, rank: alpha / math.sqrt(rank),
}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
  """What is added to which projections.

  rank: 0 for no adapters. targets: shell patterns of projections, such as 'attention/q', 'mlp/*' or '*', or of one
  layer's, such as '0/mlp/up' or '1?/*'. base: how the frozen matrices are kept, a name from QUANTIZERS or '' for as
  they are.
  """

  rank: int
  alpha: float
  targets: tuple[str, ...]
  kind: str = 'lora'
  scaling: str = 'alpha/r'
  base: str = ''

  def __post_init__(self):
    if self.rank < 0 or self.alpha <= 0:
      raise ValueError(f'rank={self.rank} and alpha={self.alpha}: the rank must not be negative, alpha be above 0')
    for name, choices in (('kind', KINDS), ('scaling', SCALINGS), ('base', ('', *QUANTIZERS))):
      if getattr(self, name) not in choices:
        raise ValueError(f'{name} {getattr(self, name)!r} unknown; choose from {list(choices)}')

  @property
  def scale(self) -> float:
    """s."""
    return SCALINGS[self.scaling](self.alpha, self.rank)


class Kernel(NamedTuple):
  """A projection of a layer: shape and logical axes of its kernel, of which the first `inputs` are summed over."""

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  inputs: int

  @property
  def matrix(self) -> tuple[int, int]:
    """(in, out) of the kernel as a matrix."""
    return math.prod(self.shape[: self.inputs]), math.prod(self.shape[self.inputs :])

  @property
  def names(self) -> tuple[str, str]:
    """Logical names of the matrix's axes: of what is flattened, the first axis is the one that is split."""
    return self.axes[0], self.axes[self.inputs]


@functools.cache
def kernels(config: TransformerConfig) -> Mapping[str, Kernel]:
  """{'attention/q': its kernel, ...}: every projection that can have an adapter or be quantised."""
  boxed = traverse_util.flatten_dict(transformer.abstract_params(config)['layers'], sep='/')
  return {
      path.removesuffix('/kernel'): Kernel(box.value.shape[1:], box.names[1:], INPUT_AXES[box.names[1:]])
      for path, box in boxed.items() if path.endswith('/kernel') and box.names[1:] in INPUT_AXES
  }


def targeted(config: TransformerConfig, adapter: AdapterConfig) -> dict[str, tuple[int, ...]]:
  """{'attention/q': the layers whose q has an adapter, ...}.

  Raises:
    ValueError: a target that matches nothing.
  """
  places = [(name, layer) for name in kernels(config) for layer in range(config.num_layers)]
  found: dict[str, set[int]] = {}
  for pattern in adapter.targets:
    hits = [place for place in places if _matches(pattern, *place)]
    if not hits:
      raise ValueError(
          f'adapter target {pattern!r} matches nothing; choose from {list(kernels(config))}, or with the number of one '
          f"of the {config.num_layers} layers before it, '0/{next(iter(kernels(config)))}'"
      )
    for name, layer in hits:
      found.setdefault(name, set()).add(layer)
  return {name: tuple(sorted(found[name])) for name in kernels(config) if name in found}


def _matches(pattern: str, name: str, layer: int) -> bool:
  return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(f'{layer}/{name}', pattern)


def init_adapters(
    config: TransformerConfig, adapter: AdapterConfig, rng: jax.Array, params: Params | None = None
) -> Params:
  """Fresh adapters, float32: A uniform within 1 / sqrt(in) as in the paper's code, B zero, so that nothing changes yet.

  Args:
    params: the frozen model, of which DoRA's magnitudes are the column norms; LoRA needs none.

  Raises:
    ValueError: a target that matches nothing, or DoRA without params.
  """
  if adapter.kind == 'dora' and params is None:
    raise ValueError("kind 'dora' starts from the norms of the frozen weights; give params")
  made = {}
  for index, (name, layers) in enumerate(targeted(config, adapter).items()):
    inputs, outputs = kernels(config)[name].matrix
    bound = 1 / math.sqrt(inputs)
    shape = (len(layers), inputs, adapter.rank)
    a = jax.random.uniform(jax.random.fold_in(rng, index), shape, jnp.float32, -bound, bound)
    made[name] = {'a': a, 'b': jnp.zeros((len(layers), adapter.rank, outputs), jnp.float32)}
    if adapter.kind == 'dora':
      made[name]['magnitude'] = _norms(config, params, name, layers, made[name])
  return _nest(made)


def _norms(config, params, name, layers, factors):
  """|| W || of the columns of some layers, float32 [n, out], a layer at a time."""
  stored = _at(params['layers'], name)['kernel']
  if not isinstance(stored, Quantized):
    stored = stored.reshape(config.num_layers, *kernels(config)[name].matrix)
  chosen = jax.tree.map(lambda leaf: leaf[jnp.asarray(layers)], stored)
  one = lambda x: column_norms(x[0], x[1]['a'], x[1]['b'], 1.0)
  return jax.lax.map(one, (chosen, factors))


def adapter_names(config: TransformerConfig, adapter: AdapterConfig):
  """Logical axis names, of the structure of `init_adapters`."""
  made = {}
  for name in targeted(config, adapter):
    inputs, outputs = kernels(config)[name].names
    made[name] = {
        'a': PartitionSpec('layers', inputs, 'adapter_rank'), 'b': PartitionSpec('layers', 'adapter_rank', outputs),
    }
    if adapter.kind == 'dora':
      made[name]['magnitude'] = PartitionSpec('layers', outputs)
  return _nest(made)


def bind(config: TransformerConfig, adapter: AdapterConfig, adapters: Params) -> Params:
  """The collection that `Transformer.apply` takes: adapters of all layers, and s, which is 0 where there is none.

  Layers without an adapter are filled with zeros, and pay for the product with them.
  """
  made = {}
  for name, layers in targeted(config, adapter).items():
    factors, count = dict(_at(adapters['layers'], name)), config.num_layers
    if len(layers) < count:
      spread = lambda x: jnp.zeros((count, *x.shape[1:]), x.dtype).at[jnp.asarray(layers)].set(x)
      factors = jax.tree.map(spread, factors)
    scale = [adapter.scale if layer in layers else 0.0 for layer in range(count)]
    made[name] = factors | {'scale': jnp.asarray(scale, jnp.float32)}
  return _nest(made)


def join(config: TransformerConfig, adapter: AdapterConfig, params: Params, adapters: Params) -> Params:
  """The model with its adapters under 'adapters', as `transformer.variables` and `inference.decode.prepare` take it."""
  return {**params, 'adapters': bind(config, adapter, adapters)}


def merge(config: TransformerConfig, params: Params, *, dtype: str | None = None) -> Params:
  """A model of whole matrices, with the adapters folded in: for export, or to decode. Call under jit.

  Args:
    params: of a model that may carry adapters (`join`) and may be quantised.
    dtype: of the matrices that change; config.param_dtype by default.

  The sum is taken in float32, a layer at a time, and rounded once: in bfloat16 a change below 2^-9 of a weight is lost.
  """
  if not is_adapted(params):
    return params
  model = {name: tree for name, tree in params.items() if name != 'adapters'}
  layers = model['layers'], params.get('adapters', {}).get('layers', {})
  return {**model, 'layers': jax.lax.map(lambda one: _merge_layer(config, *one, dtype or config.param_dtype), layers)}


def is_adapted(params: Params) -> bool:
  """Whether a model carries adapters or quantised matrices."""
  leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Quantized))
  return 'adapters' in params or any(isinstance(leaf, Quantized) for leaf in leaves)


def _merge_layer(config, layer, adapters, dtype):
  """`merge` of one layer; matrices without adapter that are not quantised stay as they are."""
  layer, adapters = (traverse_util.flatten_dict(tree, sep='/') for tree in (layer, adapters))
  for name, kernel in kernels(config).items():
    stored = layer[f'{name}/kernel']
    if f'{name}/a' in adapters or isinstance(stored, Quantized):
      factors = {key: adapters.get(f'{name}/{key}') for key in ('a', 'b', 'scale', 'magnitude')}
      matrix = stored if isinstance(stored, Quantized) else stored.reshape(kernel.matrix)
      layer[f'{name}/kernel'] = _merged(matrix, **factors).reshape(kernel.shape).astype(dtype)
  return traverse_util.unflatten_dict(layer, sep='/')


def _merged(stored, a, b, scale, magnitude):
  """m / || W + s A B || (W + s A B), float32 [in, out]; None for what there is not."""
  matrix = dense(stored, jnp.float32)
  if a is None:
    return matrix
  changed = matrix + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
  if magnitude is None:
    return changed
  ratio = magnitude / jnp.linalg.norm(changed, axis=0)
  return changed * jnp.where(scale > 0, ratio, 1.0)[None]


def quantize(config: TransformerConfig, params: Params, kind: str, patterns: tuple[str, ...] = ('*',)) -> Params:
  """The model with the kernels that match a pattern as `Quantized`, a layer at a time.

  Raises:
    ValueError: an unknown kind, a pattern that matches nothing, or for nf4 a matrix that does not divide into blocks.
  """
  layers = traverse_util.flatten_dict(params['layers'], sep='/')
  for name in _quantized(config, kind, patterns):
    matrix = layers[f'{name}/kernel'].reshape(config.num_layers, *kernels(config)[name].matrix)
    layers[f'{name}/kernel'] = quantization.quantize(matrix, kind)
  return {**params, 'layers': traverse_util.unflatten_dict(layers, sep='/')}


def quantized_names(config: TransformerConfig, kind: str, patterns: tuple[str, ...] = ('*',)):
  """Logical axis names, of the structure of `quantize`; blocks are split as the inputs that they are made of."""
  names = transformer.param_names(config)
  layers = traverse_util.flatten_dict(names['layers'], sep='/')
  for name in _quantized(config, kind, patterns):
    inputs, outputs = kernels(config)[name].names
    blocks = None if kind == 'int8' else inputs
    layers[f'{name}/kernel'] = Quantized(
        PartitionSpec('layers', inputs, outputs), PartitionSpec('layers', blocks, outputs), kind
    )
  return {**names, 'layers': traverse_util.unflatten_dict(layers, sep='/')}


def _quantized(config, kind, patterns):
  """Names of the kernels that match, after all checks."""
  found = {pattern: fnmatch.filter(kernels(config), pattern) for pattern in patterns}
  for pattern in (pattern for pattern, names in found.items() if not names):
    raise ValueError(f'pattern {pattern!r} matches no kernel; choose from {list(kernels(config))}')
  names = [name for name in kernels(config) if any(name in hits for hits in found.values())]
  odd = [f'{name} ({kernels(config)[name].matrix[0]})' for name in names
         if kind == 'nf4' and kernels(config)[name].matrix[0] % quantization.BLOCK]
  if odd:
    raise ValueError(
        f"inputs of {', '.join(odd)} do not divide into nf4's blocks of {quantization.BLOCK}; leave them out by "
        "patterns, or take 'int8'"
    )
  return names


def _at(tree, name: str):
  return functools.reduce(lambda at, key: at[key], name.split('/'), tree)


def _nest(made: Mapping[str, Mapping]) -> Params:
  return {'layers': traverse_util.unflatten_dict(made, sep='/')}


def num_adapter_params(config: TransformerConfig, adapter: AdapterConfig) -> int:
  """How many numbers are trained."""
  shapes = jax.eval_shape(
      lambda params: init_adapters(config, adapter, jax.random.key(0), params),
      nn.meta.unbox(transformer.abstract_params(config)),
  )
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))
