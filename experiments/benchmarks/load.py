"""Loading a published checkpoint beside Hugging Face transformers: seconds and peak host memory.

  python -m experiments.benchmarks.load [--shape=qwen2.5-0.5b] [--rounds=3] [--folder=DIR]

A random bfloat16 checkpoint of the shape is written first (494 M parameters, 0.99 GB by default). Every load runs in a
process of its own, in turns; its peak is that of the whole process, less what it held before the load began. The files
were read before: both sides find them in the page cache.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from experiments import runtime
from experiments.benchmarks import peers, timing

SHAPE = flags.DEFINE_string('shape', 'qwen2.5-0.5b', 'a preset of srm_jax.models.families')
ROUNDS = flags.DEFINE_integer('rounds', 3, 'loads of each side', lower_bound=1)
FOLDER = flags.DEFINE_string('folder', '', 'where the checkpoint is written, or is already; a temporary one by default')
SIDE = flags.DEFINE_string('side', '', 'load with this side and print one line of JSON; used by the benchmark itself')


def write(folder: pathlib.Path, shape: str):
  """A random bfloat16 checkpoint."""
  import jax

  from srm_jax.models import transformer, weights
  from srm_jax.models.families import PRESETS
  from srm_jax.schema import choose

  config = choose('shape', shape, PRESETS)
  params = jax.jit(lambda rng: transformer.cast(transformer.init_params(config, rng), 'bfloat16'))(jax.random.key(0))
  weights.save_pretrained(folder, config, params)


def ours(folder):
  import jax

  from srm_jax.models import weights

  jax.devices()

  def load():
    _, params = weights.load_pretrained(folder)
    jax.block_until_ready(params)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))

  return load


def transformers(folder):
  import torch
  from transformers import AutoModelForCausalLM, logging
  from transformers.models.qwen2 import modeling_qwen2  # noqa: F401  what is imported late would count as loading

  logging.set_verbosity_error()
  logging.disable_progress_bar()

  def load():
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    pages = [parameter.detach().view(torch.uint8).flatten()[::4096] for parameter in model.parameters()]
    assert sum(int(page.sum()) for page in pages)  # a mapped file is only read when it is looked at
    return sum(parameter.nbytes for parameter in model.parameters())

  return load


SIDES = {'srm_jax': ours, 'transformers': transformers}


def measure(side: str, folder: str):
  """One load in this process, as a line of JSON."""
  load = SIDES[side](folder)
  before, start = timing.peak_memory(), time.perf_counter()
  size = load()
  seconds = time.perf_counter() - start
  print(json.dumps({'seconds': seconds, 'peak': timing.peak_memory() - before, 'bytes': size}))


def compare(folder: pathlib.Path) -> list[str]:
  """Lines of the table."""
  sides = list(SIDES) if peers.installed() else ['srm_jax']
  found = {side: [] for side in sides}
  for _ in range(ROUNDS.value):
    for side in sides:
      command = [sys.executable, '-m', 'experiments.benchmarks.load', f'--side={side}', f'--folder={folder}']
      line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
      found[side].append(json.loads(line))
  file = sum(path.stat().st_size for path in folder.glob('*.safetensors'))
  lines = []
  for side, rows in found.items():
    seconds, most = (statistics.median(row[key] for row in rows) for key in ('seconds', 'peak'))
    lines.append(f'{side:13} {seconds:6.2f} s   peak {most / 1e9:5.2f} GB = {most / file:4.2f} x the file')
  return [f'{SHAPE.value}: {file / 1e9:.2f} GB in {len(list(folder.glob("*.safetensors")))} file(s)', *lines]


def main(argv):
  del argv
  runtime.prepare()
  if SIDE.value:
    measure(SIDE.value, FOLDER.value)
    return
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(FOLDER.value or scratch)
    if not (folder / 'config.json').exists():
      write(folder, SHAPE.value)
    print('\n'.join(compare(folder)))
  if not peers.installed():
    print(peers.MISSING)


if __name__ == '__main__':
  app.run(main)
