"""Runs and sweeps as tables: metrics of runs as a DataFrame, grids of settings, comparisons over seeds.

A cell is one run of a line at one setting and seed: {'settings': {key: value}, 'seed': n, 'rows': {row: {'accuracy',
'n', 'correct', 'problems'}}, 'metrics': {stage: {name: value}}}. 'correct' is a string with 0 or 1 a problem,
'problems' a hash of their ids in order: only rows over the same problems are compared.
"""

import ast
import itertools
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
import pandas as pd

from srm_jax import alarms, evaluate, metrics, schema, statistics
from srm_jax.data.records import content_hash
from srm_jax.stages import Stage

Cell = Mapping[str, Any]


def load(dirs) -> pd.DataFrame:
  """Metrics of runs, one row per run and step.

  Args:
    dirs: a folder or several; every run (a folder with metrics.jsonl) at any depth below is read.

  Returns:
    DataFrame with columns run (the folder), step, the metrics, and config.a.b for every leaf of the config.

  Raises:
    FileNotFoundError: a folder does not exist, or there is no run below any of them.
  """
  folders = [pathlib.Path(dirs)] if isinstance(dirs, (str, pathlib.Path)) else [pathlib.Path(folder) for folder in dirs]
  missing = [str(folder) for folder in folders if not folder.is_dir()]
  if missing:
    raise FileNotFoundError(f'no such folder: {", ".join(missing)}')
  runs = sorted({path.parent for folder in folders for path in folder.rglob('metrics.jsonl')})
  if not runs:
    raise FileNotFoundError(f'no run (folder with metrics.jsonl) below {", ".join(map(str, folders))}')
  frames = []
  for run in runs:
    path = run / 'config.json'
    config = flatten(json.loads(path.read_text()), 'config') if path.exists() else {}
    frames.append(pd.DataFrame([{'run': str(run), **row, **config} for row in metrics.read(run)]))
  return pd.concat(frames, ignore_index=True)


def flatten(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  """{'a': {'b': 1}} -> {'prefix.a.b': 1}; a list is one value, as a tuple."""
  flat = {}
  for key, value in tree.items():
    name = f'{prefix}.{key}'
    leaf = tuple(value) if isinstance(value, list) else value
    flat |= flatten(value, name) if isinstance(value, Mapping) else {name: leaf}
  return flat


def parse_settings(texts: Sequence[str]) -> dict[str, list[str]]:
  """['a.b=1,2', 'c=(1,8,1)'] -> {'a.b': ['1', '2'], 'c': ['(1,8,1)']}: commas inside brackets or quotes do not split.

  Raises:
    ConfigError: no '=', no value, or a key given twice.
  """
  settings = {}
  for text in texts:
    key, equals, values = text.partition('=')
    found = re.findall(r'''((?:[^,(\['"]|\([^)]*\)|\[[^]]*\]|'[^']*'|"[^"]*")+)''', values)
    if not (key and equals and found):
      raise schema.ConfigError(f'setting {text!r} is not KEY=VALUE[,VALUE...]')
    if key in settings:
      raise schema.ConfigError(f'setting {key!r} is given twice; put its values into one, separated by commas')
    settings[key] = found
  return settings


def product(settings: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
  """Every combination of values, the last key varying fastest; one empty setting where there are none."""
  return [dict(zip(settings, values)) for values in itertools.product(*settings.values())]


def assign(config: ml_collections.ConfigDict, key: str, text: str):
  """Sets config.a.b from text, in place; where a string stands now the text is kept as it is.

  Raises:
    ConfigError: there is no such key (the nearest are named).
  """
  *parents, last = key.split('.')
  owner = config
  for name in parents:
    owner = _child(owner, name, key)
  value = text
  if not isinstance(_child(owner, last, key), str):
    try:
      value = ast.literal_eval({'true': 'True', 'false': 'False', 'none': 'None'}.get(text.lower(), text))
    except (ValueError, SyntaxError):
      value = text
  with owner.ignore_type():
    owner[last] = value


def _child(owner, name, key):
  choices = owner if isinstance(owner, ml_collections.ConfigDict) else ()
  if name not in choices:
    raise schema.unknown(f'setting {key!r}: key', name, choices)
  return owner[name]


# What only one kind of config holds -> the runner of srm_jax.stages that it is for.
_PLAIN = {'recipe': 'train', 'strategies': 'evaluate', 'sampling': 'annotate'}


def as_pipeline(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The config itself if it is a line of stages; a plain train, evaluate or annotate config as a line of one stage.

  Raises:
    ConfigError: it is none of these.
  """
  if 'stages' in config:
    return config
  for section, run in _PLAIN.items():
    if section in config:
      return ml_collections.ConfigDict({'order': (run,), 'stages': {run: {'run': run, 'config': config}}})
  raise schema.ConfigError(
      f'a config to sweep has stages, or one of the sections {sorted(_PLAIN)}; this one has {sorted(config)}'
  )


def outcomes(done: Mapping[str, Stage]) -> tuple[dict, dict]:
  """(rows, metrics) of a cell from its finished stages; a row is named stage.row, or row where one stage evaluates
  alone.
  """
  rows, found = {}, {}
  for name, stage in done.items():
    if stage.run == 'evaluate':
      for row, result in json.loads((stage.workdir / 'results.json').read_text()).items():
        problems = content_hash(list(evaluate.read_completions(stage.workdir, row)))
        full = row if len(done) == 1 else f'{name}.{row}'
        rows[full] = {
            'accuracy': result['accuracy'], 'n': result['n'], 'correct': pack(result['correct']), 'problems': problems,
        }
    else:
      found[name] = {key: value for key, value in stage.outcome.items() if isinstance(value, (int, float))}
  return rows, found


def row_names(line: Mapping[str, Any]) -> list[str]:
  """Evaluation rows that a line of stages will have, named as in `outcomes`."""
  stages = {name: line['stages'][name] for name in line['order']}
  return [
      row if len(stages) == 1 else f'{name}.{row}'
      for name, stage in stages.items() if stage['run'] == 'evaluate' for row in stage['config']['strategies']
  ]


def parse_pairs(texts: Sequence[str], known: Sequence[str]) -> list[tuple[str, str]]:
  """['a:b'] -> [('a', 'b')].

  Raises:
    ConfigError: not two names, or a name that is not known.
  """
  pairs = []
  for text in texts:
    a, colon, b = text.partition(':')
    if not colon:
      raise schema.ConfigError(f'comparison {text!r} is not ROW:ROW')
    for name in (a, b):
      if name not in known:
        raise schema.unknown('row', name, known)
    pairs.append((a, b))
  return pairs


def pack(correct: Sequence[float]) -> str:
  """[1, 0, 1] -> '101'."""
  return ''.join('1' if right else '0' for right in correct)


def unpack(text: str) -> np.ndarray:
  """'101' -> [1., 0., 1.]."""
  return np.frombuffer(text.encode(), np.uint8).astype(np.float64) - ord('0')


def label(settings: Mapping[str, str]) -> str:
  """How a setting is named in tables: its keys, by their last parts where those differ, with their values."""
  short = [key.rsplit('.', 1)[-1] for key in settings]
  names = short if len(set(short)) == len(short) else list(settings)
  return ', '.join(f'{name}={value}' for name, value in zip(names, settings.values())) or 'as configured'


class Summary(NamedTuple):
  """One row of one setting over its seeds: mean accuracy, standard deviation over seeds (nan for one), problems in
  all.
  """

  setting: str
  row: str
  accuracy: float
  deviation: float
  seeds: int
  n: int


class Comparison(NamedTuple):
  """A minus b, pooled over the seeds that both have; see statistics.PooledPairedTest."""

  a: str
  b: str
  seeds: int
  difference: float
  low: float
  high: float
  p: float
  seeds_above: int
  seed_low: float
  seed_high: float


def _by_setting(cells: Sequence[Cell]) -> dict[str, dict[int, Cell]]:
  """{label: {seed: cell}}; what all cells share is left out of the labels."""
  values: dict[str, set] = {}
  for cell in cells:
    for key, value in cell['settings'].items():
      values.setdefault(key, set()).add(value)
  groups: dict[str, dict[int, Cell]] = {}
  for cell in cells:
    varied = {key: value for key, value in cell['settings'].items() if len(values[key]) > 1}
    groups.setdefault(label(varied), {})[cell['seed']] = cell
  return groups


def summarize(cells: Sequence[Cell]) -> list[Summary]:
  """Accuracy of every evaluation row of every setting, in the order of the cells."""
  found = []
  for setting, seeds in _by_setting(cells).items():
    for row in dict.fromkeys(row for cell in seeds.values() for row in cell['rows']):
      results = [cell['rows'][row] for cell in seeds.values() if row in cell['rows']]
      values = [result['accuracy'] for result in results]
      deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
      found.append(Summary(setting, row, float(np.mean(values)), deviation, len(values), sum(r['n'] for r in results)))
  return found


def _compare(a_cells, b_cells, a_row, b_row, names) -> Comparison | None:
  """The pooled test over the seeds on which both rows answered the same problems; None where there is no such seed."""
  pairs = [
      (a_cells[seed]['rows'][a_row], b_cells[seed]['rows'][b_row]) for seed in a_cells
      if seed in b_cells and a_row in a_cells[seed]['rows'] and b_row in b_cells[seed]['rows']
  ]
  pairs = [(a, b) for a, b in pairs if a['problems'] == b['problems']]
  if not pairs:
    return None
  a, b = (np.stack([unpack(one['correct']) for one in side]) for side in zip(*pairs))
  test = statistics.pooled_paired_test(a, b)
  above = sum(difference > 0 for difference in test.by_seed)
  return Comparison(
      *names, len(pairs), test.difference, test.low, test.high, test.p, above, test.seed_low, test.seed_high,
  )


def compare_settings(cells: Sequence[Cell]) -> list[Comparison]:
  """Every setting against the first one, row by row, where both answered the same problems."""
  groups = _by_setting(cells)
  if not groups:
    return []
  (first, base), *others = groups.items()
  rows = dict.fromkeys(row for cell in base.values() for row in cell['rows'])
  found = [
      _compare(seeds, base, row, row, (f'{row} [{setting}]', f'{row} [{first}]'))
      for setting, seeds in others for row in rows
  ]
  return [one for one in found if one is not None]


def compare_rows(cells: Sequence[Cell], pairs: Sequence[tuple[str, str]]) -> list[Comparison]:
  """Named rows against each other within every setting: pairs of (a, b).

  Raises:
    ConfigError: two rows that never answered the same problems.
  """
  found = []
  for a, b in pairs:
    for setting, seeds in _by_setting(cells).items():
      test = _compare(seeds, seeds, a, b, (f'{a} [{setting}]', f'{b} [{setting}]'))
      if test is None:
        raise schema.ConfigError(f'rows {a!r} and {b!r} of setting {setting!r} were not evaluated on the same problems')
      found.append(test)
  return found


Table = tuple[list[str], list[list[str]]]  # header, rows


def records(items: Sequence[NamedTuple]) -> list[dict[str, Any]]:
  """Named tuples for JSON, which has no NaN."""
  return [{key: None if value != value else value for key, value in item._asdict().items()} for item in items]


def summary_table(summaries: Sequence[Summary]) -> Table:
  header = ['setting', 'row', 'accuracy', '+- over seeds', 'seeds', 'problems']
  rows = [
      [
          one.setting, one.row, f'{one.accuracy:.1%}', '-' if math.isnan(one.deviation) else f'{one.deviation:.1%}',
          str(one.seeds), str(one.n),
      ]
      for one in summaries
  ]
  return header, rows


def comparison_table(tests: Sequence[Comparison]) -> Table:
  """Differences in percentage points; the first interval is over problems, the second over seeds (training runs)."""
  header = ['a', 'b', 'a - b', '95 % over problems', 'p', '95 % over seeds', 'a above b']
  rows = [
      [
          one.a, one.b, f'{100 * one.difference:+.1f}', f'{100 * one.low:+.1f} ... {100 * one.high:+.1f}',
          f'{one.p:.2g}',
          '-' if math.isnan(one.seed_low) else f'{100 * one.seed_low:+.1f} ... {100 * one.seed_high:+.1f}',
          f'{one.seeds_above} of {one.seeds} seeds',
      ]
      for one in tests
  ]
  return header, rows


def metrics_table(cells: Sequence[Cell], names: Sequence[str] = ('loss',)) -> Table:
  """Final metrics of training and annotation stages: mean over seeds, +- standard deviation."""
  header, rows = ['setting', 'stage', 'metric', 'mean', '+- over seeds', 'seeds'], []
  for setting, seeds in _by_setting(cells).items():
    values: dict[tuple[str, str], list[float]] = {}
    for cell in seeds.values():
      for stage, metric in itertools.product(cell['metrics'], names):
        if metric in cell['metrics'][stage]:
          values.setdefault((stage, metric), []).append(cell['metrics'][stage][metric])
    for (stage, metric), found in values.items():
      spread = f'{np.std(found, ddof=1):.3g}' if len(found) > 1 else '-'
      rows.append([setting, stage, metric, f'{np.mean(found):.4g}', spread, str(len(found))])
  return header, rows


def runs_table(frame: pd.DataFrame, names: Sequence[str]) -> Table:
  """The last step of every run: the metrics, and the config keys in which the runs differ.

  Raises:
    ConfigError: a metric that no run has.
  """
  for name in names:
    if name not in frame:
      raise schema.unknown('metric', name, [column for column in frame if not column.startswith('config.')])
  last = frame.groupby('run', sort=False).tail(1)
  keys = [key for key in last if key.startswith('config.') and len(last) > 1 and last[key].astype(str).nunique() > 1]
  rows = [
      [str(row['run']), str(row['step']), *(f'{row[name]:.4g}' for name in names), *(str(row[key]) for key in keys)]
      for _, row in last.iterrows()
  ]
  return ['run', 'step', *names, *(key.removeprefix('config.') for key in keys)], rows


def alarms_table(frame: pd.DataFrame) -> Table:
  """What rang while the runs of a frame trained (srm_jax.alarms), each alarm where it rang first."""
  rows = [
      [run, str(alarm.step), alarm.name, alarm.seen, alarm.cause, alarm.fix]
      for run in frame['run'].unique() for alarm in alarms.replay(metrics.read(run))
  ]
  return ['run', 'step', 'alarm', 'seen', 'likely', 'change'], rows


def markdown(table: Table) -> str:
  """A table in markdown."""
  header, rows = table
  lines = [header, ['---'] * len(header), *rows]
  return ''.join('| ' + ' | '.join(cell.replace('|', '\\|') for cell in line) + ' |\n' for line in lines)
