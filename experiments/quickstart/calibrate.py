"""Some seconds of measuring before a run: which compute dtype is faster here, and what training and decoding take."""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import re
import time
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.batches import make_batch
from srm_jax import optimizers, schema, sharding, train_step
from srm_jax.inference import make_generate
from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig, train_flops
from srm_jax.recipes import sft
from srm_jax.types import Prompt, SamplingParams

DTYPES = ('float32', 'bfloat16')
STEP_SHARE = 0.25  # of the rate of bare products that a whole train step reaches, where none was measured
STEP_MARGIN, PRODUCT_MARGIN = 1.1, 2.0  # how much faster bfloat16 must be
DECODE_COST = 1.0  # times a training token, for a decoded token, where none was measured
PROMPT_TOKENS = 24


class Speed(NamedTuple):
  """seconds a trained token and a decoded token, for 'teacher' and 'student'; seconds to compile a program.

  products: FLOP/s of matrix products by dtype. seconds: that measuring took.
  """

  dtype: str
  train: dict[str, float]
  decode: dict[str, float]
  compile: float
  products: dict[str, float]
  seconds: float


class Timed(NamedTuple):
  """seconds of one call, a token or product; seconds that its program took to compile."""

  seconds: float
  compiling: float


def calibrate(config: Mapping[str, Any], *, limit: float) -> Speed:
  """Measures on this machine what the models of a quickstart config cost.

  Args:
    config: of configs/quickstart.py.
    limit: seconds; a measurement that would begin later is replaced by an extrapolation. 0 measures products only.
  """
  start, stages = time.perf_counter(), config['stages']
  vocab = stages['tokenizer']['config']['vocab_size']
  sections = {name: stages[stage]['config'] for name, stage in (('teacher', 'teacher'), ('student', 'base'))}

  def in_time() -> bool:
    return time.perf_counter() - start < limit

  with jax.set_mesh(sharding.make_mesh()):
    rates = {dtype: _product_rate(sections['teacher'], dtype) for dtype in DTYPES}
    tried = DTYPES if rates['bfloat16'] > rates['float32'] else DTYPES[:1]
    steps = {dtype: _train_token(sections['teacher'], vocab, dtype) for dtype in tried if in_time()}
    dtype = choose(rates, {name: timed.seconds for name, timed in steps.items()})
    train = {'teacher': steps[dtype]} if dtype in steps else {}
    if in_time():
      train['student'] = _train_token(sections['student'], vocab, dtype)
    decode = {}
    if in_time():
      decode['teacher'] = _decode_token(sections['teacher'], vocab, stages['annotate']['config'], dtype)
  flops = {name: train_flops(_model(section, vocab, dtype), 1) for name, section in sections.items()}
  train_seconds = _complete(train, flops, 1 / (STEP_SHARE * rates[dtype]))
  # Between two sizes decoding grows about as the root of the FLOPs: half of a step is products, half what is around.
  roots = {name: value**0.5 for name, value in flops.items()}
  decode_seconds = _complete(decode, roots, DECODE_COST * train_seconds['teacher'] / roots['teacher'])
  compiling = [timed.compiling for timed in (*train.values(), *decode.values())]
  mean = float(np.mean(compiling)) if compiling else 0.0
  return Speed(dtype, train_seconds, decode_seconds, mean, rates, time.perf_counter() - start)


def choose(rates: Mapping[str, float], steps: Mapping[str, float]) -> str:
  """bfloat16 where it is clearly faster: a tie goes to float32, in which the reference was made.

  Args:
    rates: FLOP/s of products by dtype, which decide where not both steps were timed. They say less than a step does.
    steps: seconds of a train step by dtype.
  """
  if set(steps) == set(DTYPES):
    return 'bfloat16' if STEP_MARGIN * steps['bfloat16'] < steps['float32'] else 'float32'
  return 'bfloat16' if rates['bfloat16'] > PRODUCT_MARGIN * rates['float32'] else 'float32'


def _complete(measured: Mapping[str, Timed], work: Mapping[str, float], otherwise: float) -> dict[str, float]:
  """Seconds a token for every model: measured, in proportion to its work from one that was, or `otherwise` a unit."""
  rate = next((timed.seconds / work[name] for name, timed in measured.items()), otherwise)
  return {name: measured[name].seconds if name in measured else rate * work[name] for name in work}


def _fastest(call: Callable[[], Any], repeats: int = 3) -> Timed:
  """The shortest of several calls; what the first took beyond that is compilation."""
  seconds = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    jax.block_until_ready(call())
    seconds.append(time.perf_counter() - start)
  best = min(seconds[1:])
  return Timed(best, max(0.0, seconds[0] - best))


def _product_rate(section, dtype: str) -> float:
  """FLOP/s of a layer's forward product and both gradients."""
  model, batch = section['model'], section['recipe']['batch']
  tokens, wide, narrow = batch['size'] * batch['length'], model['mlp_dim'], model['embed_dim']
  x, w, g = (jnp.ones(shape, dtype) for shape in ((tokens, narrow), (narrow, wide), (tokens, wide)))
  products = jax.jit(lambda x, w, g: (x @ w, g @ w.T, x.T @ g))
  return 6.0 * tokens * wide * narrow / _fastest(lambda: products(x, w, g), repeats=5).seconds


def _model(section, vocab: int, dtype: str) -> TransformerConfig:
  """The model of a training section, with the vocabulary that the tokenizer will have."""
  model = schema.parse(TransformerConfig, dict(section['model']), 'model')
  return dataclasses.replace(model, dtype=dtype, vocab_size=vocab)


def _train_token(section, vocab: int, dtype: str) -> Timed:
  """A token of a full batch in the section's train step, with its optimizer."""
  model, recipe = _model(section, vocab, dtype), section['recipe']
  shape = (recipe['batch']['size'], recipe['batch']['length'])
  names = {'model': transformer.param_names(model)}
  options = schema.parse(optimizers.OptimizerConfig, dict(section['optimizer']), 'optimizer')
  tx = optimizers.make_optimizer(options, section['num_steps'], names)
  objective = sft.objective(model, head_chunk=recipe['head_chunk'])
  step = jax.jit(train_step.build_train_step(objective, tx), donate_argnums=0)
  params = {'model': transformer.init_params(model, jax.random.key(0))}
  state, key = train_step.init_state(params, tx), jax.random.key(1)
  batch = sharding.shard_rows(make_batch(model.vocab_size, *shape), jax.sharding.get_mesh())

  def once():
    nonlocal state
    state, metrics = step(state, batch, {}, key)
    return metrics['loss'].total

  timed = _fastest(once)
  return timed._replace(seconds=timed.seconds / (shape[0] * shape[1]))


def _decode_token(section, vocab: int, annotate, dtype: str) -> Timed:
  """A sampled token in a full batch that runs to its limit."""
  model, rows = _model(section, vocab, dtype), annotate['batch_size']
  blank = types.SimpleNamespace(encode=lambda text: [1] * PROMPT_TOKENS, decode=lambda tokens: '', eos_id=2)
  params = jax.jit(transformer.init_params, static_argnums=0)(model, jax.random.key(0))
  generate = make_generate(model, params, blank, batch_size=rows, stop_at_eos=False)
  prompts = [Prompt(str(row), '') for row in range(rows)]
  sampling = SamplingParams(max_new_tokens=annotate['sampling']['max_new_tokens'])
  timed = _fastest(lambda: len(generate(prompts, sampling)), repeats=1)
  return timed._replace(seconds=timed.seconds / (rows * sampling.max_new_tokens))


def machine() -> dict[str, Any]:
  """The class of this machine and the versions that matter: no name, no path."""
  devices = jax.devices()
  try:
    info = pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8').split('\n\n')[0]
  except OSError:
    info = ''
  known = ('amx_bf16', 'avx512_bf16', 'avx512f', 'avx2', 'neon', 'asimd')
  flags = ' '.join(flag for flag in known if re.search(rf'\b{flag}\b', info))
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  versions = {name: importlib.metadata.version(name) for name in ('jax', 'flax', 'optax', 'reasoning-gym')}
  return {
      'devices': f'{len(devices)} × {devices[0].device_kind}', 'cores': cores,
      'processor': f'{platform.machine()} {flags}'.strip(), 'system': platform.system(),
      'python': platform.python_version(), **versions,
  }
