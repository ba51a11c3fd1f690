"""Runs the cells of study configs one after another; several processes, one a task, may share a workdir.

python -m experiments.study --config=configs/studies/distillation_ablation.py:task=sums --seeds=5 --workdir=DIR
"""

import os
import pathlib
import sys
import time

from absl import app, flags
from absl import logging as absl_logging

from experiments import command, runtime
from experiments.study import cells
from experiments.sweep import seeds

FLAGS = flags.FLAGS


def take_core(number: int):
  """Keeps this process on one core: models of this size gain nothing from a second one, another process does."""
  if number >= 0 and hasattr(os, 'sched_setaffinity'):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})


def run(configs, seeds_text: str, workdir: str):
  """Seed by seed, so that a stopped study has whole seeds. Stages go to stdout, cells to stderr."""
  import jax

  from experiments.study import claims

  chosen = seeds(seeds_text)
  line = {(seed, config): cells.open_config(config, seed) for seed in chosen for config in configs}
  for made in line.values():  # a claim about an arm that is not there is found before anything runs
    claims.check(made)
  report = lambda stage: print(f'  {stage.name}: {stage.seconds:.0f} s', flush=True)
  for number, ((seed, config), made) in enumerate(line.items(), start=1):
    print(f'{config}, seed {seed}', flush=True)
    start = time.perf_counter()
    cells.run_cell(made, workdir, report=report)
    seconds = time.perf_counter() - start
    name = pathlib.Path(config.partition(':')[0]).stem
    print(f'{made.task}: cell {number} of {len(line)}, {name}, seed {seed}, {seconds:.0f} s', file=sys.stderr)
    if config == configs[-1]:  # programs of a seed would pile up; those that the next one needs are on the disk
      jax.clear_caches()


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}')
  take_core(FLAGS.core)
  if FLAGS.hasty:
    runtime.compile_hastily()
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')  # a hundred arms share their small programs
  absl_logging.set_verbosity(absl_logging.ERROR)  # of every logger: a line a stage is enough
  runtime.prepare()
  command.guarded(lambda: run(FLAGS.config, FLAGS.seeds, FLAGS.workdir))


if __name__ == '__main__':
  flags.DEFINE_multi_string('config', None, 'FILE.py[:arg] with get_config(arg); several run after each other.')
  flags.DEFINE_string('seeds', '1', 'How many seeds from 1 on, or the seeds themselves: 7,8,9.')
  flags.DEFINE_string('workdir', None, 'Where stages and cells go; the same command continues.')
  flags.DEFINE_integer('core', -1, 'The core to stay on; -1 uses all.')
  flags.DEFINE_bool('hasty', False, 'Compiles faster what then runs slower: for a few steps.')
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main)
