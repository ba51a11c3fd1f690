"""A teacher's next-token distributions of a data set, written once: students then learn them without the teacher."""

import collections
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from srm_jax import checkpoints, metrics, schema, sharding
from srm_jax.data import packing, teacher_cache, top_k_codec
from srm_jax.data import tokenizer as tokenizers
from srm_jax.data.teacher_cache import Identity
from srm_jax.data.top_k_codec import TeacherTokens
from srm_jax.inference.top_tokens import TopTokens, make_top_tokens
from srm_jax.models.config import forward_flops
from srm_jax.recipes import cached
from srm_jax.recipes.context import DataConfig, examples_of, require_same_vocabulary
from srm_jax.types import Batch

SUMMARY = 'summary.json'
LENGTH_MULTIPLE = 64  # of rows, so that data sets of nearly one length share a compiled program


@dataclasses.dataclass(frozen=True)
class CacheConfig:
  """What is asked, and how much of the answer is kept.

  teacher: workdir of a run, or a published model. tokenizer: of the students, which decides the examples' tokens; ''
  for the teacher's own. data: as the students' config.recipe.data. k: tokens kept of every distribution. temperature:
  divides the logits. batch_tokens: positions of a forward pass. chunk: examples of a file, and so what a killed run
  loses at most. measured_tokens: on how many tokens the cache is compared with the dense teacher.
  """

  teacher: str
  tokenizer: str
  data: DataConfig
  k: int
  temperature: float
  batch_tokens: int
  chunk: int
  measured_tokens: int
  mesh: tuple
  progress: bool

  def __post_init__(self):
    for name in ('batch_tokens', 'chunk', 'measured_tokens'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} is not positive; give at least 1')


class Cached(NamedTuple):
  """A finished cache: its folder, and what it holds in sum.

  summary: examples, tokens, bytes, bytes_per_token, k, temperature, vocab_size, teacher (its fingerprint);
  reconstruction_kl, the mean KL of the dense teacher to what a student reads, in nats, with quantisation_kl, the
  codec's part of it, and tail, the mean mass outside the k, all over measured_tokens; flops of the whole cache; seconds
  of the start that finished it.
  """

  path: pathlib.Path
  summary: dict[str, Any]


def cache_teacher(config: ml_collections.ConfigDict, workdir) -> Cached:
  """Writes, or continues to write, the cache of `config`, whose folder `workdir` is.

  Raises:
    ConfigError: unknown names or types, a workdir of another config, no such teacher, one of another vocabulary.
    ValueError: an example longer than the teacher's context, or a workdir whose teacher has changed since.
  """
  parsed = schema.parse(CacheConfig, schema.resolve(config), 'config')
  if jax.process_count() > 1:
    raise schema.ConfigError(f'a cache is written by one process, here are {jax.process_count()}; start it on one host')
  with jax.set_mesh(sharding.make_mesh(parsed.mesh)):
    return write(parsed, checkpoints.load_model(parsed.teacher), workdir)


def write(config: CacheConfig, teacher: checkpoints.Model, workdir) -> Cached:
  """`cache_teacher` with a teacher that is loaded already, under the current mesh."""
  start = time.perf_counter()
  examples, identity = _open(config, teacher)
  workdir = pathlib.Path(workdir)
  checkpoints.claim(workdir, {key: value for key, value in dataclasses.asdict(config).items() if key != 'progress'})
  lengths = [len(example.tokens) for example in examples]
  model = make_top_tokens(
      teacher.config, teacher.params, vocab_size=identity.vocab_size, k=config.k, temperature=config.temperature
  )
  asked = _Asked(model, *_shape(config.batch_tokens, max(lengths)))
  wrote, path = _write(config, asked, examples, workdir, identity), workdir / SUMMARY
  if wrote or not path.exists():
    summary = _summary(config, asked, examples, teacher_cache.open_cache(workdir, identity))
    summary |= {'flops': forward_flops(teacher.config, sum(lengths)), 'seconds': time.perf_counter() - start}
    checkpoints.write_whole(path, json.dumps(summary, indent=1))
  return Cached(workdir, json.loads(path.read_text()))


def _open(config: CacheConfig, teacher: checkpoints.Model) -> tuple[list[packing.Example], Identity]:
  """The examples in the students' tokens, and what the cache is made with."""
  tokenizer = tokenizers.load(config.tokenizer) if config.tokenizer else teacher.tokenizer
  require_same_vocabulary(
      f'teacher {config.teacher}', teacher.tokenizer, 'config.tokenizer', tokenizer,
      otherwise="a teacher of that tokenizer, or recipe 'cross_tokenizer', which takes no cache",
  )
  examples = examples_of(config.data, tokenizer)
  ids = [example.id for example in examples]
  packing.require_fit([len(example.tokens) for example in examples], teacher.config.max_length, ids=ids)
  packing.require_supervised(examples, np.arange(len(examples)))
  return _distinct(examples), cached.identity(
      tokenizer, examples, teacher=teacher.fingerprint, k=config.k, temperature=config.temperature
  )


def _distinct(examples: Sequence[packing.Example]) -> list[packing.Example]:
  """One of every id and content. A mix may hold an example twice, and one problem in several forms: where forms share
  an id, each gets its content's key behind it, as a cache finds its examples by content.
  """
  found = {(example.id, teacher_cache.content_key(example)): example for example in examples}
  forms = collections.Counter(identifier for identifier, _ in found)
  return [
      example if forms[identifier] == 1 else example._replace(id=f'{identifier}@{key}')
      for (identifier, key), example in found.items()
  ]


class _Asked(NamedTuple):
  """The teacher behind rows of one shape."""

  model: TopTokens
  rows: int
  length: int

  def batches(self, examples: Sequence[packing.Example]) -> Iterator[tuple[np.ndarray, Batch]]:
    """(bins, batch) until all examples have been in one; the last is filled up with empty rows."""
    bins = packing.plan([len(example.tokens) for example in examples], self.length)
    bins = np.pad(bins, ((0, -len(bins) % self.rows), (0, 0)), constant_values=-1)
    for part in np.split(bins, len(bins) // self.rows):
      yield part, packing.lay_out(examples, part, self.length)

  def tops(self, examples: Sequence[packing.Example]) -> Iterator[tuple[packing.Example, np.ndarray, np.ndarray]]:
    """(example, ids [n, k], log-probabilities [n, k]) of all examples, in the order of their rows."""
    for bins, batch in self.batches(examples):
      chosen = [examples[i] for i in bins[bins >= 0]]
      ends = np.cumsum([teacher_cache.num_supervised(example) for example in chosen])[:-1]
      yield from zip(chosen, *(np.split(field, ends) for field in self.model.top(batch)), strict=True)


def _shape(batch_tokens: int, longest: int) -> tuple[int, int]:
  """Rows and length of a forward pass; rows divide over the devices."""
  length = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
  mesh = sharding.current_mesh()
  devices = 1 if mesh is None else mesh.size
  return max(1, round(batch_tokens / length / devices)) * devices, length


def _write(config: CacheConfig, asked: _Asked, examples, folder, identity: Identity) -> int:
  """How many examples were missing. Files hold the examples of one chunk each, so that a start after a kill asks for
  the same batches.
  """
  with teacher_cache.writer(folder, identity, shard_examples=config.chunk) as out:
    left = [example for example in examples if example.id not in out.finished]
    bar = metrics.progress('cache', len(examples), done=len(examples) - len(left), disable=not config.progress)
    with bar:
      for start in range(0, len(examples), config.chunk):
        missing = [one for one in examples[start : start + config.chunk] if one.id not in out.finished]
        tokens, clock = 0, time.perf_counter()
        for example, ids, logprobs in asked.tops(missing) if missing else ():
          out.append(example, ids, logprobs)
          tokens += len(ids)
          bar.advance(1)
        if missing:
          bar.advance(0, tokens_per_second=tokens / (time.perf_counter() - clock))
  return len(left)


def _summary(config: CacheConfig, asked: _Asked, examples, cache: teacher_cache.Cache) -> dict[str, Any]:
  known, logits = _sample(asked, examples, cache, config.measured_tokens)
  found = top_k_codec.reconstruction_kl(logits, known, temperature=config.temperature)
  return {
      'examples': cache.contents.examples, 'tokens': cache.contents.tokens, 'bytes': cache.contents.bytes,
      'bytes_per_token': cache.contents.bytes / cache.contents.tokens, 'k': config.k,
      'temperature': config.temperature, 'vocab_size': cache.identity.vocab_size, 'teacher': cache.identity.teacher,
      'reconstruction_kl': float(found.total.mean()), 'quantisation_kl': float(found.quantisation.mean()),
      'tail': float(known.tail.mean()), 'measured_tokens': len(logits),
  }


def _sample(asked: _Asked, examples, cache: teacher_cache.Cache, count: int) -> tuple[TeacherTokens, np.ndarray]:
  """What the cache knows of up to `count` tokens of the data, and the teacher's dense logits there."""
  order = packing.permutation(len(examples), 0)
  supervised = np.cumsum([teacher_cache.num_supervised(examples[i]) for i in order])
  picked = [examples[i] for i in order[: np.searchsorted(supervised, count) + 1]]
  known, logits = [], []
  for bins, batch in asked.batches(picked):
    left = count - sum(map(len, logits))
    known.append([field[batch.loss_mask > 0][:left] for field in cache.gather(picked, bins, batch)])
    logits.append(asked.model.logits(batch, left))
  return TeacherTokens(*map(np.concatenate, zip(*known, strict=True))), np.concatenate(logits)
