"""A teacher samples chains of thought for problems, the verifier grades them, records with provenance go to disk.

Where the teacher is the student itself, this is rejection sampling, and a line of such rounds is STaR:
configs/rl/rejection_sampling.py.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections

from srm_jax import cache_teacher, checkpoints, metrics, schema, sharding
from srm_jax.data import records
from srm_jax.data.prompting import Prompting
from srm_jax.inference import make_generate
from srm_jax.models.config import forward_flops
from srm_jax.recipes.context import DataConfig, find_task, load_problems, open_data
from srm_jax.rewards import Graded
from srm_jax.rollout import rollout
from srm_jax.types import SamplingParams

RECORDS, KEPT = 'annotations.jsonl', 'kept.jsonl'
CACHE = 'cache'  # folder
BATCH_TOKENS, MEASURED_TOKENS = 4096, 256  # of a cache beside annotations


@dataclasses.dataclass(frozen=True)
class AnnotateConfig:
  """teacher: workdir of a trained model. chunk: problems between two writes, and so what a killed run loses at most.

  cache_k: above 0, the teacher's k likeliest next tokens are cached for the right annotations, as students read them
  with data.target 'completion', in `workdir`/cache; `cache_teacher` has more choices. hint: '' or what is put behind
  problems that have no right sample, as ' ({answer})', for another sampling.samples samples; they are recorded without
  it. paths: above 0, so many right annotations a problem, of distinct paths, go to `workdir`/kept.jsonl.
  """

  teacher: str
  data: DataConfig
  sampling: SamplingParams
  batch_size: int
  chunk: int
  cache_k: int
  hint: str
  paths: int
  mesh: tuple
  progress: bool


class Annotations(NamedTuple):
  """A finished annotation: its file and what it says in sum.

  summary: problems, samples, correct, solved (problems with a right sample), sampled_tokens, flops; with hint, hinted:
  samples and correct of those that read one; with paths, paths: the counts of `distinct_paths`; with cache_k, cache:
  the summary of `cache_teacher`.
  """

  path: pathlib.Path
  summary: dict[str, Any]


def annotate(config: ml_collections.ConfigDict, workdir) -> Annotations:
  """Annotates, or continues to annotate, the problems of `config` into `workdir`/annotations.jsonl.

  Raises:
    ConfigError: unknown names or types, a workdir of another config, no such teacher, a hint at a problem without an
      answer.
    ValueError: a prompt longer than the teacher's context, a damaged record (file and line are named).
  """
  plain = schema.resolve(config)
  parsed = schema.parse(AnnotateConfig, plain, 'config')
  workdir = pathlib.Path(workdir)
  with jax.set_mesh(sharding.make_mesh(parsed.mesh)):
    teacher = checkpoints.load_model(parsed.teacher)
    tracked = {key: value for key, value in plain.items() if key != 'progress'}
    checkpoints.claim(workdir, tracked)
    _sample(parsed, teacher, workdir / RECORDS, records.content_hash(tracked))
    found = records.read(workdir / RECORDS)
    summary = _summary(found, teacher.config)
    if parsed.hint:
      summary['hinted'] = _hinted_summary(found)
    if parsed.paths:
      kept, summary['paths'] = distinct_paths(found, find_task(parsed.data.task).path, most=parsed.paths)
      records.write(workdir / KEPT, kept)
    if parsed.cache_k:
      summary['cache'] = _cache(parsed, teacher, workdir).summary
  (workdir / 'summary.json').write_text(json.dumps(summary, indent=1))
  return Annotations(workdir / RECORDS, summary)


def distinct_paths(
    annotations: Sequence[records.Annotation], path: Callable[[str], str], *, most: int,
) -> tuple[list[records.Annotation], dict[str, int]]:
  """The first right annotation of each of the first `most` paths of every problem.

  Args:
    annotations: of any problems, in the order of preference.
    path: text -> what texts of one path share, as `tasks.task.Task.path`.
    most: paths a problem.

  Returns:
    (what is kept, {'kept', 'distinct': paths of right annotations, 'duplicates': right ones of a path seen before,
    'wrong': all others}); distinct - kept were more than `most`.

  Reference: Yuan et al., Scaling Relationship on Learning Mathematical Reasoning with Large Language Models, RFT,
  arXiv:2308.01825.
  """
  kept, seen = [], collections.defaultdict(set)
  for one in (one for one in annotations if one.correct):
    paths, this = seen[one.problem.id], path(one.completion)
    if this not in paths and len(paths) < most:
      kept.append(one)
    paths.add(this)
  right, distinct = sum(bool(one.correct) for one in annotations), sum(map(len, seen.values()))
  counts = {
      'kept': len(kept), 'distinct': distinct, 'duplicates': right - distinct, 'wrong': len(annotations) - right,
  }
  return kept, counts


def _sample(config: AnnotateConfig, teacher, path, config_hash):
  prompting, problems = open_data(config.data, teacher.tokenizer), load_problems(config.data)
  if not problems:
    raise schema.ConfigError(f'no problem to annotate in {config.data}')
  hinting = _hinting(config, teacher.tokenizer, problems) if config.hint else None
  done = {identifier.rsplit('#', 1)[0] for identifier in records.finished_ids(path)}
  left = [problem for problem in problems if problem.id not in done]
  bar = metrics.progress('annotate', len(problems), done=len(problems) - len(left), disable=not config.progress)
  generate = make_generate(teacher.config, teacher.params, teacher.tokenizer, batch_size=config.batch_size)
  source = records.Teacher(pathlib.Path(config.teacher).name, teacher.step, teacher.fingerprint)
  with bar:
    for start in range(0, len(left), config.chunk):
      part = left[start : start + config.chunk]
      groups = rollout(generate, prompting, part, config.sampling)
      flat = [one for group in groups for one in group]
      made = [_record(one, config.sampling, source, config_hash) for one in flat]
      if hinting:
        left_wrong = [group[0].problem for group in groups if not any(one.reward == 1.0 for one in group)]
        again = [one for group in rollout(generate, hinting, left_wrong, config.sampling) for one in group]
        made += [_unhinted(_record(one, config.sampling, source, config_hash), prompting, config) for one in again]
      records.append(path, made)
      bar.advance(len(part), correct=sum(one.reward == 1.0 for one in flat) / len(flat))


def _hinting(config: AnnotateConfig, tokenizer, problems) -> Prompting:
  """How problems are put with their answer; ids of prompts are others, so that samples are drawn anew."""
  prompt = dataclasses.replace(config.data.prompt, hint=config.hint)
  prompting = open_data(dataclasses.replace(config.data, prompt=prompt), tokenizer)
  for problem in problems:
    prompting.task.prompt(problem)  # one without an answer is found before anything is sampled
  return prompting._replace(
      prompt=lambda problem: (made := prompting.prompt(problem))._replace(id=f'{made.id} hinted')
  )


def _unhinted(record: records.Annotation, prompting: Prompting, config: AnnotateConfig) -> records.Annotation:
  """As if the problem alone had been asked (STaR): numbered behind the samples that were."""
  return dataclasses.replace(
      record, prompt=prompting.prompt(record.problem).text, sample=config.sampling.samples + record.sample,
      hint=config.hint,
  )


def _cache(config: AnnotateConfig, teacher, workdir) -> cache_teacher.Cached:
  data = dataclasses.replace(config.data, records=str(workdir / RECORDS), target='completion')
  section = cache_teacher.CacheConfig(
      teacher=config.teacher, tokenizer='', data=data, k=config.cache_k, temperature=1.0, batch_tokens=BATCH_TOKENS,
      chunk=config.chunk, measured_tokens=MEASURED_TOKENS, mesh=config.mesh, progress=config.progress,
  )
  return cache_teacher.write(section, teacher, workdir / CACHE)


def _record(graded: Graded, sampling: SamplingParams, source, config_hash) -> records.Annotation:
  completion = graded.completion
  return records.Annotation(
      problem=graded.problem, prompt=completion.prompt.text, completion=completion.text,
      num_tokens=len(completion.tokens), correct=None if graded.reward is None else graded.reward == 1.0,
      finished=completion.finished, teacher=source, sampling=sampling, sample=completion.sample,
      config_hash=config_hash,
  )


def _hinted_summary(annotations: Sequence[records.Annotation]) -> dict[str, int]:
  hinted = [one for one in annotations if one.hint]
  return {'samples': len(hinted), 'correct': sum(bool(one.correct) for one in hinted)}


def _summary(annotations: Sequence[records.Annotation], teacher) -> dict[str, Any]:
  right = [a for a in annotations if a.correct]
  tokens = sum(a.num_tokens for a in annotations)
  return {
      'problems': len({a.problem.id for a in annotations}), 'samples': len(annotations), 'correct': len(right),
      'distinct_correct': len({(a.problem.id, a.completion) for a in right}),
      'solved': len({a.problem.id for a in right}), 'sampled_tokens': tokens, 'flops': forward_flops(teacher, tokens),
  }
