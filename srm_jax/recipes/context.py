"""What every recipe is given, and how it opens its data: problems of tasks and annotations, as examples."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from srm_jax import checkpoints, schema
from srm_jax.data import mixing, packing, pipeline, records
from srm_jax.data.prompting import PromptConfig, Prompting, open_prompting
from srm_jax.data.tokenizer import Tokenizer, same_vocabulary
from srm_jax.models.config import TransformerConfig
from srm_jax.models.transformer import Transformer, variables
from srm_jax.recipes import schedules
from srm_jax.rewards import BUDGET
from srm_jax.tasks import TASKS
from srm_jax.tasks.task import Task, stable_hash
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
  split, count and seed. target: what is learnt, from TARGETS; of right annotations only, unless it is 'unfiltered_...';
  'conversation' learns the assistants' turns of a file of conversations. pass_rate: (lowest, highest) share of right
  answers among the annotations of a problem, or None. budget: numbers of tokens, one of which every problem asks for;
  None asks for none. prompt: how problems are put. mix: {name: PartConfig}, in the
  place of all else: `count` examples in exact shares, drawn by `seed`; with count 0 every row of a batch is of one
  part, all of whose examples are read, and the shares may change over the run.
  """

  task: str
  split: str
  count: int
  seed: int
  records: str
  target: str
  pass_rate: tuple | None
  budget: tuple | None
  prompt: PromptConfig
  mix: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class PartConfig:
  """One data set of a mix. ratio: its weight, a number or a schedule; shares are ratios over their sum."""

  ratio: Any
  data: DataConfig


@dataclasses.dataclass(frozen=True)
class BatchConfig:
  """rows of `length` positions; packing 'plan' fills rows, 'one_per_row' pads."""

  size: int
  length: int
  packing: str


# 'solution' is the problem's own worked solution, 'completion' the annotation's text; 'rationale' is either without the
# line of the answer, and 'answer' that line alone.
TARGETS = (
    'solution', 'completion', 'rationale', 'answer', 'unfiltered_solution', 'unfiltered_completion', 'conversation',
)
ROWS = ('all', 'data', 'samples')  # whose tokens a term of a loss may count, besides a part of a mix
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


def annotations(data: DataConfig) -> list[records.Annotation]:
  """The annotations that a data section names: of its pass rate, and right ones alone unless it is 'unfiltered_...'.

  Raises:
    ConfigError: no such file, or no range of pass rates.
  """
  if not pathlib.Path(data.records).exists():
    raise schema.ConfigError(f'data.records {data.records} does not exist; run the annotation first')
  found = list(records.read(data.records))
  if data.pass_rate is not None:
    rates, (low, high) = pass_rates(found), _range(data.pass_rate)
    found = [annotation for annotation in found if low <= rates.get(annotation.problem.id, 0.0) <= high]
  return [annotation for annotation in found if annotation.correct or data.target.startswith('unfiltered')]


def pass_rates(annotations: Sequence[records.Annotation]) -> dict[str, float]:
  """{problem id: share of its annotations that are right}; what could not be graded counts as wrong, and what was
  sampled with a hint says nothing.
  """
  grades: dict[str, list[bool]] = {}
  for annotation in annotations:
    if annotation.hint:
      continue
    grades.setdefault(annotation.problem.id, []).append(bool(annotation.correct))
  return {problem: sum(right) / len(right) for problem, right in grades.items()}


def _range(pass_rate):
  fine = len(pass_rate) == 2 and all(schedules.is_number(end) for end in pass_rate)
  if not fine or not 0 <= pass_rate[0] <= pass_rate[1] <= 1:
    raise schema.ConfigError(f'data.pass_rate is {pass_rate!r}; expected (lowest, highest) within 0 and 1')
  return pass_rate


def _worked(task, data):
  """What is learnt, before anything is cut off it."""
  texts = data.target.endswith(('completion', 'rationale'))
  if not data.records:
    if data.target not in ('solution', 'rationale', 'answer'):
      raise schema.ConfigError(f'data.target {data.target!r} needs data.records, a file of annotations')
    if data.pass_rate is not None:
      raise schema.ConfigError(f'data.pass_rate {data.pass_rate} is of data.records, a file of annotations')
    problems = load_problems(data)
  else:
    kept = annotations(data)
    if texts:
      unique = {(a.problem.id, a.completion): a for a in kept}
      return [Worked(a.id, a.problem, a.completion, a.finished) for a in unique.values()]
    problems = {a.problem.id: a.problem for a in kept}.values()
  if data.target == 'answer':
    return [Worked(problem.id, problem, f'{task.answer_cue}{problem.answer}') for problem in problems]
  return _solutions(task, problems)


def _rationale(task, item: Worked) -> Worked:
  return item._replace(completion=item.completion.rpartition(f'\n{task.answer_cue}')[0])


def worked_examples(data: DataConfig) -> list[Worked]:
  """Problems with completions: gold solutions, or the right annotations without repetitions; of all parts of a mix.

  Raises:
    ConfigError: unknown task or target, no such file, or nothing left to learn from.
  """
  if data.mix:
    return [item for part in parts_of(data).values() for item in worked_examples(part.data)]
  task = find_task(data.task)
  if data.target not in TARGETS:
    raise schema.unknown('data.target', data.target, TARGETS)
  worked = _worked(task, data)
  if data.target == 'rationale':
    worked = [item for item in (_rationale(task, item) for item in worked) if item.completion]
  if not worked:
    raise schema.ConfigError(
        f'nothing to learn from in {data}: no problem with a worked solution, or no right annotation'
    )
  return worked


def parts_of(data: DataConfig) -> dict[str, PartConfig]:
  """The parts of a mix by name, in the order of the `sources` of its batches; {} where it is one data set.

  Raises:
    ConfigError: a ratio that is no weight, a name that stands for something else, or a mix of mixes.
  """
  parts = {name: schema.parse(PartConfig, data.mix[name], f'data.mix.{name}') for name in sorted(data.mix)}
  for name, part in parts.items():
    if name in ROWS:
      raise schema.ConfigError(f'data.mix.{name}: rows of a loss are called so; fix: another name than {list(ROWS)}')
    if part.data.mix:
      raise schema.ConfigError(f'data.mix.{name} is a mix itself; fix: give all parts in one')
    schedules.schedule(part.ratio, f'data.mix.{name}.ratio')
    if data.count and not schedules.is_number(part.ratio):
      raise schema.ConfigError(f'data.mix.{name}.ratio changes over the run; fix: data.count=0 draws row by row')
  return parts


def load_problems(data: DataConfig) -> list[Problem]:
  """The problems that the data section names (of the annotations' file where one is given), with their budgets."""
  if data.mix or data.target == 'conversation':
    raise schema.ConfigError('a mix and conversations are there to be learnt; what samples or grades needs problems')
  if data.records:
    found = list({a.problem.id: a.problem for a in records.read(data.records)}.values())
  else:
    found = find_task(data.task).problems(data.split, count=data.count or None, seed=data.seed)
  return [_budgeted(problem, data) for problem in found] if data.budget else found


def _budgeted(problem: Problem, data: DataConfig) -> Problem:
  """The problem with a request for so many tokens, which rewards of length read from its metadata (LCPO)."""
  tokens = data.budget[stable_hash(f'{data.seed} {problem.id}') % len(data.budget)]
  return dataclasses.replace(
      problem, question=f'{problem.question.strip()} Think for {tokens} tokens.',
      metadata={**problem.metadata, BUDGET: tokens},
  )


def open_data(data: DataConfig, tokenizer: Tokenizer) -> Prompting:
  """How the problems of a data section are put to models of a tokenizer."""
  return open_prompting(data.prompt, find_task(data.task), tokenizer)


def examples_of(data: DataConfig, tokenizer: Tokenizer) -> list[packing.Example]:
  """What a data section has to learn from.

  Raises:
    ConfigError: as `worked_examples` and `open_prompting`; a conversation that the template cannot write.
  """
  if data.mix:
    return _mixed(data, tokenizer)
  prompting = open_data(data, tokenizer)
  if data.target == 'conversation':
    return [prompting.conversation(one.id, one.messages) for one in _conversations(data)]
  return [
      prompting.example(item.id, item.problem, item.completion, finished=item.finished)
      for item in worked_examples(data)
  ]


def _examples_by_part(data: DataConfig, tokenizer: Tokenizer) -> dict[str, list[packing.Example]]:
  return {name: examples_of(part.data, tokenizer) for name, part in parts_of(data).items()}


def _mixed(data: DataConfig, tokenizer: Tokenizer) -> list[packing.Example]:
  if not data.count:
    raise schema.ConfigError('a mix with data.count=0 is drawn row by row; what reads it whole needs a count')
  ratios = {name: part.ratio for name, part in parts_of(data).items()}
  try:
    return mixing.mixture(_examples_by_part(data, tokenizer), ratios, size=data.count, seed=data.seed)
  except ValueError as error:
    raise schema.ConfigError(f'data.mix: {error}') from error


def _conversations(data: DataConfig):
  if not pathlib.Path(data.records).is_file():
    raise schema.ConfigError(f"data.target 'conversation' reads data.records; {data.records!r} is no file")
  return records.read_conversations(data.records)


def dataset(
    data: DataConfig, batch: BatchConfig, context: Context, *, adapt: Callable | None = None,
) -> Source:
  """The source of a data section: packed batches of its examples.

  adapt: of a mix that is drawn row by row, {part: examples} -> ({part: examples to learn}, mixing.Shares); None follows
  the ratios.
  """
  options = dict(
      batch_size=batch.size, length=batch.length, seed=context.seed,
      plan=schema.choose('batch.packing', batch.packing, PLANS),
      process_index=jax.process_index(), process_count=jax.process_count(),
  )
  if data.mix and not data.count:
    examples, shares = _examples_by_part(data, context.tokenizer), _scheduled_shares(parts_of(data))
    return mixing.shared_source(*(adapt(examples) if adapt else (examples, shares)), **options)
  return pipeline.dataset_source(examples_of(data, context.tokenizer), **options)


def _scheduled_shares(parts: Mapping[str, PartConfig]) -> mixing.Shares:
  ratios = [schedules.schedule(part.ratio, f'data.mix.{name}.ratio') for name, part in parts.items()]
  return lambda params, step, last: [float(ratio(step)) for ratio in ratios]


def load_teacher(folder: str, context: Context, *, otherwise: str = '') -> checkpoints.Model:
  """A frozen model in the student's compute dtype that shares the student's vocabulary. otherwise: what to do where it
  does not. Of the rows with which either pads its embedding, those that the other has not do not count; rows that both
  have are tokens like others.

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

