"""Checkpoints of a run: whole or absent, verified on restore, and models read back from a finished run.

A run's workdir holds
  config.json      the resolved configuration, which later starts must match
  model.json       the TransformerConfig
  tokenizer/       a copy of the tokenizer
  checkpoints/N/   params, optimizer (with step and ema) and meta (source cursor, fingerprints)
"""

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from srm_jax import schema, sharding
from srm_jax.data import tokenizer as tokenizers
from srm_jax.models import adapters, transformer, weights
from srm_jax.models.adapters import AdapterConfig
from srm_jax.models.config import TransformerConfig
from srm_jax.schema import ConfigError
from srm_jax.types import Params, TrainState

_LOG = logging.getLogger(__name__)


class Restored(NamedTuple):
  """state, and the JSON that was saved with it: {'source': ..., 'frozen': ...}."""

  state: TrainState
  meta: dict[str, Any]


@jax.jit
def _leaf_fingerprints(leaves):
  def one(x):
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
    flat = bits.astype(jnp.uint32).reshape(-1)
    place = jnp.arange(flat.size, dtype=jnp.uint32) * jnp.uint32(2654435761) + jnp.uint32(1)
    return jnp.sum((flat ^ (flat >> 15)) * (place | 1), dtype=jnp.uint32)

  return [one(x) for x in leaves]


def fingerprint(tree) -> str:
  """A content hash of a tree of arrays by wrapping integer sums: the same on every mesh, cheap on the device."""
  sums = np.asarray(jax.device_get(_leaf_fingerprints(jax.tree.leaves(tree))), np.uint64)
  mixed = 0
  for value in sums:
    mixed = (mixed * 1_000_003 + int(value) + 1) % (1 << 61)
  return f'{mixed:016x}'


def _split(state: TrainState):
  return state.params, {'step': state.step, 'opt_state': state.opt_state, 'ema': state.ema}


class Checkpoints(NamedTuple):
  """The checkpoints of one run."""

  manager: ocp.CheckpointManager

  def save(self, state: TrainState, meta: Mapping[str, Any]):
    """Saves at state.step (a step that is there already stays); meta must be JSON."""
    step = int(state.step)
    if step in self.manager.all_steps():
      return
    params, rest = _split(state)
    prints = {'params': fingerprint(params), 'rest': fingerprint(rest)}
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(params), rest=ocp.args.StandardSave(rest),
        meta=ocp.args.JsonSave({**meta, 'fingerprints': prints}),
    )
    self.manager.save(step, args=items)

  def restore_latest(self, like: TrainState) -> Restored | None:
    """The newest checkpoint that is whole, onto the shapes and shardings of `like`; None if there is none.

    A damaged one is reported and set aside (renamed), and the one before it is used.

    Raises:
      ValueError: there are checkpoints and none of them can be read.
    """
    steps = sorted(self.manager.all_steps(), reverse=True)
    for step in steps:
      try:
        return self._restore(step, like)
      except Exception as error:  # orbax and tensorstore raise many types; each means that this one is unusable
        _LOG.warning('checkpoint %d is damaged (%s); trying the one before it', step, str(error)[:200])
        folder = epath.Path(self.manager.directory) / str(step)
        folder.rename(folder.with_name(f'damaged-{step}-{time.time_ns()}'))
        self.manager.reload()
    if steps:
      raise ValueError(
          f'none of the checkpoints {steps} in {self.manager.directory} can be read; remove the folder to start anew'
      )
    return None

  def _restore(self, step, like):
    params, rest = jax.tree.map(_abstract, _split(like))
    items = ocp.args.Composite(
        params=ocp.args.StandardRestore(params), rest=ocp.args.StandardRestore(rest), meta=ocp.args.JsonRestore()
    )
    found = self.manager.restore(step, args=items)
    state = TrainState(found['rest']['step'], found['params'], found['rest']['opt_state'], found['rest']['ema'])
    params, rest = _split(state)
    if found['meta'].pop('fingerprints') != {'params': fingerprint(params), 'rest': fingerprint(rest)}:
      raise ValueError('its content does not match the fingerprint that was saved with it')
    return Restored(state, found['meta'])

  def restore_params(self, step: int, names: Params) -> Params:
    """The parameters of a step, checked, where the current mesh wants them; on one device where there is no mesh.

    Args:
      names: {'model': tree of logical names}; what is not named is whole on every device.
    """
    mesh = jax.sharding.get_mesh()
    mesh = sharding.make_mesh((1, 1, 1), devices=jax.local_devices()[:1]) if mesh.empty else mesh
    found = dict(self.manager.item_metadata(step)['params'])
    saved = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), found)
    names = {
        key: names.get(key, jax.tree.map(lambda _: jax.sharding.PartitionSpec(), tree)) for key, tree in saved.items()
    }
    like = jax.tree.map(
        lambda x, place: x.update(sharding=place), saved, sharding.shardings(names, saved, mesh)
    )
    items = ocp.args.Composite(params=ocp.args.StandardRestore(like), meta=ocp.args.JsonRestore())
    found = self.manager.restore(step, args=items)
    if found['meta']['fingerprints']['params'] != fingerprint(found['params']):
      raise ValueError('its content does not match the fingerprint that was saved with it')
    return found['params']

  def close(self):
    self.manager.wait_until_finished()
    self.manager.close()


def _abstract(x):
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def open_checkpoints(workdir, *, keep: int = 2) -> Checkpoints:
  """The checkpoints below a workdir, of which the newest `keep` stay."""
  folder = epath.Path(workdir).absolute() / 'checkpoints'
  options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
  handlers = {
      'params': ocp.StandardCheckpointHandler(), 'rest': ocp.StandardCheckpointHandler(),
      'meta': ocp.JsonCheckpointHandler(),
  }
  return Checkpoints(ocp.CheckpointManager(folder, options=options, item_handlers=handlers))


def write_whole(path, text: str):
  """Writes a file so that a kill leaves the old one or the new one, never a part."""
  path = epath.Path(path)
  temporary = path.with_name(f'{path.name}.tmp')
  temporary.write_text(text)
  temporary.replace(path)


def claim(workdir, config: Mapping[str, Any]):
  """Makes a workdir belong to a config, or checks that it does.

  Raises:
    ConfigError: the workdir was begun with another config; the differing keys are named.
  """
  workdir = epath.Path(workdir)
  path = workdir / 'config.json'
  if path.exists():
    differing = _differences(json.loads(path.read_text()), json.loads(json.dumps(config)))
    if differing:
      raise ConfigError(f'{workdir} was begun with another config: {"; ".join(differing)}. Use another --workdir')
    return
  workdir.mkdir(parents=True, exist_ok=True)
  write_whole(path, json.dumps(config, indent=1, sort_keys=True))


def describe_model(workdir, config: TransformerConfig, tokenizer: str):
  """Writes what `load_model` needs beside the parameters: the TransformerConfig and a copy of the tokenizer."""
  workdir = epath.Path(workdir)
  tokenizers.copy(tokenizer, workdir / 'tokenizer')
  write_whole(workdir / 'model.json', json.dumps(dataclasses.asdict(config), indent=1))


def _differences(old, new, where='config') -> list[str]:
  if isinstance(old, dict) and isinstance(new, dict):
    keys = sorted(old.keys() | new.keys())
    return [line for key in keys for line in _differences(old.get(key), new.get(key), f'{where}.{key}')]
  return [] if old == new else [f'{where} was {old!r}, is {new!r}']


class Model(NamedTuple):
  """A trained model read from a workdir, or a published one (step 0). extra: what was trained beside it, by name."""

  config: TransformerConfig
  params: Params
  tokenizer: Any
  step: int
  fingerprint: str
  extra: Params


def is_published(folder) -> bool:
  """Whether a folder is a published model (config.json names an architecture) rather than the workdir of a run."""
  path = epath.Path(folder) / weights.CONFIG
  if (epath.Path(folder) / 'model.json').exists() or not path.exists():
    return False
  try:
    return 'architectures' in json.loads(path.read_text())
  except ValueError:
    return False


def model_config(folder) -> TransformerConfig:
  """The TransformerConfig of a run's workdir, or of a published model.

  Raises:
    ConfigError: the folder holds no model, or a published one that is not supported.
  """
  if is_published(folder):
    return _as_config_error(weights.read_config, folder)[1]
  path = epath.Path(folder) / 'model.json'
  if not path.exists():
    raise ConfigError(
        f'{folder} holds no model (neither model.json nor a config.json with architectures); give the workdir of a '
        'finished training run, or the folder of a published model'
    )
  return TransformerConfig(**json.loads(path.read_text()))


def model_tokenizer(folder):
  """The tokenizer of a run's workdir, or of a published model.

  Raises:
    ConfigError: it is missing or damaged, or has ids that the model has no rows for.
  """
  path = folder if is_published(folder) else epath.Path(folder) / 'tokenizer'
  tokenizer = _as_config_error(tokenizers.load, path)
  rows = model_config(folder).vocab_size
  _as_config_error(lambda given: tokenizers.require_rows(given, rows, model=str(folder)), tokenizer)
  return tokenizer


def _as_config_error(function, argument):
  """function(argument); what it finds wrong with the user's files is a ConfigError."""
  try:
    return function(argument)
  except ConfigError:
    raise
  except ValueError as error:
    raise ConfigError(str(error)) from error


def load_model(folder, *, dtype: str | None = None, step: int | None = None) -> Model:
  """The model of a run's newest checkpoint, or a published one, on the current mesh (or one device).

  A run that trained adapters gives its base with the adapters merged in; the base must still be where it was.

  Args:
    folder: workdir of a run, or folder of a published model.
    dtype: what the parameters are cast to; None keeps theirs.
    step: of a run's checkpoint to take in the newest one's place.

  Raises:
    ConfigError: no model or no such finished checkpoint in the folder, or one that is damaged or not supported.
  """
  config, tokenizer = model_config(folder), model_tokenizer(folder)
  if is_published(folder):
    config, params = _as_config_error(functools.partial(weights.load_pretrained, dtype=dtype), folder)
    return Model(config, params, tokenizer, 0, fingerprint(params), {})
  section = adapters_of(folder)
  own, names = 'model', transformer.param_names(config)
  if section is not None:
    own, names = 'adapters', adapters.adapter_names(config, section)
  step, saved = _saved(folder, {own: names}, step)
  params = saved['model'] if section is None else _merged(folder, config, section, saved['adapters'])
  params = place(config, params, dtype)
  extra = {name: tree for name, tree in saved.items() if name != own}
  return Model(config, params, tokenizer, step, fingerprint(params), extra)


def load_adapters(folder) -> tuple[int, Params]:
  """(step, adapters) of the newest checkpoint of a run that trained adapters.

  Raises:
    ConfigError: it trained none, or has no finished checkpoint.
  """
  config, section = model_config(folder), adapters_of(folder)
  if section is None:
    raise ConfigError(f'{folder} trained no adapters (config.adapters.rank is 0)')
  step, saved = _saved(folder, {'adapters': adapters.adapter_names(config, section)})
  return step, saved['adapters']


def _saved(folder, names: Params, step: int | None = None) -> tuple[int, Params]:
  """(step, parameters) of the checkpoint of a step below a workdir; None for the newest."""
  checkpoints = open_checkpoints(folder)
  steps = sorted(checkpoints.manager.all_steps(), reverse=True)
  if not steps:
    raise ConfigError(f'{folder} has no finished checkpoint; let its training run save one first')
  step = steps[0] if step is None else step
  if step not in steps:
    raise ConfigError(f'{folder} keeps no checkpoint of step {step}; choose from {steps}')
  try:
    return step, checkpoints.restore_params(step, names)
  except Exception as error:  # as in restore_latest
    raise ConfigError(
        f'checkpoint {step} of {folder} is damaged ({str(error)[:200]}); '
        'run its training again, it falls back by itself'
    ) from error
  finally:
    checkpoints.close()


def run_config(folder) -> dict[str, Any]:
  """The resolved configuration of a run's workdir; {} where none was kept."""
  path = epath.Path(folder) / 'config.json'
  return json.loads(path.read_text()) if path.exists() else {}


def adapters_of(folder) -> AdapterConfig | None:
  """The adapters that a run trained on a frozen base; None where it trained the whole model."""
  section = run_config(folder).get('adapters', {})
  return schema.parse(AdapterConfig, section, 'config.adapters') if section.get('rank') else None


def _merged(folder, config: TransformerConfig, section: AdapterConfig, trained: Params) -> Params:
  """A run's base, as it was frozen, with the trained adapters merged in.

  Raises:
    ConfigError: the run began with random weights, which are not kept.
  """
  start = run_config(folder)['init_from']
  if not start:
    raise ConfigError(f'{folder} trained adapters of random weights, which are not kept; give such runs an init_from')
  base = load_model(start, dtype=config.dtype).params

  @jax.jit
  def merge(base, trained):
    frozen = adapters.quantize(config, base, section.base) if section.base else base
    return transformer.cast(adapters.merge(config, adapters.join(config, section, frozen, trained)), config.param_dtype)

  return merge(base, trained)


def place(config: TransformerConfig, params: Params, dtype: str | None = None) -> Params:
  """Parameters put where the current mesh wants them, optionally cast."""
  if dtype is not None:
    params = transformer.cast(params, dtype)
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return jax.tree.map(jnp.asarray, params)
  return jax.device_put(params, sharding.shardings(transformer.param_names(config), params, mesh))
