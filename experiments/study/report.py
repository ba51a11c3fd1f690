"""Writes what the finished cells of studies say: results.json, three figures, and the tables of a README.

python -m experiments.study.report --config=configs/studies/distillation_ablation.py:task=sums \\
    --config=configs/studies/distillation_ablation.py:task=rewriting --seeds=5 --workdir=DIR --out=FOLDER

Configs of one file are one study. Where FOLDER/README.md exists, the tables go between its marks
<!-- results --> and <!-- /results -->; where it does not they are printed alone.
"""

import json
import pathlib

from absl import app, flags

from experiments import command
from experiments.study import cells
from experiments.sweep import seeds

FLAGS = flags.FLAGS


def collect(configs, seeds_text: str, workdir):
  """{study: (a config of it, its finished cells)}; seeds that some task of a study lacks are left out.

  Raises:
    ConfigError: a study without a seed that all its tasks have finished.
  """
  from srm_jax.schema import ConfigError

  studies = {}
  for config in configs:
    made = [cells.open_config(config, seed) for seed in seeds(seeds_text)]
    here = {one.seed: cells.read(one, workdir) for one in made if cells.path_of(one, workdir).exists()}
    studies.setdefault(pathlib.Path(config.partition(':')[0]).stem, (made[0], []))[1].append(here)
  found = {}
  for name, (made, tasks) in studies.items():
    whole = set.intersection(*(set(here) for here in tasks))
    if not whole:
      raise ConfigError(f'{name} has no seed that is finished for every task below {workdir}; run its cells first')
    found[name] = made, [here[seed] for here in tasks for seed in sorted(whole)]
  return found


def tables(summaries, found) -> str:
  """Markdown of all studies: verdicts first."""
  from experiments.study import tables as show

  parts = ['### Verdicts\n']
  for name, summary in summaries.items():
    parts += [f'{show.verdict_table(summary, found[name][0].claims)}', f'`{name}`: {show.seeds_line(summary)}.\n']
  for name, summary in summaries.items():
    for task in summary['tasks']:
      parts += [f'### `{name}`, {task}\n', show.arm_table(summary, task)]
  return '\n'.join(parts)


def write(configs, seeds_text: str, workdir, out):
  """results.json, grid.png, steps.png, cka.png and the README's tables below `out`; returns the tables."""
  from experiments.study import figures, summary
  from experiments.study.tables import put
  from srm_jax import checkpoints

  found = collect(configs, seeds_text, workdir)
  summaries = {name: summary.summarize(config, some) for name, (config, some) in found.items()}
  out = pathlib.Path(out)
  out.mkdir(parents=True, exist_ok=True)
  checkpoints.write_whole(out / 'results.json', json.dumps(summaries) + '\n')
  figures.grid(summaries, out / 'grid.png')
  figures.steps(summaries, out / 'steps.png')
  figures.layers(summaries, out / 'cka.png')
  text, readme = tables(summaries, found), out / 'README.md'
  if readme.exists():
    checkpoints.write_whole(readme, put(readme.read_text(), 'results', text))
  return text


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}')
  command.guarded(lambda: print(write(FLAGS.config, FLAGS.seeds, FLAGS.workdir, FLAGS.out)))


if __name__ == '__main__':
  flags.DEFINE_multi_string('config', None, 'FILE.py[:arg] with get_config(arg), as they were run.')
  flags.DEFINE_string('seeds', '1', 'How many seeds from 1 on, or the seeds themselves: 7,8,9.')
  flags.DEFINE_string('workdir', None, 'Where the cells are.')
  flags.DEFINE_string('out', None, 'Where results.json, the figures and README.md go.')
  flags.mark_flags_as_required(['config', 'workdir', 'out'])
  app.run(main)
