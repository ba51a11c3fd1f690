"""Memory and time of a distillation loss over a large vocabulary: chunked, dense, and TRL's.

  python -m experiments.benchmarks.distill_memory [--dtype=bfloat16] [--chunk=128] [--rounds=3] [--sides=chunked,trl]

Forward KL from hidden states and unembeddings to the gradients of the student's, at the heads of Qwen2.5-1.5B and 0.5B:
V = 151936, teacher 1536 wide, student 896, 4 x 1024 tokens, products in the dtype, distributions and sums in float32.
`chunked` is srm_jax.losses.lm_head, `dense` the same loss with all logits at once under plain automatic
differentiation. `trl` forms both models' logits in PyTorch and calls GKDTrainer.generalized_jsd_loss with beta = 0.
Every side runs in a process of its own, in turns. Memory is what the compiler says of temporaries (gradients are
outputs), and what the process's peak rose by; of PyTorch only the latter is known, gradients included. A CPU without
instructions for bfloat16 takes hours for it: --dtype=float32.
"""

import json
import os
import statistics
import subprocess
import sys
import time

from absl import app, flags

from experiments import runtime
from experiments.benchmarks import timing

DTYPE = flags.DEFINE_string('dtype', 'bfloat16', 'of hidden states, unembeddings and products')
CHUNK = flags.DEFINE_integer('chunk', 128, 'tokens at a time', lower_bound=1)
ROWS = flags.DEFINE_integer('rows', 4, 'rows of the batch', lower_bound=1)
LENGTH = flags.DEFINE_integer('length', 1024, 'tokens of a row', lower_bound=1)
VOCABULARY = flags.DEFINE_integer('vocabulary', 151_936, 'entries of the vocabulary', lower_bound=2)
ROUNDS = flags.DEFINE_integer('rounds', 3, 'processes of each side', lower_bound=1)
SIDES = flags.DEFINE_list('sides', ['chunked', 'dense', 'trl'], 'what to compare')
SIDE = flags.DEFINE_string('side', '', 'run this side and print a line of JSON; used by the benchmark itself')

STUDENT, TEACHER = 896, 1536
SETTINGS = (DTYPE, CHUNK, ROWS, LENGTH, VOCABULARY)


def arrays():
  """Hidden states and unembeddings (numpy, float32) of student and teacher, and targets; logits are of order 1."""
  import numpy as np

  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape, np.float32)
  made = []
  for width in (STUDENT, TEACHER):
    made += [draw(ROWS.value, LENGTH.value, width), 1.5 * draw(width, VOCABULARY.value) / width**0.5]
  return made, rng.integers(0, VOCABULARY.value, (ROWS.value, LENGTH.value)).astype(np.int32)


def ours(chunk: int) -> dict:
  """Seconds of the second call, compiler's temporaries, what the peak rose by, and the loss."""
  import jax
  import jax.numpy as jnp

  from srm_jax.losses import lm_head
  from srm_jax.losses.distillation import forward_kl

  def token_loss(student_logits, teacher_logits, targets, *, axis_name):
    del targets
    return forward_kl(student_logits, teacher_logits, axis_name=axis_name), {}

  def loss(student, teacher, targets):
    weights = jnp.full(targets.shape, 1 / targets.size)
    return lm_head.reduced(token_loss, student, targets, weights, teacher=teacher, chunk=chunk)[0]

  made, targets = arrays()
  made = [jax.device_put(jnp.asarray(array, DTYPE.value)) for array in made]
  student, teacher = lm_head.Head(*made[:2]), lm_head.Head(*made[2:])
  compiled = jax.jit(jax.value_and_grad(loss)).lower(student, teacher, targets).compile()
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  before = timing.peak_memory()
  for _ in range(2):
    start = time.perf_counter()
    value, _ = jax.block_until_ready(compiled(student, teacher, targets))
    seconds = time.perf_counter() - start
  return dict(seconds=seconds, temporaries=temporaries, rose=timing.peak_memory() - before, loss=float(value))


def trl() -> dict:
  """The same of TRL's loss; `temporaries` is None."""
  import torch
  from trl.experimental.gkd import GKDTrainer

  made, targets = arrays()
  dtype = getattr(torch, DTYPE.value)
  made = [torch.from_numpy(array).to(dtype) for array in made]
  hidden, kernel = (x.requires_grad_() for x in made[:2])
  labels = torch.from_numpy(targets).long()
  before = timing.peak_memory()
  for _ in range(2):
    hidden.grad = kernel.grad = None
    start = time.perf_counter()
    with torch.no_grad():
      teacher_logits = made[2] @ made[3]
    value = GKDTrainer.generalized_jsd_loss(hidden @ kernel, teacher_logits, labels=labels, beta=0.0)
    value.backward()
    seconds = time.perf_counter() - start
    del teacher_logits
  return dict(seconds=seconds, temporaries=None, rose=timing.peak_memory() - before, loss=float(value))


RUNS = {'chunked': lambda: ours(CHUNK.value), 'dense': lambda: ours(0), 'trl': trl}


def measure(side: str) -> dict | str:
  """One process of a side; where it fails, the last line of what it said."""
  settings = [f'--{setting.name}={setting.value}' for setting in SETTINGS]
  command = [sys.executable, '-m', 'experiments.benchmarks.distill_memory', f'--side={side}', *settings]
  done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
  if done.returncode:
    said = done.stderr.strip().splitlines()
    return f'failed ({said[-1][:100] if said else f"exit code {done.returncode}: out of memory?"})'
  return json.loads(done.stdout.splitlines()[-1])


def main(argv):
  del argv
  runtime.prepare(bfloat16=DTYPE.value == 'bfloat16')
  if SIDE.value:
    print(json.dumps(RUNS[SIDE.value]()))
    return
  found = {side: [] for side in SIDES.value}
  for _ in range(ROUNDS.value):
    for side, rows in found.items():
      if not rows or not isinstance(rows[-1], str):
        rows.append(measure(side))
  print(f'{DTYPE.value}, {ROWS.value} x {LENGTH.value} tokens, V = {VOCABULARY.value}, chunks of {CHUNK.value}')
  for side, rows in found.items():
    if isinstance(rows[-1], str):
      print(f'{side:8} {rows[-1]}')
      continue
    median = {key: statistics.median(row[key] for row in rows) for key in ('seconds', 'rose', 'loss')}
    temporaries = rows[0]['temporaries']
    said = '' if temporaries is None else f'temporaries {temporaries / 1e9:6.3f} GB, '
    print(f'{side:8} {median["seconds"]:6.1f} s   {said}peak rose by {median["rose"] / 1e9:5.2f} GB   '
          f'loss {median["loss"]:.4f}')


if __name__ == '__main__':
  app.run(main)
