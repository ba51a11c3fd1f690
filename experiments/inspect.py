"""The next batch of a run as one HTML page: tokens, loss mask, segments, positions, and what student and teacher think
of them.

python -m experiments.inspect --config=configs/sft/arithmetic.py:smoke --output=batch.html
python -m experiments.inspect --config=configs/sft/arithmetic.py --config.tokenizer=DIR --workdir=runs/sft
    (writes runs/sft/inspect.html)

With --workdir the run's newest checkpoint is looked at, at its step; nothing is trained.
"""

import pathlib

from absl import app, flags
from ml_collections import config_flags

from experiments import command, runtime


def write(config, workdir, output, rows: int) -> pathlib.Path:
  """Writes the page and returns its path: `output`, or inspect.html in the workdir."""
  from srm_jax import inspection, schema

  if not (workdir or output):
    raise schema.ConfigError('give --workdir or --output=FILE.html')
  path = pathlib.Path(output or pathlib.Path(workdir) / 'inspect.html')
  seen = inspection.inspect(config, workdir, rows=rows)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(inspection.render(seen, f'{config.recipe.name}: the batch of step {seen.step}'), encoding='utf-8')
  for key, value in seen.resolved.items():
    print(f'{key}: {value}')
  print(f'{path}: {seen.supervised} supervised tokens, fill rate {seen.fill:.1%}')
  return path


def launch():
  config = config_flags.DEFINE_config_file(
      'config', None, 'FILE.py[:arg] of a training run; override with --config.key=value.',
  )
  workdir = flags.DEFINE_string('workdir', None, 'Of the run to look into; it need not exist.')
  output = flags.DEFINE_string('output', None, 'FILE.html; inspect.html in the workdir if not given.')
  rows = flags.DEFINE_integer('rows', 4, 'How many rows of the batch to show.', lower_bound=1)
  flags.mark_flag_as_required('config')

  def main(argv):
    if len(argv) > 1:
      raise app.UsageError(f'unexpected arguments {argv[1:]}')
    command.show_progress_of_library()
    runtime.prepare()
    command.guarded(lambda: write(config.value, workdir.value, output.value, rows.value))

  app.run(main)


if __name__ == '__main__':
  launch()
