"""A cell of a study is its line of stages for one task and seed: trained, evaluated, measured, written down once."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.sweep import load_config

Cell = Mapping[str, Any]


def open_config(config: str, seed: int):
  """FILE.py[:arg] -> what its get_config makes for a seed."""
  path, _, arg = config.partition(':')
  return load_config(path, ','.join(filter(None, [arg, f'seed={seed}'])))


def path_of(config, workdir) -> pathlib.Path:
  """Where the cell of a config is written; another setting is another file."""
  from srm_jax.data.records import content_hash
  from srm_jax.schema import resolve

  run = {key: value for key, value in resolve(config).items() if key != 'claims'}  # judged later, from what was run
  return pathlib.Path(workdir) / 'cells' / f'{config.task}-{config.seed}-{content_hash(run)[:12]}.json'


def measure_arms(done, config) -> dict[str, Any]:
  """What the finished stages of configs/studies/teaching.py say.

  Returns:
    {'seconds', 'models': {name: {'accuracy', 'n', 'correct'}}}, name one of teacher, base and the arms; base and the
    arms have 'curve', 'entropy', 'divergence', 'cka', 'flops' and 'seconds' as well. The cell's seconds are of its
    stages (and of those that it shares with other cells) and of measuring.
  """
  from experiments.study.measure import measured, training_cost

  models = {name: graded(done[f'test_{name}']) for name in ('teacher', 'base', *config.arms)}
  seconds = sum(stage.seconds for stage in done.values())
  for name in ('base', *config.arms):
    found = measured(done[name].workdir, done['teacher'].workdir, config.measure)
    seconds += found.pop('measuring')
    models[name] |= found | training_cost(done[name].workdir)
  return {'seconds': seconds, 'models': models}


def run_cell(
    config, workdir, *, measure: Callable[..., dict[str, Any]] = measure_arms, report: Callable = lambda stage: None
) -> Cell:
  """Runs a cell, or reads it back where it is finished.

  Args:
    config: a line of stages with task and seed.
    workdir: of the study; cells share the stages that they have in common.
    measure: (stages by name, config) -> what the cell holds beside its task and seed.
    report: called with every finished stage.
  """
  from srm_jax import checkpoints, stages

  path = path_of(config, workdir)
  if not path.exists():
    done = stages.run_stages(config, workdir, report=report)
    cell = {'task': config.task, 'seed': config.seed, **measure(done, config)}
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_whole(path, json.dumps(cell))
  return read(config, workdir)


def read(config, workdir) -> Cell:
  """A finished cell."""
  return json.loads(path_of(config, workdir).read_text())


def graded(stage, row: str = '') -> dict[str, Any]:
  """{'accuracy', 'n', 'correct'} of a row of an evaluation, by default of the only one."""
  results = json.loads((stage.workdir / 'results.json').read_text())
  (result,) = [results[row]] if row else results.values()
  return {'accuracy': result['accuracy'], 'n': result['n'], 'correct': pack(result['correct'])}


def pack(correct: Sequence[float]) -> str:
  """[1, 0, 1] -> 'a': hexadecimal digits of four problems each, filled up with zeros."""
  return np.packbits(np.asarray(correct, np.uint8)).tobytes().hex()


def unpack(text: str, n: int) -> np.ndarray:
  """Inverse of `pack`: float [n]."""
  return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:n].astype(float)


def correct(cells: Sequence[Cell], arms: Sequence[str]) -> np.ndarray:
  """[S, N], seeds x problems: the mean of the arms' grades on each problem."""
  models = [[cell['models'][arm] for arm in arms] for cell in cells]
  return np.array([np.mean([unpack(one['correct'], one['n']) for one in some], axis=0) for some in models])


def values(cells: Sequence[Cell], arms: Sequence[str], key: str) -> np.ndarray:
  """[S]: the mean over arms (and over layers, for 'cka') of what was measured."""
  return np.array([np.mean([np.mean(cell['models'][arm][key]) for arm in arms]) for cell in cells])


def by_task(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
  """{task: its cells by seed}."""
  found: dict[str, list[Cell]] = {}
  for cell in sorted(cells, key=lambda cell: cell['seed']):
    found.setdefault(cell['task'], []).append(cell)
  return found
