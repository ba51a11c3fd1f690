"""Monte-Carlo labels of steps: a student goes on from every step of an annotation, the verifier says how often it
comes to the right answer.

  rate(s_1 .. s_i) = (1 / N) sum_n grade(s_1 .. s_i, continuation_n)

A step after which the text holds its answer has nothing to go on with: its rate is the grade of the text. So a chain
that is wrong from its third line on, and that the student does not repair, has rates near 1, near 1, 0, 0, ..., 0.
Left out: search for the first wrong step (OmegaPRM), filtering by a second judge.
Reference: Wang et al., Math-Shepherd, arXiv:2312.08935.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from srm_jax import checkpoints, metrics, schema, sharding
from srm_jax.data import records
from srm_jax.data.prompting import Prompting, prompt_ids
from srm_jax.data.steps import SEGMENTATIONS, Segmentation, tokens_at
from srm_jax.inference import make_generate
from srm_jax.models.config import forward_flops
from srm_jax.recipes.context import DataConfig, annotations, open_data
from srm_jax.types import Generate, Prompt, SamplingParams

RECORDS = 'steps.jsonl'


@dataclasses.dataclass(frozen=True)
class ProcessLabelConfig:
  """student: workdir of the model that goes on. data: whose steps, by data.records; unfiltered, or wrong ones are not
  there. segmentation: from SEGMENTATIONS. sampling.samples: continuations a step. chunk: annotations between writes.
  """

  student: str
  data: DataConfig
  segmentation: str
  sampling: SamplingParams
  batch_size: int
  chunk: int
  mesh: tuple
  progress: bool


class ProcessLabels(NamedTuple):
  """Finished labels: their file, and annotations, steps, mean_rate, right (share of rates above 0), sampled_tokens and
  flops in sum.
  """

  path: pathlib.Path
  summary: dict[str, Any]


class Step(NamedTuple):
  """A step of an annotation. end: in characters. prompt: the text up to it, to be continued; written: its completion
  part.
  """

  end: int
  prompt: Prompt
  written: tuple[int, ...]


def label_process(config: ml_collections.ConfigDict, workdir) -> ProcessLabels:
  """Labels, or continues to label, the steps of the annotations of `config` into `workdir`/steps.jsonl.

  Raises:
    ConfigError: unknown names or types, a workdir of another config, no such student or file, a step from which the
      student has no room to go on.
    ValueError: a completion that the student's tokenizer does not give back, a damaged record.
  """
  plain = schema.resolve(config)
  parsed = schema.parse(ProcessLabelConfig, plain, 'config')
  workdir, tracked = pathlib.Path(workdir), {key: value for key, value in plain.items() if key != 'progress'}
  schema.choose('segmentation', parsed.segmentation, SEGMENTATIONS)
  with jax.set_mesh(sharding.make_mesh(parsed.mesh)):
    student = checkpoints.load_model(parsed.student)
    checkpoints.claim(workdir, tracked)
    _write(parsed, student, workdir / RECORDS, records.content_hash(tracked))
  summary = _summary(records.read(workdir / RECORDS, records.StepLabels), student.config)
  (workdir / 'summary.json').write_text(json.dumps(summary, indent=1))
  return ProcessLabels(workdir / RECORDS, summary)


def _write(config: ProcessLabelConfig, student: checkpoints.Model, path, config_hash):
  prompting, segment = open_data(config.data, student.tokenizer), SEGMENTATIONS[config.segmentation]
  done, given = records.finished_ids(path, records.StepLabels), annotations(config.data)
  left = [(one, steps_of(prompting, student.tokenizer, one, segment)) for one in given if one.id not in done]
  _check_room(left, student.config.max_length - config.sampling.max_new_tokens)
  bar = metrics.progress('label steps', len(given), done=len(given) - len(left), disable=not config.progress)
  generate = make_generate(student.config, student.params, student.tokenizer, batch_size=config.batch_size)
  source = records.Teacher(pathlib.Path(config.student).name, student.step, student.fingerprint)
  with bar:
    for start in range(0, len(left), config.chunk):
      part = left[start : start + config.chunk]
      found = label(generate, prompting, student.tokenizer, part, config.sampling)
      records.append(path, [
          records.StepLabels(
              annotation, config.segmentation, [step.end for step in steps], rates, tokens, source, config.sampling,
              config_hash,
          )
          for (annotation, steps), (rates, tokens) in zip(part, found, strict=True)
      ])
      mean = _mean([rate for rates, _ in found for rate in rates])
      bar.advance(len(part), **({} if mean is None else {'right': mean}))


def steps_of(prompting: Prompting, tokenizer, annotation: records.Annotation, segment: Segmentation) -> list[Step]:
  """The steps of an annotation in a student's tokens; of several that end in one token, the last."""
  text, asked = annotation.completion, prompt_ids(tokenizer, prompting.prompt(annotation.problem))
  read = prompting.example(annotation.id, annotation.problem, text, finished=False)  # as students do
  written, ends = tuple(read.tokens[len(asked) :].tolist()), segment(text)
  last = dict(zip(tokens_at(tokenizer, written, text, ends), ends))

  def step(end, place):
    tokens = written[: place + 1]
    return Step(end, Prompt(f'{annotation.id}@{end}', annotation.prompt + text[:end], asked + tokens), tokens)

  return [step(end, place) for place, end in last.items()]


def label(
    generate: Generate, prompting: Prompting, tokenizer,
    annotations: Sequence[tuple[records.Annotation, Sequence[Step]]], sampling: SamplingParams,
) -> list[tuple[list[float | None], int]]:
  """(rates of the steps, tokens sampled for them) of every annotation."""
  task = prompting.task
  open_steps = {
      step.prompt.id: step.prompt for _, steps in annotations for step in steps
      if task.extract(tokenizer.decode(step.written)) is None
  }
  sampled = dict(zip(open_steps, generate(list(open_steps.values()), sampling), strict=True))

  def rate(problem, step):
    if step.prompt.id not in sampled:
      return task.grade(problem, tokenizer.decode(step.written))
    grades = [task.grade(problem, tokenizer.decode(step.written + one.tokens)) for one in sampled[step.prompt.id]]
    return _mean([None if grade is None else float(grade == 1.0) for grade in grades])

  def tokens(steps):
    return sum(len(one.tokens) for step in steps for one in sampled.get(step.prompt.id, []))

  return [([rate(one.problem, step) for step in steps], tokens(steps)) for one, steps in annotations]


def _mean(rates: Sequence[float | None]) -> float | None:
  known = [rate for rate in rates if rate is not None]
  return float(np.mean(known)) if known else None


def _check_room(annotations, room: int):
  lengths = {step.prompt.id: len(step.prompt.tokens) for _, steps in annotations for step in steps}
  longest = max(lengths, key=lengths.get, default=None)
  if longest is not None and lengths[longest] > room:
    raise schema.ConfigError(
        f'step {longest} stands after {lengths[longest]} tokens; the student\'s max_length - sampling.max_new_tokens '
        f'leaves room for {room}; fix: fewer new tokens, or shorter annotations'
    )


def _summary(labels: Sequence[records.StepLabels], student) -> dict[str, Any]:
  rates = [rate for one in labels for rate in one.rates if rate is not None]
  tokens = sum(one.num_tokens for one in labels)
  return {
      'annotations': len(labels), 'steps': sum(len(one.rates) for one in labels), 'mean_rate': _mean(rates),
      'right': _mean([float(rate > 0) for rate in rates]), 'sampled_tokens': tokens,
      'flops': forward_flops(student, tokens),
  }
