"""A teacher samples chains of thought for problems, the verifier grades them, records with provenance go to disk."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_collections

from srm_jax import cache_teacher, checkpoints, metrics, schema, sharding
from srm_jax.data import records
from srm_jax.inference import make_generate
from srm_jax.models.config import forward_flops
from srm_jax.recipes.context import DataConfig, load_problems, open_data
from srm_jax.rewards import Graded
from srm_jax.rollout import rollout
from srm_jax.types import SamplingParams

RECORDS = 'annotations.jsonl'
CACHE = 'cache'  # folder
BATCH_TOKENS, MEASURED_TOKENS = 4096, 256  # of a cache beside annotations


@dataclasses.dataclass(frozen=True)
class AnnotateConfig:
  """teacher: workdir of a trained model. chunk: problems between two writes, and so what a killed run loses at most.

  cache_k: above 0, the teacher's k likeliest next tokens are cached for the right annotations, as students read them
  with data.target 'completion', in `workdir`/cache; `cache_teacher` has more choices.
  """

  teacher: str
  data: DataConfig
  sampling: SamplingParams
  batch_size: int
  chunk: int
  cache_k: int
  mesh: tuple
  progress: bool


class Annotations(NamedTuple):
  """A finished annotation: its file and what it says in sum.

  summary: problems, samples, correct, solved (problems with a right sample), sampled_tokens, flops; with cache_k,
  cache: the summary of `cache_teacher`.
  """

  path: pathlib.Path
  summary: dict[str, Any]


def annotate(config: ml_collections.ConfigDict, workdir) -> Annotations:
  """Annotates, or continues to annotate, the problems of `config` into `workdir`/annotations.jsonl.

  Raises:
    ConfigError: unknown names or types, a workdir of another config, no such teacher.
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
    summary = _summary(records.read(workdir / RECORDS), teacher.config)
    if parsed.cache_k:
      summary['cache'] = _cache(parsed, teacher, workdir).summary
  (workdir / 'summary.json').write_text(json.dumps(summary, indent=1))
  return Annotations(workdir / RECORDS, summary)


def _sample(config: AnnotateConfig, teacher, path, config_hash):
  prompting, problems = open_data(config.data, teacher.tokenizer), load_problems(config.data)
  if not problems:
    raise schema.ConfigError(f'no problem to annotate in {config.data}')
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
      records.append(path, [_record(one, config.sampling, source, config_hash) for one in flat])
      bar.advance(len(part), correct=sum(one.reward == 1.0 for one in flat) / len(flat))


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


def _summary(annotations: Sequence[records.Annotation], teacher) -> dict[str, Any]:
  right = [a for a in annotations if a.correct]
  tokens = sum(a.num_tokens for a in annotations)
  return {
      'problems': len({a.problem.id for a in annotations}), 'samples': len(annotations), 'correct': len(right),
      'distinct_correct': len({(a.problem.id, a.completion) for a in right}),
      'solved': len({a.problem.id for a in right}), 'sampled_tokens': tokens, 'flops': forward_flops(teacher, tokens),
  }
