"""A line of stages: training, annotation, caching and evaluation runs that feed each other, each run once.

A pipeline config names its stages, and their order (a ConfigDict sorts its keys):

  config.order = ('NAME', ...)
  config.stages.NAME = {'run': 'tokenizer' | 'train' | 'annotate' | 'label' | 'cache' | 'evaluate' | 'select' |
                         'given', 'config': {...}}

Inside a stage's config the string '{NAME}' stands for the workdir of an earlier stage, and '{NAME}/file' for a file in
it. A stage lives in <workdir>/NAME-<hash of its resolved config>, so sweeps over later stages share the earlier ones,
and a changed setting never meets an old result.
"""

import dataclasses
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from srm_jax import checkpoints, schema
from srm_jax.annotate import AnnotateConfig, annotate
from srm_jax.cache_teacher import CacheConfig, cache_teacher
from srm_jax.data import tokenizer as tokenizers
from srm_jax.data.records import content_hash
from srm_jax.evaluate import evaluate, open_config
from srm_jax.process_labels import ProcessLabelConfig, label_process
from srm_jax.recipes import CONFIGS
from srm_jax.recipes.context import DataConfig, find_task, worked_examples
from srm_jax.train import TrainConfig, train

DONE = 'done.json'


@dataclasses.dataclass(frozen=True)
class SelectConfig:
  """Chooses the best of several evaluated models by accuracy of `row`: candidates {stage of the model: '{stage of its
  evaluation}'}.
  """

  candidates: Mapping[str, Any]
  row: str


@dataclasses.dataclass(frozen=True)
class GivenConfig:
  """A model (or tokenizer) that is there already: the folder of a published model, or the workdir of another run."""

  folder: str


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """Trains a SentencePiece model on prompts and worked solutions; name 'byte' needs none."""

  data: DataConfig
  vocab_size: int
  split_by_whitespace: bool


class Stage(NamedTuple):
  """A finished stage: its folder, what later stages see under its name, seconds that its last start took, and its
  outcome.
  """

  name: str
  run: str
  workdir: pathlib.Path
  target: pathlib.Path
  seconds: float
  outcome: dict[str, Any]


def _tokenizer(config, workdir, done):
  del done
  config = schema.parse(TokenizerConfig, config, 'config')
  task = find_task(config.data.task)
  texts = [task.prompt(item.problem) + item.completion for item in worked_examples(config.data)]
  workdir.mkdir(parents=True, exist_ok=True)
  path = tokenizers.train_sentencepiece(
      texts, workdir / 'tokenizer.model', vocab_size=config.vocab_size, split_by_whitespace=config.split_by_whitespace
  )
  tokenizer = tokenizers.load(path)
  tokens = sum(len(tokenizer.encode(text)) for text in texts)
  return workdir, {'vocab_size': tokenizer.vocab_size, 'texts': len(texts), 'tokens_per_text': tokens / len(texts)}


def _train(config, workdir, done):
  del done
  run = train(config, workdir)
  return workdir, {'step': run.step, **{key: value for key, value in run.metrics[-1].items() if key != 'step'}}


def _annotate(config, workdir, done):
  del done
  return workdir, annotate(config, workdir).summary


def _label(config, workdir, done):
  del done
  return workdir, label_process(config, workdir).summary


def _cache(config, workdir, done):
  del done
  return workdir, cache_teacher(config, workdir).summary


def _evaluate(config, workdir, done):
  del done
  results = evaluate(config, workdir).results
  return workdir, {name: {key: row[key] for key in ('accuracy', 'interval', 'n')} for name, row in results.items()}


def _select(config, workdir, done: Mapping[str, Stage]):
  """Picks by dev accuracy; a tie goes to the first name in the alphabet."""
  workdir.mkdir(parents=True, exist_ok=True)
  config = schema.parse(SelectConfig, config, 'config')
  evaluations = {str(stage.target): stage.outcome for stage in done.values() if stage.run == 'evaluate'}
  rows = {model: schema.choose('evaluation', folder, evaluations) for model, folder in config.candidates.items()}
  scores = {model: schema.choose('row', config.row, outcome)['accuracy'] for model, outcome in rows.items()}
  chosen = max(scores, key=scores.get)
  return done[chosen].target, {'chosen': chosen, 'scores': scores}


def _given(config, workdir, done):
  del done
  folder = pathlib.Path(schema.parse(GivenConfig, config, 'config').folder).absolute()
  rows, pieces = checkpoints.model_config(folder).vocab_size, checkpoints.model_tokenizer(folder).vocab_size
  workdir.mkdir(parents=True, exist_ok=True)
  return folder, {'vocab_size': rows, 'pieces': pieces}


def _check_train(config, where):
  parsed = schema.parse(TrainConfig, config, where)
  schema.parse(schema.choose('recipe', parsed.recipe.get('name', ''), CONFIGS), parsed.recipe, f'{where}.recipe')


CHECKS: dict[str, Callable] = {
    'tokenizer': lambda config, where: schema.parse(TokenizerConfig, config, where),
    'train': _check_train,
    'annotate': lambda config, where: schema.parse(AnnotateConfig, config, where),
    'label': lambda config, where: schema.parse(ProcessLabelConfig, config, where),
    'cache': lambda config, where: schema.parse(CacheConfig, config, where),
    'evaluate': open_config,
    'select': lambda config, where: schema.parse(SelectConfig, config, where),
    'given': lambda config, where: schema.parse(GivenConfig, config, where),
}

RUNNERS: dict[str, Callable] = {
    'tokenizer': _tokenizer, 'train': _train, 'annotate': _annotate, 'label': _label, 'cache': _cache,
    'evaluate': _evaluate, 'select': _select, 'given': _given,
}


def _substitute(value, done: Mapping[str, Stage], where: str):
  """Replaces '{stage}' at the start of strings by the stage's target."""
  if isinstance(value, Mapping):
    return {key: _substitute(item, done, f'{where}.{key}') for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_substitute(item, done, where) for item in value]
  match = re.match(r'\{(\w+)\}', value) if isinstance(value, str) else None
  if match is None:
    return value
  if match[1] not in done:
    raise schema.unknown(f'{where}: stage', match[1], done)
  return str(done[match[1]].target) + value[match.end() :]


def _identity(config, done: Mapping[str, Stage]):
  """The config with references instead of paths, so that a moved workdir keeps its hashes."""
  names = {str(stage.target): f'{{{stage.target.name}}}' for stage in done.values()}

  def one(value):
    if isinstance(value, Mapping):
      return {key: one(item) for key, item in value.items() if key != 'progress'}
    if isinstance(value, (list, tuple)):
      return [one(item) for item in value]
    if isinstance(value, str):
      for path, name in names.items():
        value = value.replace(path, name)
    return value

  return one(config)


def run_stage(name: str, section: Mapping[str, Any], workdir, done: Mapping[str, Stage]) -> Stage:
  """Runs one stage, or reads it back where it is finished.

  Args:
    name: of the stage.
    section: {'run': ..., 'config': ...}.
    workdir: folder of the pipeline.
    done: the stages before it.
  """
  section = schema.resolve(section)
  run = schema.choose(f'stages.{name}.run', section['run'], RUNNERS)
  config = _substitute(section['config'], done, f'stages.{name}')
  folder = pathlib.Path(workdir).absolute() / f'{name}-{content_hash(_identity(config, done))[:10]}'
  path = folder / DONE
  if path.exists():
    saved = json.loads(path.read_text())
    target = pathlib.Path(os.path.normpath(folder / saved['target']))
    return Stage(name, section['run'], folder, target, saved['seconds'], saved['outcome'])
  start = time.perf_counter()
  target, outcome = run(config, folder, done)
  seconds = time.perf_counter() - start
  saved = {'target': relative_target(folder, target), 'seconds': seconds, 'outcome': outcome}
  checkpoints.write_whole(path, json.dumps(saved))
  return Stage(name, section['run'], folder, pathlib.Path(target), seconds, outcome)


def relative_target(folder: pathlib.Path, target) -> str:
  """A target as it is written down: relative to the stage's folder, so that a workdir may be moved; absolute where it
  lies outside of the workdir.
  """
  target = pathlib.Path(target)
  if target == folder:
    return '.'
  return str(pathlib.Path('..') / target.name) if target.parent == folder.parent else str(target)


def check(config):
  """Opens the config of every stage without running any: a misspelt key in the last one is found before the first.

  Raises:
    ConfigError: an unknown runner, stage, key or name, or a value of the wrong type.
  """
  before: dict[str, Stage] = {}
  for name in config['order']:
    section, where = schema.resolve(schema.choose('stage', name, config['stages'])), f'stages.{name}'
    folder = pathlib.Path(name)
    check_config = schema.choose(f'{where}.run', section['run'], CHECKS)
    check_config(_substitute(section['config'], before, where), f'{where}.config')
    before[name] = Stage(name, section['run'], folder, folder, 0.0, {})


def run_stages(config, workdir, *, report: Callable[[Stage], None] = lambda stage: None) -> dict[str, Stage]:
  """Runs the stages of a pipeline config in order; finished ones are skipped.

  Args:
    config: with `order` and `stages`.
    workdir: folder of the pipeline.
    report: called with every finished stage.

  Returns:
    {name: Stage}.

  Raises:
    ConfigError: as `check`, before any stage has run; or what a stage finds in its data.
  """
  check(config)
  done: dict[str, Stage] = {}
  stages = config['stages']
  for name in config['order']:
    done[name] = run_stage(name, schema.choose('stage', name, stages), workdir, done)
    report(done[name])
  return done
