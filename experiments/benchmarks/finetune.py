"""What a published shape takes on this machine: a step of fine-tuning and a few greedy tokens.

  python -m experiments.benchmarks.finetune [--shape=qwen2.5-0.5b] [--length=256] [--new_tokens=32] [--dtype=float32]

Random weights. Every part runs in a process of its own and prints seconds (the second step; compilation apart) and the
process's peak memory. `full` trains all weights with AdamW, `lora` adapters of rank 16 on a frozen base.
"""

import dataclasses
import json
import subprocess
import sys
import time

from absl import app, flags

from experiments import runtime
from experiments.benchmarks import timing
from experiments.benchmarks.batches import Numbers, make_batch

SHAPE = flags.DEFINE_string('shape', 'qwen2.5-0.5b', 'a preset of srm_jax.models.families')
LENGTH = flags.DEFINE_integer('length', 256, 'tokens of the one row of a step, and of the prompt', lower_bound=2)
NEW_TOKENS = flags.DEFINE_integer('new_tokens', 32, 'greedy tokens', lower_bound=1)
DTYPE = flags.DEFINE_string('dtype', 'float32', 'compute type; weights that are trained are float32')
PART = flags.DEFINE_string('part', '', 'run this part and print a line of JSON; used by the benchmark itself')


def shape():
  from srm_jax.models.families import PRESETS
  from srm_jax.schema import choose

  preset = choose('shape', SHAPE.value, PRESETS)
  return dataclasses.replace(preset, dtype=DTYPE.value, remat='full', max_length=LENGTH.value + NEW_TOKENS.value)


def fresh(config):
  import jax

  from srm_jax.models import transformer

  return jax.jit(transformer.init_params, static_argnums=0)(config, jax.random.key(0))


def timed(call):
  """Seconds of the first call and of the second."""
  import jax

  seconds = []
  for _ in range(2):
    start = time.perf_counter()
    jax.block_until_ready(call())
    seconds.append(time.perf_counter() - start)
  return seconds


def full():
  """A step on all weights."""
  from srm_jax.models import transformer
  from srm_jax.recipes import sft

  config = shape()
  names = {'model': transformer.param_names(config)}
  return _steps(config, sft.objective(config, head_chunk=None), names, {'model': fresh(config)}, {})


def lora():
  """A step on adapters of a frozen base in the compute dtype."""
  import jax

  from srm_jax.models import adapters, transformer
  from srm_jax.recipes import adapted, sft

  config, section = shape(), adapters.AdapterConfig(rank=16, alpha=32.0, targets=('attention/*', 'mlp/*'))
  objective = adapted.objective(sft.objective(config, head_chunk=None), config, section)
  names = {'adapters': adapters.adapter_names(config, section)}
  own = jax.jit(adapters.init_adapters, static_argnums=(0, 1))(config, section, jax.random.key(1))
  frozen = {adapted.BASE: transformer.cast(fresh(config), config.dtype)}
  return _steps(config, objective, names, {'adapters': own}, frozen)


def _steps(config, objective, names, params, frozen):
  """Seconds of the first and the second step of AdamW."""
  import jax

  from srm_jax import optimizers, train_step

  settings = optimizers.OptimizerConfig(
      name='adamw', learning_rate=1e-5, matrix_learning_rate=0.0, schedule='constant', warmup_steps=0,
      weight_decay=0.01, b1=0.9, b2=0.999, clip_norm=1.0,
  )
  tx = optimizers.make_optimizer(settings, 1000, names)
  step = jax.jit(train_step.build_train_step(objective, tx), donate_argnums=0)
  state, batch = train_step.init_state(params, tx), make_batch(config.vocab_size, 1, LENGTH.value)

  def once():
    nonlocal state
    state, metrics = step(state, batch, frozen, jax.random.key(1))
    return metrics

  return timed(once)


def greedy():
  """New tokens behind a prompt."""
  from srm_jax.inference import make_generate
  from srm_jax.types import Prompt, SamplingParams

  config = shape()
  generate = make_generate(config, fresh(config), Numbers, batch_size=1, stop_at_eos=False, streams=1)
  row = ' '.join(str(1 + i % 1000) for i in range(LENGTH.value))
  prompts, sampling = [Prompt('p', row)], SamplingParams(max_new_tokens=NEW_TOKENS.value, temperature=0.0)
  return timed(lambda: len(generate(prompts, sampling)))


PARTS = {'full': full, 'lora': lora, 'greedy': greedy}


def main(argv):
  del argv
  runtime.prepare(bfloat16=DTYPE.value == 'bfloat16')
  if PART.value:
    first, second = PARTS[PART.value]()
    print(json.dumps({'seconds': second, 'compiling': first - second, 'peak': timing.peak_memory()}))
    return
  print(f'{SHAPE.value}, {DTYPE.value}: one row of {LENGTH.value} tokens; {NEW_TOKENS.value} greedy tokens behind them')
  for part in PARTS:
    flags_here = [f'--{flag}={FLAG.value}' for flag, FLAG in (
        ('shape', SHAPE), ('length', LENGTH), ('new_tokens', NEW_TOKENS), ('dtype', DTYPE))]
    command = [sys.executable, '-m', 'experiments.benchmarks.finetune', f'--part={part}', *flags_here]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(
        f'{part:7} {found["seconds"]:7.2f} s   peak {found["peak"] / 1e9:5.2f} GB   '
        f'(and {found["compiling"]:.0f} s of compiling and first use)', flush=True,
    )


if __name__ == '__main__':
  app.run(main)
