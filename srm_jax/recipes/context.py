"""What every recipe is given, and how it opens its data: problems of tasks and annotations, as examples."""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax

from srm_jax import checkpoints, schema
from srm_jax.data import packing, pipeline, records
from srm_jax.data.prompting import PromptConfig, Prompting, open_prompting
from srm_jax.data.tokenizer import Tokenizer, same_vocabulary
from srm_jax.models.config import TransformerConfig
from srm_jax.models.transformer import Transformer, variables
from srm_jax.tasks import TASKS
from srm_jax.tasks.task import Task
from srm_jax.types import Batch, Problem, Source


class Context(NamedTuple):
  """The student's config and tokenizer, and the run's seed and length."""

  model: TransformerConfig
  tokenizer: Tokenizer
  seed: int
  num_steps: int


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which prompts, and which completions to learn.

  task, split, count, seed: problems of a task, generated or read. records: a file of annotations, which replaces
  split, count and seed. target: 'solution' learns the problem's own worked solution, 'completion' the annotation's
  text; both of right annotations only, unless 'unfiltered_solution' or 'unfiltered_completion' says that wrong ones
  count too; 'conversation' learns the assistants' turns of a file of conversations. prompt: how problems are put.
  """

  task: str
  split: str
  count: int
  seed: int
  records: str
  target: str
  prompt: PromptConfig


@dataclasses.dataclass(frozen=True)
class BatchConfig:
  """rows of `length` positions; packing 'plan' fills rows, 'one_per_row' pads."""

  size: int
  length: int
  packing: str


TARGETS = ('solution', 'completion', 'unfiltered_solution', 'unfiltered_completion', 'conversation')
PLANS = {'plan': packing.plan, 'one_per_row': packing.one_per_row}


class Worked(NamedTuple):
  """One problem with the completion to learn; finished is False where it was cut and must not learn to end."""

  id: str
  problem: Problem
  completion: str
  finished: bool = True


def find_task(name: str) -> Task:
  """TASKS[name], or an error that lists the tasks."""
  return schema.choose('task', name, TASKS)


def _solutions(task, problems):
  worked = [Worked(problem.id, problem, task.solution(problem)) for problem in problems]
  return [item for item in worked if item.completion is not None]


def _annotations(task, path, target):
  if not pathlib.Path(path).exists():
    raise schema.ConfigError(f'data.records {path} does not exist; run the annotation first')
  kept = [annotation for annotation in records.read(path) if annotation.correct or target.startswith('unfiltered')]
  if target.endswith('completion'):
    unique = {(a.problem.id, a.completion): a for a in kept}
    return [Worked(a.id, a.problem, a.completion, a.finished) for a in unique.values()]
  return _solutions(task, {a.problem.id: a.problem for a in kept}.values())


def worked_examples(data: DataConfig) -> list[Worked]:
  """Problems with completions: gold solutions, or the right annotations without repetitions.

  Raises:
    ConfigError: unknown task or target, no such file, or nothing left to learn from.
  """
  task = find_task(data.task)
  if data.target not in TARGETS:
    raise schema.unknown('data.target', data.target, TARGETS)
  if data.records:
    worked = _annotations(task, data.records, data.target)
  elif data.target != 'solution':
    raise schema.ConfigError(f"data.target {data.target!r} needs data.records, a file of annotations")
  else:
    worked = _solutions(task, load_problems(data))
  if not worked:
    raise schema.ConfigError(
        f'nothing to learn from in {data}: no problem with a worked solution, or no right annotation'
    )
  return worked


def load_problems(data: DataConfig) -> list[Problem]:
  """The problems that the data section names (of the annotations' file where one is given)."""
  if data.target == 'conversation':
    raise schema.ConfigError("data.target 'conversation' is for fine-tuning; what samples or grades needs problems")
  if data.records:
    return list({a.problem.id: a.problem for a in records.read(data.records)}.values())
  return find_task(data.task).problems(data.split, count=data.count or None, seed=data.seed)


def open_data(data: DataConfig, tokenizer: Tokenizer) -> Prompting:
  """How the problems of a data section are put to models of a tokenizer."""
  return open_prompting(data.prompt, find_task(data.task), tokenizer)


def examples_of(data: DataConfig, tokenizer: Tokenizer) -> list[packing.Example]:
  """What a data section has to learn from.

  Raises:
    ConfigError: as `worked_examples` and `open_prompting`; a conversation that the template cannot write.
  """
  prompting = open_data(data, tokenizer)
  if data.target == 'conversation':
    return [prompting.conversation(one.id, one.messages) for one in _conversations(data)]
  return [
      prompting.example(item.id, item.problem, item.completion, finished=item.finished)
      for item in worked_examples(data)
  ]


def _conversations(data: DataConfig):
  if not pathlib.Path(data.records).is_file():
    raise schema.ConfigError(f"data.target 'conversation' reads data.records; {data.records!r} is no file")
  return records.read_conversations(data.records)


def dataset(data: DataConfig, batch: BatchConfig, context: Context) -> Source:
  """The source of a data section: packed batches of its examples."""
  examples = examples_of(data, context.tokenizer)
  return pipeline.dataset_source(
      examples, batch_size=batch.size, length=batch.length, seed=context.seed,
      plan=schema.choose('batch.packing', batch.packing, PLANS),
      process_index=jax.process_index(), process_count=jax.process_count(),
  )


def load_teacher(folder: str, context: Context, *, otherwise: str = '') -> checkpoints.Model:
  """A frozen model in the student's compute dtype that shares the student's vocabulary (the rows with which either
  pads it do not count). otherwise: what to do where it does not.

  Raises:
    ConfigError: its tokenizer is another one.
  """
  teacher = checkpoints.load_model(folder, dtype=context.model.dtype)
  names = (f'teacher {folder}', teacher.tokenizer, 'the student', context.tokenizer)
  require_same_vocabulary(*names, otherwise=otherwise)
  return teacher


def require_same_vocabulary(name: str, tokenizer: Tokenizer, other_name: str, other: Tokenizer, *, otherwise=''):
  """Raises ConfigError where two models' ids do not mean the same pieces."""
  if tokenizer.fingerprint != other.fingerprint and not same_vocabulary(tokenizer, other):
    raise schema.ConfigError(
        f'{name} has tokenizer {tokenizer.name} of {tokenizer.vocab_size} pieces, {other_name} {other.name} of '
        f'{other.vocab_size}; logits can only be compared over one vocabulary{otherwise and "; fix: " + otherwise}'
    )


def forward(config: TransformerConfig, params: Any, batch: Batch, *, taps=()):
  """Hidden states of a packed batch: -> models.transformer.Output without logits. params may carry adapters."""
  return Transformer(config).apply(
      variables(params), batch.inputs, positions=batch.positions, segment_ids=batch.segment_ids, logits_at=(),
      taps=taps,
  )

