"""Finished runs and sweeps as tables.

python -m experiments.report --dirs=runs/a,runs/b [--metrics=loss,token_accuracy] [--csv=all_steps.csv]
python -m experiments.report --dirs=runs/sweep --compare=test_rl.greedy:test_sft_gold.greedy

Shows every run's last step with the config keys in which the runs differ, the alarms of RL runs, and every sweep's
accuracies and comparisons.
"""

import json
import pathlib

import rich.console
import rich.table
from absl import app, flags

from experiments import command


def show(table, title: str, console):
  """Prints a table of srm_jax.report, if it has rows."""
  header, rows = table
  if rows:
    shown = rich.table.Table(*header, title=title, title_justify='left')
    for row in rows:
      shown.add_row(*row)
    console.print(shown)


def show_sweep(cells, compare, title: str, console):
  from srm_jax import report

  pairs = report.parse_pairs(compare, list(dict.fromkeys(row for cell in cells for row in cell['rows'])))
  tests = report.compare_rows(cells, pairs) + report.compare_settings(cells)
  show(report.summary_table(report.summarize(cells)), f'{title}: accuracy', console)
  show(report.comparison_table(tests), f'{title}: comparisons (percentage points)', console)
  show(report.metrics_table(cells), f'{title}: training', console)


def run(folders, metrics, csv, compare):
  from srm_jax import report

  console = rich.console.Console()
  results = [pathlib.Path(folder) / 'results.json' for folder in folders]
  sweeps = [path for path in results if (path.parent / 'cells').is_dir() and path.exists()]
  for path in sweeps:
    show_sweep(json.loads(path.read_text())['cells'], compare, str(path.parent), console)
  frame = report.load(folders)
  if csv:
    frame.to_csv(csv, index=False)
    console.print(f'{csv}: {len(frame)} rows', highlight=False)
  show(report.runs_table(frame, metrics), 'runs', console)
  show(report.alarms_table(frame), 'alarms: what to look at (experiments.rollouts shows completions)', console)


def launch():
  folders = flags.DEFINE_list('dirs', None, 'Folders with runs or sweeps, at any depth, separated by commas.')
  metrics = flags.DEFINE_list('metrics', ['loss'], 'Columns to show, at the last step of each run.')
  csv = flags.DEFINE_string('csv', None, 'Writes all steps of all runs there.')
  compare = flags.DEFINE_multi_string('compare', [], 'ROW:ROW, two evaluation rows of the sweeps to compare.')
  flags.mark_flag_as_required('dirs')

  def main(argv):
    if len(argv) > 1:
      raise app.UsageError(f'unexpected arguments {argv[1:]}')
    command.guarded(lambda: run(folders.value, metrics.value, csv.value, compare.value))

  app.run(main)


if __name__ == '__main__':
  launch()
