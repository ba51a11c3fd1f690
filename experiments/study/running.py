"""Runs a study config seed by seed and says what came out: cells, verdicts, a table and a figure.

A study is a record of functions: what is read off the finished stages of a seed, what that says about its claims, and
how it is shown. The claims and their rule stand in the docstring of its config.
"""

import json
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from matplotlib.figure import Figure

from experiments.study import cells, figures, tables, verdicts
from experiments.study.summary import record as plain
from srm_jax import checkpoints, metrics, stages

ROOT = pathlib.Path(__file__).resolve().parents[2]
COLORS = ('#2f7fd1', '#2a9d8f', '#d6456b', '#a45cc9', '#d9822b', '#7d8590')


class Study(NamedTuple):
  """config: its file below the repository. measure(stages by name, config) -> {model: numbers}.

  judge(cells) -> [Verdict], in the order of the claims. table(cells) -> (header, rows). draw(cells, figure).
  """

  config: str
  measure: Callable[[Mapping[str, stages.Stage], Any], dict[str, Any]]
  judge: Callable[[Sequence[cells.Cell]], list[verdicts.Verdict]]
  table: Callable[[Sequence[cells.Cell]], tuple[list[str], list[list[str]]]]
  draw: Callable[[Sequence[cells.Cell], Figure], None]


def run(study: Study, workdir, *, size: str, seeds: Sequence[int], report: Callable[[int, stages.Stage], None]):
  """Runs what is not finished; writes results.json and figure.png.

  Args:
    study: which one.
    workdir: where stages and cells go; the same call continues.
    size: argument `size` of the config.
    seeds: one cell each.
    report: called with the seed and every finished stage.

  Returns:
    What results.json holds: config, size, seeds, verdicts, table and cells.
  """
  workdir, found = pathlib.Path(workdir), []
  for seed in seeds:
    config = cells.open_config(f'{ROOT / study.config}:size={size}', seed)
    found.append(cells.run_cell(
        config, workdir, measure=lambda done, config: {'models': study.measure(done, config)},
        report=lambda stage, seed=seed: report(seed, stage),
    ))
    jax.clear_caches()  # programs of a cell would pile up; those that the next one needs are on the disk
    results = summary(study, size, found)  # seed by seed, so that a stopped study has said what it knows
    checkpoints.write_whole(workdir / 'results.json', json.dumps(results))
  figures.save(lambda figure: study.draw(found, figure), workdir / 'figure.png', width=9, height=3.6)
  return results


def summary(study: Study, size: str, found: Sequence[cells.Cell]) -> dict[str, Any]:
  """The contents of results.json: one section, named as the config."""
  header, rows = study.table(found)
  return {pathlib.Path(study.config).stem: {
      'size': size, 'seeds': [cell['seed'] for cell in found],
      'verdicts': [plain(verdict) for verdict in study.judge(found)],
      'table': {'header': header, 'rows': rows}, 'cells': list(found),
  }}


def markdown(results: Mapping[str, Any]) -> str:
  """The verdicts and the table of results.json."""
  (section,) = results.values()
  verdict_rows = [
      [one['claim'], ', '.join(tables.evidence(task, '') for task in one['evidence'].values()), f'**{one["verdict"]}**',
       tables.needed(one)]
      for one in section['verdicts']
  ]
  seeds = ', '.join(map(str, section['seeds']))
  return '\n'.join([
      tables.markdown(['claim', 'mean [95 % interval over seeds]', 'verdict', 'what would decide'], verdict_rows),
      f'Seeds {seeds}.\n', tables.markdown(section['table']['header'], section['table']['rows']),
  ])


def record(results: Mapping[str, Any], identifier: str, workdir, folder):
  """Puts results.json and figure.png of a workdir into `folder`, and the tables into the README beside it."""
  folder.mkdir(parents=True, exist_ok=True)
  for name in ('results.json', 'figure.png'):
    shutil.copyfile(pathlib.Path(workdir) / name, folder / name)
  readme = folder.parent / 'README.md'
  checkpoints.write_whole(readme, tables.put(readme.read_text(), identifier, markdown(results)))


def sampled_tokens(workdir, rollouts: Mapping[str, Any], repeats: int = 1) -> dict[str, float]:
  """{step: tokens that an on-policy run has sampled up to it}, what it dropped included.

  repeats: updates on what is sampled at once.
  """
  before, total, found = 0, 0.0, {}
  for row in metrics.read(workdir):
    drawn = row.get('drawn_tokens', row['completion_tokens'])  # who does not say what it drew, drops nothing
    total += drawn * rollouts['prompts'] * rollouts['samples'] * (row['step'] - before) / repeats
    before = row['step']
    found[str(before)] = total
  return found


def mean_and_seeds(values: Sequence[float], form: str = '{:.3f}') -> str:
  """'0.512 (0.49, 0.53)': the mean, and each seed."""
  each = ', '.join(form.format(value) for value in values)
  return f'{form.format(sum(values) / len(values))} ({each})'
