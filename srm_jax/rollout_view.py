"""Groups of completions that a run's policy samples now, graded, with what it and a reference think of every token.

They come from the run's own source, so that prompts, rewards and advantages are those it would train on next; but all
that is drawn is shown, also groups that dynamic sampling would drop, and an order of problems begins anew.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from srm_jax import checkpoints, schema, sharding
from srm_jax.data.prompting import prompt_ids
from srm_jax.data.tokenizer import Tokenizer
from srm_jax.recipes import RECIPES
from srm_jax.recipes.context import Context, DataConfig, load_problems, open_data
from srm_jax.recipes.scoring import score
from srm_jax.tasks.task import Task
from srm_jax.train import TrainConfig
from srm_jax.types import Problem, Recipe, Rollouts


class Sample(NamedTuple):
  """One completion. ids: with the end-of-text id where it was sampled. reward: of the run; grade: of the task alone.

  Both are None where it cannot be scored. parts: of a reward that is a sum. advantages (None where the run has none),
  logprobs, entropy and reference (log-probabilities under the reference, or None) are float32 [n], at the sampling
  temperature.
  """

  ids: tuple[int, ...]
  text: str
  reward: float | None
  grade: float | None
  parts: Mapping[str, float | None]
  finished: bool
  advantages: np.ndarray | None
  logprobs: np.ndarray
  entropy: np.ndarray
  reference: np.ndarray | None


class Group(NamedTuple):
  """The completions of one prompt; answer '' where the prompt is none of the data's own."""

  prompt: str
  answer: str
  samples: list[Sample]


class View(NamedTuple):
  """What was sampled. resolved: of the objective. reference: what the samples are compared with, if they are."""

  workdir: str
  step: int
  temperature: float
  resolved: Mapping[str, Any]
  reference: str
  groups: list[Group]
  tokenizer: Tokenizer


class _Asked(NamedTuple):
  """The problems of the data, by the ids of their prompts."""

  task: Task
  problems: dict[tuple[int, ...], tuple[str, Problem]]


def view(workdir, *, step: int | None = None, prompts: int = 8, samples: int = 8) -> View:
  """Samples `samples` completions of each of `prompts` prompts that the run would meet at a checkpoint's step.

  Args:
    workdir: of a run with rollouts.
    step: of a checkpoint that is kept; None for the newest.

  Raises:
    ConfigError: no such run or checkpoint, or one that does not sample at this step.
  """
  config = _config(workdir)
  section = _section(config.recipe, prompts, samples)
  with jax.set_mesh(sharding.make_mesh()):
    model = checkpoints.load_model(workdir, step=step)
    context = Context(model.config, model.tokenizer, config.seed, config.num_steps)
    recipe = schema.choose('recipe', section['name'], RECIPES)(section, context)
    rollouts = recipe.source.next({**model.extra, 'model': model.params}, _turn(config.recipe, model.step))
    if not (isinstance(rollouts, Rollouts) and len(_rows(rollouts))):
      raise schema.ConfigError(f'step {model.step} of {workdir} learns from no rewarded samples; fix: another --step')
    temperature = section['rollouts']['temperature'] or 1.0
    asked, name, models = _asked(section['data'], model.tokenizer), '', [(model.config, model.params)]
    if rollouts.reference_logprobs is None:
      name, theirs = _reference(config, recipe, context)
      models += theirs
    groups = [
        _group(jax.tree.map(lambda x: np.asarray(x)[rows], rollouts), models, asked, model.tokenizer, temperature)
        for rows in _rows(rollouts)
    ]
  return View(
      str(workdir), model.step, temperature, recipe.objective.resolved, name or 'reference', groups, model.tokenizer
  )


def _section(section: Mapping[str, Any], prompts: int, samples: int) -> dict[str, Any]:
  """The recipe's section for one draw of whole groups."""
  rollouts = {**section['rollouts'], 'prompts': prompts, 'samples': samples, 'dynamic': None, 'patience': 0}
  once = {'updates': {'epochs': 1, 'minibatches': 1}} if 'updates' in section else {}
  return {**section, 'rollouts': rollouts, **once}


def _turn(section: Mapping[str, Any], step: int) -> int:
  """The draw that a step learns from."""
  updates = section.get('updates', {'epochs': 1, 'minibatches': 1})
  return step // (updates['epochs'] * updates['minibatches'])


def _config(workdir) -> TrainConfig:
  path = epath.Path(workdir) / 'config.json'
  if not path.exists():
    raise schema.ConfigError(f'{workdir} is no run: it has no config.json; give the workdir of a training run')
  config = schema.parse(TrainConfig, {**json.loads(path.read_text()), 'progress': False}, 'config')
  if 'rollouts' not in config.recipe:
    raise schema.ConfigError(f'{workdir} samples nothing: its recipe {config.recipe["name"]!r} has no rollouts')
  return config


def _reference(config: TrainConfig, recipe: Recipe, context: Context) -> tuple[str, list]:
  """(what it is, [model]) that the policy is compared with: its reference or teacher, else what it started from."""
  for name in ('reference', 'teacher'):
    if name in recipe.frozen:
      return name, [recipe.frozen[name]]
  if not (config.init_from and epath.Path(config.init_from).exists()):
    return '', []
  start = checkpoints.load_model(config.init_from, dtype=context.model.dtype)
  return f'start {config.init_from}', [(start.config, start.params)]


def _asked(section: Mapping[str, Any], tokenizer: Tokenizer) -> _Asked:
  data = schema.parse(DataConfig, section, 'config.recipe.data')
  prompting = open_data(data, tokenizer)
  prompts = ((prompting.prompt(problem), problem) for problem in load_problems(data))
  return _Asked(
      prompting.task, {prompt_ids(tokenizer, prompt): (prompt.text, problem) for prompt, problem in prompts}
  )


def _rows(rollouts: Rollouts) -> list[np.ndarray]:
  """Rows of every group; those of a data set belong to none."""
  group = np.asarray(rollouts.group)
  sampled = np.ones(group.shape) if rollouts.sampled is None else np.asarray(rollouts.sampled)
  return [np.flatnonzero((group == number) & (sampled > 0)) for number in np.unique(group[sampled > 0])]


def _group(rows: Rollouts, models: Sequence, asked: _Asked, tokenizer: Tokenizer, temperature: float) -> Group:
  """One group [G, T], scored by the policy and, where there is one, the reference."""
  before = int(np.argmax(rows.batch.segment_ids[0] > 0))  # slots of padding, alike for all rows of a prompt
  rows = jax.tree.map(lambda x: x[:, before:] if x.ndim == 2 else x, rows)
  batch = rows.batch
  own, *theirs = (
      jax.device_get(_score(config, params, batch, temperature=temperature, chunk=None)) for config, params in models
  )
  reference = theirs[0]['logprobs'] if theirs else rows.reference_logprobs
  start = _prompt_length(batch, asked)
  text, problem = asked.problems.get(tuple(batch.inputs[0, :start].tolist()), ('', None))
  samples = []
  for row, used in enumerate(np.count_nonzero(batch.segment_ids, axis=1)):
    ids, span = tuple(batch.inputs[row, start:used].tolist()), (row, slice(start - 1, used - 1))
    reward, written = float(rows.rewards[row]) if rows.valid[row] else None, tokenizer.decode(ids)
    samples.append(Sample(
        ids, written, reward, asked.task.grade(problem, written) if problem else reward, _parts(rows, row),
        ids[-1] in {tokenizer.eos_id, *tokenizer.end_ids}, None if rows.advantages is None else rows.advantages[span],
        own['logprobs'][span], own['entropy'][span], None if reference is None else reference[span],
    ))
  return Group(text or tokenizer.decode(batch.inputs[0, :start]), problem.answer if problem else '', samples)


def _parts(rows: Rollouts, row: int) -> dict[str, float | None]:
  parts = rows.outcomes.parts if rows.outcomes else {}
  return {name: float(values[row]) if known[row] else None for name, (values, known) in parts.items()}


def _prompt_length(batch, asked: _Asked) -> int:
  """Tokens before the first sampled one; of a group without loss, those of the longest prompt that it begins with."""
  places = np.flatnonzero(np.any(batch.loss_mask > 0, axis=0))
  if places.size:
    return int(places[0]) + 1
  row = batch.inputs[0].tolist()
  return max((len(ids) for ids in asked.problems if tuple(row[: len(ids)]) == ids), default=1)


_score = jax.jit(score, static_argnames=('model', 'temperature', 'chunk'))
