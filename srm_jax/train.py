"""One loop for every recipe: train(config, workdir) -> Run."""

import contextlib
import dataclasses
import functools
import logging
import pathlib
import signal
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import PartitionSpec

from srm_jax import alarms, checkpoints, diagnostics, hosts, metrics, optimizers, schema, sharding
from srm_jax.data import tokenizer as tokenizers
from srm_jax.models import adapters, transformer, weights
from srm_jax.models.adapters import AdapterConfig
from srm_jax.models.config import TransformerConfig, forward_flops, train_flops
from srm_jax.recipes import RECIPES, adapted
from srm_jax.recipes.context import Context
from srm_jax.train_step import build_train_step, init_state, value_and_grad
from srm_jax.types import Batch, Pairs, Params, Recipe, Rollouts, TrainState

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """One training run.

  tokenizer: name, file or workdir. init_from: workdir whose newest parameters to start from; '' starts fresh.
  model: its vocab_size may be 0 (the tokenizer's). recipe: opened by the recipe itself. mesh: sizes of the mesh axes,
  () for all devices on 'fsdp'. adapters: with rank 0 the whole model is trained; above, adapters alone, and what
  init_from holds stays frozen, in the compute dtype or quantised. checkpoint_every 0 saves at the end only.
  ema_decay 0 keeps no average. overfit_one_batch trains on the batch of step 0 for ever.
  """

  seed: int
  num_steps: int
  tokenizer: str
  init_from: str
  model: TransformerConfig
  recipe: Mapping[str, Any]
  adapters: AdapterConfig
  optimizer: optimizers.OptimizerConfig
  mesh: tuple
  microbatches: int
  ema_decay: float
  log_every: int
  checkpoint_every: int
  keep_checkpoints: int
  overfit_one_batch: bool
  progress: bool


class Run(NamedTuple):
  """A finished run: where it is, its last step, its parameters and the rows of metrics.jsonl."""

  workdir: pathlib.Path
  config: TrainConfig
  step: int
  params: Params
  metrics: list[dict]


class NonFiniteError(RuntimeError):
  """The loss or a gradient stopped being finite; the message names step, place and the saved batch."""


class _Setup(NamedTuple):
  config: TrainConfig
  context: Context
  recipe: Recipe
  mesh: Any
  frozen: dict
  names: Any
  tx: Any


def train(config: ml_collections.ConfigDict, workdir) -> Run:
  """Trains, or continues, the run of `config` in `workdir`.

  The same call continues where a killed run stopped, and gives the parameters of an uninterrupted one bit for bit.

  Raises:
    ConfigError: the config does not fit itself, its data, its teacher or the workdir, and nothing has been compiled; or
      it does not fit the devices' memory.
    NonFiniteError: a loss or gradient is not finite. The last good state is saved as a checkpoint.
    KeyboardInterrupt: Ctrl-C or SIGTERM; the state is saved first.
  """
  plain = schema.resolve(config)
  parsed = schema.parse(TrainConfig, plain, 'config')
  workdir = pathlib.Path(workdir)
  mesh = sharding.make_mesh(parsed.mesh)
  with jax.set_mesh(mesh), _memory_said(parsed):
    setup = _setup(parsed, mesh)
    tracked = {key: value for key, value in plain.items() if key != 'progress'}
    hosts.first(lambda: checkpoints.claim(workdir, tracked))
    hosts.first(lambda: checkpoints.describe_model(workdir, setup.context.model, parsed.tokenizer))
    saved = checkpoints.open_checkpoints(workdir, keep=parsed.keep_checkpoints)
    try:
      state = _loop(setup, workdir, saved)
    finally:
      saved.close()
  return Run(workdir, parsed, int(state.step), state.params, metrics.read(workdir))


@contextlib.contextmanager
def _memory_said(config: TrainConfig):
  """Says of devices that are full what a run can do about it: above all a teacher may not fit beside its student."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    teacher = config.recipe.get('teacher')
    beside, cached = '', ''
    if teacher:
      beside, cached = f', with teacher {teacher} beside it', ', a cached teacher (experiments.cache_teacher)'
    raise schema.ConfigError(
        f"the run does not fit the devices' memory{beside}; fix: more devices or another config.mesh, more "
        f'config.microbatches, fewer or shorter rows, config.model.remat{cached}. What fits experiments.plan tells '
        f'beforehand. XLA says: {str(error).splitlines()[0]}'
    ) from error


def _setup(config: TrainConfig, mesh) -> _Setup:
  tokenizer = tokenizers.load(config.tokenizer)
  model = _model(config, tokenizer)
  context = Context(model, tokenizer, config.seed, config.num_steps)
  build = schema.choose('recipe', config.recipe.get('name', ''), RECIPES)
  if config.adapters.rank:
    adapted.check(model, config.adapters)
  recipe = build(config.recipe, context)
  if config.microbatches > 1 and recipe.objective.indivisible:
    raise schema.ConfigError(f'config.microbatches={config.microbatches}, but {recipe.objective.indivisible}; fix: 1')
  names = trained_names(config, model)
  if recipe.extra_params is not None:
    extra = jax.eval_shape(recipe.extra_params, jax.random.key(0))
    names |= jax.tree.map(lambda _: PartitionSpec(), extra)
  tx = optimizers.make_optimizer(config.optimizer, config.num_steps, names)
  if config.adapters.rank:
    base = _start(config, model, model.dtype, mesh)
    recipe = adapted.adapt(recipe, model, config.adapters, base, mesh)
  frozen = {name: params for name, (_, params) in recipe.frozen.items()}
  return _Setup(config, context, recipe, mesh, frozen, names, tx)


def trained_names(config: TrainConfig, model: TransformerConfig) -> dict:
  """Logical names of what is trained of the model: all of it, or its adapters."""
  if config.adapters.rank:
    return {'adapters': adapters.adapter_names(model, config.adapters)}
  return {'model': transformer.param_names(model)}


def _model(config: TrainConfig, tokenizer) -> TransformerConfig:
  model = config.model
  if model.vocab_size == 0:
    model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
  if model.vocab_size < tokenizer.vocab_size:
    raise schema.ConfigError(
        f'config.model.vocab_size={model.vocab_size} is below the tokenizer\'s {tokenizer.vocab_size}'
    )
  if config.init_from:
    theirs = dataclasses.asdict(checkpoints.model_config(config.init_from))
    free = {*weights.OURS, 'max_length'}
    differing = [
        f'{k}={v} (there {theirs[k]})' for k, v in dataclasses.asdict(model).items()
        if k not in free and v != theirs[k]
    ]
    if differing:
      raise schema.ConfigError(f'config.model does not fit init_from={config.init_from}: {", ".join(differing)}')
    if checkpoints.model_tokenizer(config.init_from).fingerprint != tokenizer.fingerprint:
      raise schema.ConfigError(
          f'init_from={config.init_from} was trained with another tokenizer than {config.tokenizer}'
      )
  return model


def _keys(config: TrainConfig):
  """Of the model (or its adapters), and of what is trained beside it."""
  return jax.random.split(jax.random.key(config.seed))


def _start(config: TrainConfig, model: TransformerConfig, dtype: str, mesh) -> Params:
  """The model's first parameters: those of init_from, or random ones of the seed."""
  if config.init_from:
    params = checkpoints.load_model(config.init_from, dtype=dtype).params
    return jax.device_put(params, sharding.shardings(transformer.param_names(model), params, mesh))
  make = lambda key: transformer.cast(transformer.init_params(model, key), dtype)
  return _make(make, transformer.param_names(model), mesh, _keys(config)[0])


def _make(function, names, mesh, *arguments):
  """function(*arguments), created where the names say."""
  placed = sharding.shardings(names, jax.eval_shape(function, *arguments), mesh)
  return jax.jit(function, out_shardings=placed, compiler_options=_once(mesh))(*arguments)


def _fresh_params(setup: _Setup) -> Params:
  config, model = setup.config, setup.context.model
  if config.adapters.rank:
    make = functools.partial(adapters.init_adapters, model, config.adapters)
    own = _make(make, setup.names['adapters'], setup.mesh, _keys(config)[0], setup.frozen[adapted.BASE])
    params = {'adapters': own}
  else:
    params = {'model': _start(config, model, model.param_dtype, setup.mesh)}
  if setup.recipe.extra_params is None:
    return params
  extra = {name: names for name, names in setup.names.items() if name not in params}
  return {**params, **_make(setup.recipe.extra_params, extra, setup.mesh, _keys(config)[1])}


def _fresh_state(setup: _Setup) -> TrainState:
  params = _fresh_params(setup)
  placed = jax.tree.map(lambda leaf: leaf.sharding, params)
  init = lambda params: init_state(params, setup.tx, ema=setup.config.ema_decay > 0)
  shape = jax.eval_shape(init, params)
  rest = {
      name: sharding.like_params(getattr(shape, name), params, placed, setup.mesh)
      for name in ('step', 'opt_state', 'ema')
  }
  return jax.jit(init, out_shardings=TrainState(params=placed, **rest), compiler_options=_once(setup.mesh))(params)


def _once(mesh) -> dict:
  """Compiler options of a program that runs once: LLVM takes seconds to optimise random numbers that take
  milliseconds.
  """
  return {'xla_backend_optimization_level': 0} if mesh.devices.flat[0].platform == 'cpu' else {}


def _restore(setup: _Setup, saved, state: TrainState) -> tuple[TrainState, float]:
  """The newest whole checkpoint's state and FLOPs so far, with the source's cursor set; `state` where there is none."""
  prints = {name: checkpoints.fingerprint(params) for name, params in setup.frozen.items()}
  found = saved.restore_latest(state)
  if found is None:
    return state, 0.0
  if found.meta['frozen'] != prints:
    raise schema.ConfigError(
        f'the frozen models changed since the checkpoint: {found.meta["frozen"]} then, {prints} now'
    )
  setup.recipe.source.set_state(found.meta['source'])
  _LOG.info('continuing at step %d', int(found.state.step))
  return found.state, found.meta['flops']


def _meta(setup: _Setup, flops: float) -> dict:
  prints = {name: checkpoints.fingerprint(params) for name, params in setup.frozen.items()}
  return {'source': setup.recipe.source.get_state(), 'frozen': prints, 'flops': flops}


def step_flops(setup_model: TransformerConfig, recipe: Recipe, batch) -> float:
  """Useful FLOPs of one step: the student's forward and backward, frozen models' forward, and sampling of rollouts.

  Under adapters the student's weights have no gradient, which is a third of the work; the base's own forward pass is
  counted with the frozen models, and what the adapters multiply is left out.
  """
  rows: Batch = getattr(batch, 'batch', batch)
  tokens = int(np.count_nonzero(rows.segment_ids))
  context = float(np.sum(rows.positions)) / max(tokens, 1)
  student = forward_flops if adapted.BASE in recipe.frozen else train_flops
  flops = student(setup_model, tokens, context)
  flops += sum(forward_flops(config, tokens, context) for config, _ in recipe.frozen.values())
  return flops + sampled_share(batch) * forward_flops(setup_model, tokens, context)


def sampled_share(batch) -> float:
  """Completions that the student sampled, a row of a Batch, Rollouts or Pairs; of Pairs those that were passed over
  count too.
  """
  if isinstance(batch, Pairs):
    return 0.0 if batch.sampled is None else float(np.mean(batch.sampled))
  if not isinstance(batch, Rollouts):
    return 0.0
  return 1.0 if batch.sampled is None else float(np.mean(batch.sampled))


def describe(batch) -> str:
  """'12 x 160 tokens, 1024 of 1890 that are not padding supervised' of a Batch, Rollouts or Pairs."""
  rows: Batch = getattr(batch, 'batch', batch)
  supervised, real = np.count_nonzero(rows.loss_mask), np.count_nonzero(rows.segment_ids)
  return f'{" x ".join(map(str, rows.inputs.shape))} tokens, {supervised} of {real} that are not padding supervised'


class _Interrupts:
  """Remembers Ctrl-C and SIGTERM until the step boundary."""

  def __enter__(self):
    self.signal = None
    self.main = threading.current_thread() is threading.main_thread()
    names = (signal.SIGINT, signal.SIGTERM) if self.main else ()
    self.before = {name: signal.signal(name, self._remember) for name in names}
    return self

  def _remember(self, number, frame):
    del frame
    self.signal = number

  def __exit__(self, *_):
    for name, handler in self.before.items():
      signal.signal(name, handler)


def _compiled_step(setup: _Setup, state: TrainState):
  """The jitted train step; the state stays where it is, so that a run and its continuation use one program."""
  config = setup.config
  step = build_train_step(
      setup.recipe.objective, setup.tx, microbatches=config.microbatches, ema_decay=config.ema_decay,
  )
  return jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))


def _loop(setup: _Setup, workdir, saved) -> TrainState:
  config, recipe = setup.config, setup.recipe
  for key, value in recipe.objective.resolved.items():
    _LOG.info('%s: %s', key, value)
  state, flops = _restore(setup, saved, _fresh_state(setup))
  step_fn = _compiled_step(setup, state)
  start = int(state.step)
  writer = metrics.open_writer(workdir, step=start)
  watch = alarms.watcher(metrics.read(workdir))
  silent = not config.progress or jax.process_index() > 0
  bar = metrics.progress(config.recipe['name'], config.num_steps, done=start, disable=silent)
  key, collected, clock, pending = jax.random.key(config.seed), [], time.perf_counter(), None
  with _Interrupts() as interrupts, bar:
    for step in range(start, config.num_steps):
      if pending is None or not config.overfit_one_batch:
        host_batch = recipe.source.next(state.params, 0 if config.overfit_one_batch else step)
      if step == start:
        _LOG.info('first batch: %s', describe(host_batch))
      flops += sum(hosts.gather(step_flops(setup.context.model, recipe, host_batch)))
      batch = sharding.shard_rows(host_batch, setup.mesh)
      _check_finite(setup, workdir, saved, state, pending, flops)  # before another step moves the last good state
      state, out = step_fn(state, batch, setup.frozen, jax.random.fold_in(key, step))
      collected.append(out)
      pending = (step, batch, out)
      last = step + 1 == config.num_steps
      if (step + 1) % config.log_every == 0 or last:
        row = metrics.values(metrics.merge(collected))
        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        row |= {'flops': flops, 'seconds_per_step': seconds / len(collected)}
        writer.write(step + 1, row)
        for alarm in watch({'step': step + 1, **row}):
          _LOG.warning('%s', alarms.message(alarm))
        collected = []
        bar.advance(0, loss=row['loss'])
      bar.advance(1)
      stop = any(hosts.gather(interrupts.signal is not None))
      if last or stop or (config.checkpoint_every and (step + 1) % config.checkpoint_every == 0):
        _check_finite(setup, workdir, saved, state, pending, flops)
        saved.save(state, _meta(setup, flops))
      if stop and not last:
        writer.close()
        raise KeyboardInterrupt(f'stopped after step {step + 1}; the same command continues')
  writer.close()
  return state


def _check_finite(setup: _Setup, workdir, saved, state, pending, flops):
  """Stops when the step in `pending` was not finite: saves state and batch, and says where it began."""
  if pending is None or float(pending[2]['finite'].total):
    return
  step, batch, _ = pending
  path = pathlib.Path(workdir) / f'non_finite_batch_{step}.npz'
  leaves = jax.tree_util.tree_leaves_with_path(batch)
  arrays = {jax.tree_util.keystr(p, simple=True, separator='.'): hosts.whole(x) for p, x in leaves}
  hosts.first(lambda: np.savez(path, **arrays))
  saved.save(state, _meta(setup, flops))
  saved.manager.wait_until_finished()
  key = jax.random.fold_in(jax.random.key(setup.config.seed), step)
  grads = value_and_grad(setup.recipe.objective, state.params, batch, setup.frozen, key, step=step)[1]
  params = state.params
  if setup.config.adapters.rank:
    params = adapted.joined(setup.context.model, setup.config.adapters, params, setup.frozen[adapted.BASE])
  place = diagnostics.first_non_finite(setup.context.model, params, getattr(batch, 'batch', batch), grads)
  raise NonFiniteError(
      f'step {step}: not finite, first in {place}. The state before it is saved as checkpoint {int(state.step)}, '
      f'the batch in {path}. Lower the learning rate, or look at the batch'
  )
