"""Whether a training run fits a TPU topology, and what bounds its step, without a TPU: compiles the real step with
libtpu.

python -m experiments.plan --config=configs/sft/qwen2p5_0p5b.py --topology=v5e:4x4 [--dense] [--largest] [--rollout] \\
    [--config.mesh='(1,16,1)' ...]

--dense also compiles the lm head that forms all logits at once. --largest looks for the most rows that fit, at the
config's length, mesh and microbatches; every try is a compilation. Of a recipe that samples, --rollout also compiles
what samples a step's completions. Needs pip install -e '.[tpu]'; a plain CPU machine
is enough.
"""

import os

import rich.console
import rich.table
from absl import app, flags
from ml_collections import config_flags

from experiments import command

# libtpu asks the cloud's metadata server for its hosts, and locks the machine's chips; there are neither here.
ENVIRONMENT = {
    'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
GIB = 2**30


def show(name: str, found, console):
  """Prints one plan."""
  memory, chip = found.memory, found.chip
  title = f'{name}: {found.chips} chips, {found.tokens} tokens a step'
  table = rich.table.Table('', 'per chip', title=title, title_justify='left')
  for part in ('arguments', 'temporaries', 'outputs', 'total'):
    table.add_row(f'HBM: {part}', f'{getattr(memory, part) / GIB:.2f} GiB')
  table.add_row('HBM: usable', f'{chip.hbm / GIB:.2f} GiB ({"fits" if memory.fits else "DOES NOT FIT"})')
  for kind, traffic in sorted((found.collectives or {}).items()):
    table.add_row(kind, f'{traffic.count} x, {traffic.bytes / GIB:.3f} GiB in all, {traffic.moved / GIB:.3f} GiB sent')
  table.add_row('FLOPs: useful', f'{found.useful_flops / found.chips:.3e}')
  table.add_row('FLOPs: executed', f'{found.executed_flops / found.chips:.3e}')
  if found.roofline:
    for part in found.roofline._fields:
      table.add_row(f'roofline: {part}', f'{1e3 * getattr(found.roofline, part):.1f} ms')
    seconds = found.roofline.seconds
    utilisation = found.useful_flops / found.chips / chip.flops / seconds
    table.add_row(
        'roofline: step',
        f'>= {1e3 * seconds:.1f} ms, {found.tokens / seconds:.0f} tokens/s, '
        f'model FLOPs utilisation <= {utilisation:.0%}',
    )
  console.print(table)


def show_rollout(found, chip, console):
  """Prints what sampling needs, program by program."""
  table = rich.table.Table('rollout', 'arguments', 'temporaries', 'outputs', 'total with what is trained')
  for name, memory in found.items():
    parts = (f'{getattr(memory, part) / GIB:.2f} GiB' for part in ('arguments', 'temporaries', 'outputs'))
    table.add_row(name, *parts, f'{memory.total / GIB:.2f} GiB ({"fits" if memory.fits else "DOES NOT FIT"})')
  console.print(table)
  if 'decode' in found:
    seconds = found['decode'].arguments / chip.hbm_bandwidth
    console.print(f'a token of every row reads its weights and cache once: >= {1e3 * seconds:.2f} ms')


def largest(config, devices, console):
  """The plan of the largest batch that fits; prints every try.

  Raises:
    ConfigError: not even the smallest batch fits.
  """
  from srm_jax import plan, schema

  tried = {}

  def fits(rows):
    tried[rows] = plan.plan(plan.with_rows(config, rows), devices)
    memory = tried[rows].memory
    console.print(f'{rows} rows: {memory.total / GIB:.2f} GiB, {"fits" if memory.fits else "does not fit"}')
    return memory.fits

  start, unit = plan.rows_of(config, devices)
  rows = plan.most_rows(fits, start=start, unit=unit)
  if not rows:
    raise schema.ConfigError(
        f'{unit} rows do not fit, and the mesh and config.microbatches={config.microbatches} leave no fewer to try: '
        'change them, or take a larger topology'
    )
  console.print(f'{rows} rows are the most that fit, in steps of {unit}')
  return tried[rows]


def run(config, topology: str, *, dense: bool, grow: bool, rollout: bool):
  from srm_jax import plan

  devices, console = plan.topology_devices(topology), rich.console.Console()
  heads = {'chunked head': None, 'dense head': 0} if dense else {'as configured': 'config'}
  for name, chunk in heads.items():
    chosen = config if chunk == 'config' else plan.with_head(config, chunk)
    show(name, largest(chosen, devices, console) if grow else plan.plan(chosen, devices), console)
  if rollout:
    show_rollout(plan.plan_rollout(config, devices), plan.CHIPS[devices[0].device_kind], console)


def launch():
  config = config_flags.DEFINE_config_file(
      'config', None, 'FILE.py[:arg] of a training run; override with --config.key=value.',
  )
  topology = flags.DEFINE_string('topology', None, 'Of the TPU slice, such as v5e:4x4, v5p:2x2x2 or v6e:4x4.')
  dense = flags.DEFINE_bool('dense', False, 'Compare the chunked lm head with the dense one.')
  grow = flags.DEFINE_bool('largest', False, 'Find the most rows that fit.')
  rollout = flags.DEFINE_bool('rollout', False, 'Plan the sampling of a step, too.')
  flags.mark_flags_as_required(['config', 'topology'])

  def main(argv):
    if len(argv) > 1:
      raise app.UsageError(f'unexpected arguments {argv[1:]}')
    command.show_progress_of_library()
    command.guarded(lambda: run(
        config.value, topology.value, dense=dense.value, grow=grow.value, rollout=rollout.value,
    ))

  app.run(main)


if __name__ == '__main__':
  os.environ.update(ENVIRONMENT)
  launch()
