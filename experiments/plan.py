"""Whether a training run fits a TPU topology, and what bounds its step, without a TPU: compiles the real step with
libtpu.

python -m experiments.plan --config=configs/sft/qwen2p5_0p5b.py --topology=v5e:4x4 [--dense] \\
    [--config.mesh='(1,16,1)' ...]

--dense also compiles the lm head that forms all logits at once. Needs pip install -e '.[tpu]'; a plain CPU machine is
enough.
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


def run(config, topology: str, dense: bool):
  from srm_jax import plan

  devices, console = plan.topology_devices(topology), rich.console.Console()
  heads = {'chunked head': None, 'dense head': 0} if dense else {'as configured': 'config'}
  for name, chunk in heads.items():
    show(name, plan.plan(config if chunk == 'config' else plan.with_head(config, chunk), devices), console)


def launch():
  config = config_flags.DEFINE_config_file(
      'config', None, 'FILE.py[:arg] of a training run; override with --config.key=value.',
  )
  topology = flags.DEFINE_string('topology', None, 'Of the TPU slice, such as v5e:4x4, v5p:2x2x2 or v6e:4x4.')
  dense = flags.DEFINE_bool('dense', False, 'Compare the chunked lm head with the dense one.')
  flags.mark_flags_as_required(['config', 'topology'])

  def main(argv):
    if len(argv) > 1:
      raise app.UsageError(f'unexpected arguments {argv[1:]}')
    command.show_progress_of_library()
    command.guarded(lambda: run(config.value, topology.value, dense.value))

  app.run(main)


if __name__ == '__main__':
  os.environ.update(ENVIRONMENT)
  launch()
