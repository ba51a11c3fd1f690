"""quickstart.json: what a run was started with and which stages are finished, so that it can be continued and read.

Paths in it are relative to the workdir, which may be moved.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from srm_jax import checkpoints
from srm_jax.schema import ConfigError
from srm_jax.stages import Stage, relative_target

FILE = 'quickstart.json'
DEVELOPMENT = range(900, 1000)  # seeds on which sizes and step counts were chosen; fresh ones lie beyond
REFERENCE = range(1, 6)  # seeds of reference.json


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the config is made from, and what was known when it was chosen.

  steps: factor on the length of every training. minutes: the budget. estimates: seconds a stage, before the run.
  calibration: what was measured. machine: cores, flags, devices and versions. teacher, student: folders of models to
  start from, in place of those that the line makes. format: how problems are put to them, 'plain' or 'chat'.
  """

  task: str
  size: str
  seed: int
  steps: float
  dtype: str
  minutes: float
  estimates: Mapping[str, float]
  calibration: Mapping[str, Any]
  machine: Mapping[str, Any]
  teacher: str = ''
  student: str = ''
  format: str = 'plain'

  @property
  def arg(self) -> str:
    """Argument of configs/quickstart.py."""
    given = {**self.models, 'format': self.format}
    models = ''.join(f',{name}={value}' for name, value in given.items())
    return f'task={self.task},size={self.size},seed={self.seed},steps={self.steps:g},dtype={self.dtype}{models}'

  @property
  def models(self) -> dict[str, str]:
    """Folders of the models that were given rather than made."""
    return {name: getattr(self, name) for name in ('teacher', 'student') if getattr(self, name)}


def fresh_seed() -> int:
  """A seed that neither development nor the reference used."""
  return DEVELOPMENT.stop + int.from_bytes(os.urandom(4), 'little') % 9000


def read(workdir) -> Settings | None:
  """The settings that a workdir was started with; None where there are none yet."""
  path = pathlib.Path(workdir) / FILE
  return Settings(**_content(path)['settings']) if path.exists() else None


def agree(settings: Settings, workdir, **wanted):
  """Checks that flags given on a second start ask for the run that is there; None asks for nothing.

  Raises:
    ConfigError: they differ.
  """
  for name, value in wanted.items():
    there = getattr(settings, name)
    if value is not None and value != there:
      raise ConfigError(f'{workdir} holds a run with {name}={there}, not {name}={value}; use another --workdir')


def write(workdir, settings: Settings, stages: Mapping[str, Stage]):
  """Replaces the file as a whole."""
  workdir = pathlib.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  plain = {name: _plain(stage) for name, stage in stages.items()}
  content = {'settings': dataclasses.asdict(settings), 'stages': plain}
  checkpoints.write_whole(workdir / FILE, json.dumps(content, indent=1))


def load(workdir) -> tuple[Settings, dict[str, Stage]]:
  """Settings and finished stages of a run.

  Raises:
    ConfigError: no run there.
  """
  path = pathlib.Path(workdir) / FILE
  if not path.exists():
    raise ConfigError(f'{workdir} holds no quickstart (no {FILE}); bash experiments/quickstart.sh makes one')
  content, folder = _content(path), path.parent
  stages = {
      name: Stage(name, one['run'], folder / one['folder'], _target(folder, one), one['seconds'], one['outcome'])
      for name, one in content['stages'].items()
  }
  return Settings(**content['settings']), stages


def _target(folder: pathlib.Path, one: Mapping) -> pathlib.Path:
  return pathlib.Path(os.path.normpath(folder / one['folder'] / one['target']))


def _content(path) -> dict:
  try:
    return json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ConfigError(f'{path} is damaged ({error}); restore it, or use another --workdir') from error


def _plain(stage: Stage) -> dict:
  return {
      'run': stage.run, 'folder': stage.workdir.name, 'target': relative_target(stage.workdir, stage.target),
      'seconds': stage.seconds, 'outcome': stage.outcome,
  }
