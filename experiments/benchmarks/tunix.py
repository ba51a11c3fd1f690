"""What a distillation step takes of a TPU's memory, beside Tunix's step: both compiled, without a TPU.

  python -m experiments.benchmarks.tunix [--topology=v5e:4x4] [--rows=64,32] [--meshes=16x1,8x2] [--microbatches=1,4] \\
      [--sides=ours,tunix] [--nosplash]

Qwen2.5-1.5B into Qwen2.5-0.5B, forward KL and cross-entropy over the whole vocabulary, rows of 4096 tokens, bfloat16
compute, float32 parameters and moments, the teacher in bfloat16, decoder layers recomputed; meshes are fsdp x tensor.
`ours` is what `experiments.plan` compiles of configs/distill/published.py. `tunix` is the step that Tunix 0.1.7's
DistillationTrainer jits; its microbatches are gradient_accumulation_steps, a step on a part of the rows each. The
teacher's pass is a program of its own there, and not counted; its weights are, as they stay on the chips.

Tunix gets an environment of its own in $XDG_CACHE_HOME/srm_jax/tunix or ~/.cache/srm_jax/tunix (2 GB, made on the first
call from the package index, with the JAX and libtpu of experiments/constraints.txt); ours needs pip install -e
'.[tpu]'. One process after another compiles, as libtpu is for one at a time; minutes each. A total after >= is of a
program that does not fit, as far as the compiler counted.
"""

import itertools
import json
import math
import os
import subprocess
import sys
import time

from absl import app, flags

from experiments import command, plan as plan_main
from experiments.benchmarks.tunix_environment import ROOT, cache, environment

TOPOLOGY = flags.DEFINE_string('topology', 'v5e:4x4', 'of the TPU slice')
ROWS = flags.DEFINE_list('rows', ['64', '32'], 'rows of a batch')
LENGTH = flags.DEFINE_integer('length', 4096, 'tokens of a row', lower_bound=2)
MESHES = flags.DEFINE_list('meshes', ['16x1', '8x2'], 'fsdp x tensor')
MICROBATCHES = flags.DEFINE_list('microbatches', ['1', '4'], 'parts of a batch')
SIDES = flags.DEFINE_list('sides', ['ours', 'tunix'], 'what to compare')
SPLASH = flags.DEFINE_bool('splash', True, "Tunix's attention by its splash kernel; else all scores at once")
CASE = flags.DEFINE_string('case', '', 'compile our side of this case, print a line of JSON; the benchmark itself does')

GIB = 2**30


def cases():
  """A dictionary of numbers for every batch, mesh and number of microbatches asked for."""
  for rows, mesh, microbatches in itertools.product(ROWS.value, MESHES.value, MICROBATCHES.value):
    fsdp, tensor = map(int, mesh.split('x'))
    yield dict(
        topology=TOPOLOGY.value, rows=int(rows), length=LENGTH.value, fsdp=fsdp, tensor=tensor,
        microbatches=int(microbatches), splash=SPLASH.value,
    )


def ours(case: dict):
  """The memory of our step, compiled in this process."""
  from configs.distill import published
  from srm_jax import plan

  config = published.get_config(f'rows={case["rows"]},length={case["length"]}')
  config.update(mesh=(1, case['fsdp'], case['tensor']), microbatches=case['microbatches'])
  return plan.plan(config, plan.topology_devices(case['topology'])).memory


def read_tunix(said: dict):
  """Memory from what `tunix_step` printed, the teacher's weights among the arguments."""
  from srm_jax import plan

  if 'error' in said:
    found = plan.out_of_memory(said['error'])
  else:
    parts = said['argument'], said['temp'], said['output'] - said['alias']
    found = plan.Memory(*parts, sum(parts) + said['generated_code'], True)
  total = found.total + said['teacher']
  fits = found.fits and total <= plan.CHIPS[said['chip']].hbm
  return found._replace(arguments=found.arguments + said['teacher'], total=total, fits=fits)


def compiled(side: str, case: dict):
  """The memory that a process of this side found; where it failed, the last line of what it said."""
  from srm_jax import plan

  if side == 'ours':
    words = [sys.executable, '-m', 'experiments.benchmarks.tunix', f'--case={json.dumps(case)}']
  else:
    words = [environment(cache()), '-m', 'experiments.benchmarks.tunix_step', json.dumps(case)]
  done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=os.environ | plan_main.ENVIRONMENT)
  if done.returncode:
    said = done.stderr.strip().splitlines()
    return f'failed: {said[-1] if said else f"exit code {done.returncode}"}'
  found = json.loads(done.stdout.splitlines()[-1])
  return plan.Memory(**found) if side == 'ours' else read_tunix(found)


def line(side: str, case: dict, found, seconds: float) -> str:
  batch, mesh = f'{case["rows"]} x {case["length"]}', f'{case["fsdp"]} x {case["tensor"]}'
  where = f'{batch:>13}  {mesh:>6}  {case["microbatches"]:12}  {side:5}'
  if isinstance(found, str):
    return f'{where}  {found}'
  gib = lambda size: '    ?' if math.isnan(size) else f'{size / GIB:5.2f}'
  total = f'   {gib(found.total)}' if found.fits else f'>= {gib(found.total)}, does not fit'
  return f'{where}  {gib(found.arguments):>9}  {gib(found.temporaries):>11}  {total} ({seconds:.0f} s)'


def compare():
  print(f'{TOPOLOGY.value}, GiB of a chip')
  print('rows x tokens    mesh  microbatches  side   arguments  temporaries     total')
  for case in cases():
    for side in SIDES.value:
      start = time.perf_counter()
      found = compiled(side, case)
      print(line(side, case, found, time.perf_counter() - start), flush=True)


def main(argv):
  del argv
  if CASE.value:
    print(json.dumps(ours(json.loads(CASE.value))._asdict()))
    return
  command.guarded(compare)


if __name__ == '__main__':
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  app.run(main)
