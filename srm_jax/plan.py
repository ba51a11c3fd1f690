"""Compiles a run's train step for a TPU topology on a machine without TPUs: memory, collectives and a roofline; and the
programs that sample its rollouts.

Nothing is computed and no data is read: parameters, optimizer state and batch are shapes with shardings. The programs
are those that `train` jits, compiled by libtpu for the topology's devices.
"""

import dataclasses
import functools
import importlib.util
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import PartitionSpec

from srm_jax import hlo, optimizers, schema, sharding
from srm_jax.data import tokenizer as tokenizers
from srm_jax.inference import decode
from srm_jax.models import adapters, transformer
from srm_jax.models.config import TransformerConfig, forward_flops, train_flops
from srm_jax.recipes import adapted
from srm_jax.recipes.abstract import RECIPES, Abstract
from srm_jax.train import TrainConfig, trained_names
from srm_jax.train_step import build_train_step, init_state
from srm_jax.types import TrainState

GIB = 2**30


class Chip(NamedTuple):
  """Usable HBM in bytes; peak bfloat16 FLOP/s, HBM and interconnect bytes/s of one chip, by its data sheet."""

  hbm: float
  flops: float
  hbm_bandwidth: float
  ici_bandwidth: float


# device_kind -> Chip. Interconnect: all links of a chip together, one direction, so the roofline is a lower bound.
CHIPS = {
    'TPU v5 lite': Chip(15.75 * GIB, 197e12, 819e9, 200e9),
    'TPU v5': Chip(95.74 * GIB, 459e12, 2765e9, 600e9),
    'TPU v6 lite': Chip(31.25 * GIB, 918e12, 1640e9, 448e9),
}


class Memory(NamedTuple):
  """Bytes of HBM on one chip; outputs counts what does not reuse a donated argument.

  fits: the compiler found room for the program, and the total with arguments and code is within the chip's usable HBM.
  """

  arguments: float
  temporaries: float
  outputs: float
  total: float
  fits: bool


class Roofline(NamedTuple):
  """Seconds of one step that each resource needs by itself, on one chip."""

  compute: float
  hbm: float
  interconnect: float

  @property
  def seconds(self) -> float:
    """The step takes at least this long: the resources work at the same time, the slowest of them all the time."""
    return max(self)


class Plan(NamedTuple):
  """What one compilation said. collectives and roofline are None where the compiler gave up."""

  chip: Chip
  chips: int
  tokens: int
  useful_flops: float
  executed_flops: float
  memory: Memory
  collectives: dict[str, hlo.Traffic] | None
  roofline: Roofline | None


def topology_devices(name: str):
  """The devices of a TPU topology such as 'v5e:4x4', described by libtpu.

  Raises:
    ConfigError: libtpu is not installed, or does not know the topology.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise schema.ConfigError("the TPU compiler is missing; install it with pip install -e '.[tpu]' (no TPU is needed)")
  from jax.experimental import topologies  # loads libtpu, which only this function needs

  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=name).devices
  except jax.errors.JaxRuntimeError as error:
    raise schema.ConfigError(
        f'topology {name!r} could not be described, expected a name like v5e:4x4: {error}'
    ) from error


def plan(config: ml_collections.ConfigDict, devices) -> Plan:
  """Compiles the train step of `config` for `devices` and reads what it needs.

  Args:
    config: of `train`; config.mesh must fit the number of devices.
    devices: of a topology.

  Raises:
    ConfigError: unknown names or types, or a chip without data sheet.
  """
  parsed = schema.parse(TrainConfig, schema.resolve(config), 'config')
  chip = schema.choose('chip', devices[0].device_kind, CHIPS)
  mesh = sharding.make_mesh(parsed.mesh, devices)
  model = _model(parsed)
  recipe = schema.choose('recipe', parsed.recipe.get('name', ''), RECIPES)(parsed.recipe, model)
  step, arguments = _step(parsed, model, recipe, mesh)
  with jax.set_mesh(mesh):  # only around tracing: nothing can be computed on these devices
    stays = jax.tree.map(lambda x: x.sharding, arguments[0])
    traced = jax.jit(step, donate_argnums=0, out_shardings=(stays, None)).trace(*arguments)
    memory, compiled = _compile(traced)
  memory = memory._replace(fits=memory.fits and memory.total <= chip.hbm)
  rows, length = jax.eval_shape(lambda batch: getattr(batch, 'batch', batch), recipe.batch).inputs.shape
  useful = train_flops(model, rows * length, length / 2)
  if parsed.adapters.rank:  # frozen weights have no gradient
    useful = 2 * forward_flops(model, rows * length, length / 2)
  executed = hlo.jaxpr_flops(traced.jaxpr)
  known = Plan(chip, len(devices), rows * length, useful, executed, memory, None, None)
  return known if compiled is None else _with_traffic(known, compiled.as_text())


def plan_rollout(config: ml_collections.ConfigDict, devices) -> dict[str, Memory]:
  """What each program needs that samples a step's completions, all rows at once and each as long as a row may be.

  'merge' makes weights of the compute dtype, 'gather' the last layer of the copy to decode with, 'prefill' runs the
  prompts, 'grow' makes room in the cache for the last time, 'decode' then samples. What is trained, and frozen models,
  stay where they are meanwhile and are in every total. The first program that the compiler cannot fit is the last.

  Raises:
    ConfigError: as `plan`; a recipe that samples nothing.
  """
  parsed = schema.parse(TrainConfig, schema.resolve(config), 'config')
  rollouts = parsed.recipe.get('rollouts')
  if rollouts is None:
    raise schema.ConfigError(f'recipe {parsed.recipe.get("name", "")!r} samples nothing: it has no rollouts')
  chip = schema.choose('chip', devices[0].device_kind, CHIPS)
  mesh, model = sharding.make_mesh(parsed.mesh, devices), _model(parsed)
  recipe = schema.choose('recipe', parsed.recipe['name'], RECIPES)(parsed.recipe, model)
  _, (state, _, frozen, _) = _step(parsed, model, recipe, mesh)
  found: dict[str, Memory] = {}

  def add(name, traced, own=(), beside=()):
    """The program's results, placed. own: what of the training is among its arguments; beside: what else is there."""
    memory, compiled = _compile(traced)
    total = memory.total + _bytes_of((state, frozen)) - _bytes_of(own) + _bytes_of(beside)
    found[name] = memory._replace(total=total, fits=memory.fits and total <= chip.hbm)
    return compiled and _placed(traced.out_info, compiled.output_shardings)

  def whole(params, base):
    return params['model'] if base is None else adapted.joined(model, parsed.adapters, params, base)['model']

  with jax.set_mesh(mesh):
    given = (state.params, frozen.get(adapted.BASE))
    merged = add('merge', jax.jit(lambda *given: decode.merge(model, whole(*given))).trace(*given), given)
    if merged is not None:
      copy = jax.eval_shape(lambda *given: decode.prepare(model, whole(*given)), *given)
      weights = _placed(copy, sharding.shardings(decode.copy_names(model), copy, mesh))
      _add_sampling(add, model, merged, weights, rollouts)
  return found


def _add_sampling(add, model: TransformerConfig, merged, weights, rollouts: Mapping[str, Any]):
  """The last layer, prefill, the cache's last growth and decoding, as `inference.decode` runs them."""
  others = {**weights, 'layers': weights['layers'][1:]}
  if add('gather', decode.gather_layer.trace(model, merged['layers'], np.int32(0)), beside=others) is None:
    return
  new, prompts, rows = rollouts['max_new_tokens'], rollouts['prompts'], rollouts['prompts'] * rollouts['samples']
  used = decode.bucket(rollouts['length'] - new - 1)
  sizes = sorted({decode.bucket(used + min(new, end)) for end in range(decode.STEPS, new + decode.STEPS, decode.STEPS)})
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  keys = jax.ShapeDtypeStruct((rows, 2), jnp.uint32)
  given = (weights, ints(prompts, used + 1), ints(prompts), ints(rows), keys)
  prefill = functools.partial(decode.prefill.trace, model, *given)
  state = add('prefill', prefill(size=sizes[0]))
  if len(sizes) > 1 and state is not None:
    state = _placed(prefill(size=sizes[-2]).out_info, jax.tree.map(lambda x: x.sharding, state))
    state = add('grow', decode.grow.trace(state, size=sizes[-1]), beside=weights)
  if state is not None:
    add('decode', decode.decode.trace(
        model, weights, state, jax.ShapeDtypeStruct((), jnp.float32), ints(1), ints(), top_k=rollouts['top_k'],
        top_p=rollouts['top_p'], steps=decode.STEPS,
    ))


def _bytes_of(placed) -> int:
  """On one chip."""
  shard = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  return sum(shard(x) for x in jax.tree.leaves(placed))


def _with_traffic(known: Plan, text: str) -> Plan:
  program = hlo.parse(text)
  collectives = hlo.collectives(program)
  moved = sum(traffic.moved for traffic in collectives.values())
  seconds = Roofline(
      known.executed_flops / known.chips / known.chip.flops, hlo.hbm_bytes(program) / known.chip.hbm_bandwidth,
      moved / known.chip.ici_bandwidth,
  )
  return known._replace(collectives=collectives, roofline=seconds)


def _model(config: TrainConfig) -> TransformerConfig:
  if config.model.vocab_size:
    return config.model
  return dataclasses.replace(config.model, vocab_size=tokenizers.load(config.tokenizer).vocab_size)


def _placed(tree, shardings):
  """Shapes with shardings."""
  return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings)


def _rows(batch, mesh):
  def one(x):
    return jax.NamedSharding(mesh, sharding.spec(('batch',) + (None,) * (x.ndim - 1), x.shape, mesh))

  return _placed(batch, jax.tree.map(one, batch))


def _frozen(model: TransformerConfig, dtype: str, mesh):
  params = jax.eval_shape(lambda tree: transformer.cast(tree, dtype), nn.meta.unbox(transformer.abstract_params(model)))
  return _placed(params, sharding.shardings(transformer.param_names(model), params, mesh))


def _adapters(config: TrainConfig, model: TransformerConfig, mesh):
  """Abstract {'adapters': ...}, and the frozen base that they are trained on, placed."""
  adapted.check(model, config.adapters)
  base, kind = _frozen(model, model.dtype, mesh), config.adapters.base
  if kind:
    base = jax.eval_shape(lambda params: adapters.quantize(model, params, kind), base)
    base = _placed(base, sharding.shardings(adapters.quantized_names(model, kind), base, mesh))
  init = lambda params: adapters.init_adapters(model, config.adapters, jax.random.key(0), params)
  return {'adapters': jax.eval_shape(init, base)}, base


def _step(config: TrainConfig, model, recipe: Abstract, mesh):
  """The step function and its abstract arguments, placed as `train` places the real ones."""
  extra = {} if recipe.extra_params is None else jax.eval_shape(recipe.extra_params, jax.random.key(0))
  if config.adapters.rank:
    own, base = _adapters(config, model, mesh)
  else:
    own, base = {'model': nn.meta.unbox(transformer.abstract_params(model))}, None
  params = own | extra
  names = trained_names(config, model) | jax.tree.map(lambda _: PartitionSpec(), extra)
  tx = optimizers.make_optimizer(config.optimizer, config.num_steps, names)
  placed = sharding.shardings(names, params, mesh)
  state = jax.eval_shape(lambda params: init_state(params, tx, ema=config.ema_decay > 0), params)
  rest = {
      name: sharding.like_params(getattr(state, name), params, placed, mesh) for name in ('step', 'opt_state', 'ema')
  }
  state = _placed(state, TrainState(params=placed, **rest))
  frozen = {name: _frozen(frozen_model, model.dtype, mesh) for name, frozen_model in recipe.frozen.items()}
  objective = recipe.objective
  if base is not None:
    frozen[adapted.BASE], objective = base, adapted.objective(objective, model, config.adapters)
  key = _placed(jax.eval_shape(jax.random.key, 0), sharding.replicated(mesh))
  step = build_train_step(objective, tx, microbatches=config.microbatches, ema_decay=config.ema_decay)
  return step, (state, _rows(recipe.batch, mesh), frozen, key)


def _compile(traced) -> tuple[Memory, Any]:
  """(memory, the compiled program or None)."""
  try:
    compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    return out_of_memory(str(error)), None
  stats = compiled.memory_analysis()
  outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
  parts = (stats.argument_size_in_bytes, stats.temp_size_in_bytes, outputs)
  return Memory(*parts, sum(parts) + stats.generated_code_size_in_bytes, True), compiled


_SIZE = re.compile(r'([\d.]+)([KMGT]?)')
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def out_of_memory(message: str) -> Memory:
  """Reads the compiler's message on a program that does not fit.

  Raises:
    RuntimeError: it is a message about something else.
  """
  alone = re.search(r'required for HLO temporaries \(([\d.]+[KMGT]?)\) exceeds', message)
  if alone is not None:  # what else there is, the compiler did not come to count
    return Memory(math.nan, _bytes(alone[1]), math.nan, _bytes(alone[1]), False)
  used = re.search(r'Used ([\d.]+[KMGT]?) of [\d.]+[KMGT]? hbm', message)
  if used is None:
    raise RuntimeError(message)

  def size(pattern):
    found = re.search(pattern, message)
    return math.nan if found is None else _bytes(found[1])

  number = r'([\d.]+[KMGT]?)'
  outputs = size(f'Output size {number}') - size(f'shares {number} with arguments')
  return Memory(size(rf'arguments\s+{number}'), size(rf'program\s+{number}'), outputs, _bytes(used[1]), False)


def _bytes(text: str) -> float:
  number, unit = _SIZE.match(text).groups()
  return float(number) * _UNITS[unit]


def _copy(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(schema.resolve(config), convert_dict=True)


def with_head(config: ml_collections.ConfigDict, chunk: int | None) -> ml_collections.ConfigDict:
  """The config with another chunk of the lm head: None follows the memory budget, 0 forms all logits at once."""
  changed = _copy(config)
  recipe = changed.recipe
  owner = recipe if 'head_chunk' in recipe else recipe.loss
  with owner.ignore_type():
    owner.head_chunk = chunk
  return changed


def _group(recipe: Mapping[str, Any]) -> int:
  """Rows of the batch that one prompt gives, of rollouts."""
  return 2 if recipe['name'] == 'preference' else recipe['rollouts']['samples']


def rows_of(config: ml_collections.ConfigDict, devices) -> tuple[int, int]:
  """Rows of the config's batch, and the fewest that give every device of every microbatch the same whole rows.

  Rollouts come in groups of `samples` rows as well; pairs, of which microbatches hold whole ones, in two rows.
  """
  parsed = schema.parse(TrainConfig, schema.resolve(config), 'config')
  mesh, recipe = sharding.make_mesh(parsed.mesh, devices), parsed.recipe
  unit = parsed.microbatches * math.prod(mesh.shape[axis] for axis in sharding.TOKEN_AXES)
  sampled = recipe.get('rollouts') is not None
  rows = recipe['rollouts']['prompts'] * _group(recipe) if sampled else recipe['batch']['size']
  if recipe['name'] == 'preference':
    return rows, 2 * unit
  return rows, math.lcm(unit, _group(recipe)) if sampled else unit


def with_rows(config: ml_collections.ConfigDict, rows: int) -> ml_collections.ConfigDict:
  """The config with a batch of so many rows; of rollouts, as many groups as make them."""
  changed = _copy(config)
  if changed.recipe.get('rollouts') is not None:
    changed.recipe.rollouts.prompts = rows // _group(changed.recipe)
  else:
    changed.recipe.batch.size = rows
  return changed


def most_rows(fits: Callable[[int], bool], *, start: int, unit: int) -> int:
  """The most rows, in multiples of `unit`, that fit; 0 where not even `unit` rows do.

  Doubles from `start` until rows do not fit, then halves the gap. What fits must fit with fewer rows too.
  """
  low, high = 0, max(1, start // unit)
  while fits(high * unit):
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle * unit) else (low, middle)
  return low * unit
