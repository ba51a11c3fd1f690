"""The product of settings and seeds over a config, ending in a table with paired tests.

python -m experiments.sweep --config=configs/quickstart.py:size=smoke \\
    --set stages.rl.config.optimizer.learning_rate=1e-4,3e-4 --set arg.steps=0.5,1.0 --seeds=5 \\
    --compare=test_rl.greedy:test_logits.greedy --workdir=runs/sweep

--set KEY=VALUE,... addresses the config; arg.NAME=VALUE,... the argument of its get_config. The seed of a line of
stages is the argument `seed`; that of a plain train, evaluate or annotate config, which runs as a line of one stage, is
its own field. Cells share the stages that they have in common. The same command continues a stopped sweep; a finished
cell is not run again, a failing one is reported, and the others go on.
"""

import importlib.util
import json
import pathlib
import sys

import rich.console
from absl import app, flags

from experiments import command, runtime
from experiments.report import show

SEED_FIELDS = ('seed', 'sampling.seed')


def seeds(text: str) -> list[int]:
  """'3' -> [1, 2, 3]; '7,9' -> [7, 9]."""
  from srm_jax.schema import ConfigError

  try:
    numbers = [int(part) for part in text.rstrip(',').split(',')]
  except ValueError:
    raise ConfigError(f'--seeds={text!r}: give a number of seeds, or the seeds separated by commas') from None
  chosen = numbers if ',' in text else list(range(1, numbers[0] + 1))
  if not chosen or len(set(chosen)) < len(chosen):
    raise ConfigError(f'--seeds={text!r} names no seed, or one twice')
  return chosen


def load_config(path: str, arg: str):
  """get_config(arg) of a file."""
  spec = importlib.util.spec_from_file_location(f'sweep_{pathlib.Path(path).stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(arg)


def cell_config(config: str, settings, seed: int):
  """The line of stages of one cell.

  Raises:
    ConfigError: a setting that does not exist, or nowhere to put the seed.
  """
  from srm_jax import report, schema

  path, _, arg = config.partition(':')
  arguments = [part for part in arg.split(',') if part]
  arguments += [f'{key[4:]}={value}' for key, value in settings.items() if key.startswith('arg.')]
  made = load_config(path, ','.join(arguments))
  if 'stages' in made:
    made = load_config(path, ','.join([*arguments, f'seed={seed}']))
  else:
    field = next((name for name in SEED_FIELDS if _holds(made, name)), None)
    if field is None:
      raise schema.ConfigError(f'{config} has none of the fields {SEED_FIELDS} to put the seed into')
    report.assign(made, field, str(seed))
  for key, value in settings.items():
    if not key.startswith('arg.'):
      report.assign(made, key, value)
  return report.as_pipeline(made)


def _holds(config, field: str) -> bool:
  for part in field.split('.'):
    if not hasattr(config, 'keys') or part not in config:
      return False
    config = config[part]
  return True


def run_cell(config: str, settings, seed: int, workdir, report_stage):
  """Runs a cell, or reads it back where it is finished; see srm_jax.report for what it holds."""
  from srm_jax import checkpoints, report, stages
  from srm_jax.data.records import content_hash
  from srm_jax.schema import resolve

  line = resolve(cell_config(config, settings, seed))
  path = pathlib.Path(workdir) / 'cells' / f'{content_hash(line)[:16]}.json'
  if not path.exists():
    done = stages.run_stages(line, workdir, report=report_stage)
    rows, metrics = report.outcomes(done)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_whole(path, json.dumps({'rows': rows, 'metrics': metrics}))
  return {'settings': settings, 'seed': seed, **json.loads(path.read_text())}


def finish(cells, failed, pairs, config: str, workdir):
  """Prints the tables and writes results.json and table.md."""
  from srm_jax import report

  tests = report.compare_rows(cells, pairs) + report.compare_settings(cells)
  summaries = report.summarize(cells)
  tables = {
      'Accuracy': report.summary_table(summaries), 'Comparisons (percentage points)': report.comparison_table(tests),
      'Training': report.metrics_table(cells),
  }
  for title, table in tables.items():
    show(table, title, rich.console.Console())
  results = {
      'config': config, 'cells': cells, 'failed': failed, 'summary': report.records(summaries),
      'tests': report.records(tests),
  }
  folder = pathlib.Path(workdir)
  (folder / 'results.json').write_text(json.dumps(results))
  sections = (f'### {title}\n\n{report.markdown(table)}' for title, table in tables.items() if table[1])
  (folder / 'table.md').write_text('\n'.join(sections))


def sweep(config: str, settings_texts, seeds_text: str, compare, workdir) -> int:
  """Runs all cells; returns the number of those that failed."""
  import jax

  from srm_jax import report, stages

  settings, chosen = report.product(report.parse_settings(settings_texts)), seeds(seeds_text)
  for setting in settings:  # a misspelt name stops the sweep before anything runs
    line = cell_config(config, setting, chosen[0])
    stages.check(line)
    pairs = report.parse_pairs(compare, report.row_names(line))
  console, cells, failed = rich.console.Console(), [], []
  pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
  total = len(settings) * len(chosen)
  for number, (setting, seed) in enumerate(((setting, seed) for seed in chosen for setting in settings), start=1):
    name = f'{report.label(setting)}, seed {seed}'
    console.print(f'cell {number} of {total}: {name}', highlight=False)
    try:
      cells.append(run_cell(
          config, setting, seed, workdir,
          lambda stage: console.print(f'  {stage.name}: {stage.seconds:.0f} s', highlight=False),
      ))
    except Exception as error:  # whatever broke this cell, the others may still run
      failed.append({'settings': setting, 'seed': seed, 'error': f'{type(error).__name__}: {error}'})
      print(f'cell {name} failed: {failed[-1]["error"]}', file=sys.stderr)
    jax.clear_caches()  # programs of a cell are of no use to the next and would pile up
  if cells:
    finish(cells, failed, pairs, config, workdir)
  return len(failed)


def launch():
  config = flags.DEFINE_string('config', None, 'FILE.py[:arg] with get_config(arg).')
  settings = flags.DEFINE_multi_string('set', [], 'KEY=VALUE[,VALUE...]; give it once a key.')
  seeds_text = flags.DEFINE_string('seeds', '1', 'How many seeds from 1 on, or the seeds themselves: 7,8,9.')
  compare = flags.DEFINE_multi_string('compare', [], 'ROW:ROW, two evaluation rows to compare within every setting.')
  workdir = flags.DEFINE_string('workdir', None, 'Where stages, cells and results.json go.')
  flags.mark_flags_as_required(['config', 'workdir'])

  def run():
    said = command.names_bfloat16(cell_config(config.value, {}, 1)) or 'bfloat16' in ' '.join(settings.value)
    runtime.prepare(bfloat16=said)
    failures = sweep(config.value, settings.value, seeds_text.value, compare.value, workdir.value)
    if failures:
      sys.exit(f'error: {failures} cells failed; the same command runs them again')

  def main(argv):
    if len(argv) > 1:
      raise app.UsageError(f'unexpected arguments {argv[1:]}')
    command.show_progress_of_library()
    command.guarded(run)

  app.run(main)


if __name__ == '__main__':
  launch()
