"""A teacher that was asked beforehand: batches with what its cache holds of them, in place of its parameters.

A batch stays a function of (data, seed, step): every host reads the cache for the rows that it lays out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from srm_jax import checkpoints, schema
from srm_jax.data import packing, pipeline, records, teacher_cache
from srm_jax.data.teacher_cache import Cache, Identity
from srm_jax.data.tokenizer import Tokenizer
from srm_jax.recipes.context import PLANS, BatchConfig, Context, DataConfig, dataset, examples_of
from srm_jax.types import CachedBatch, Source

KIND = 'top_k'  # of the terms that read a cache


def identity(
    tokenizer: Tokenizer, examples: Sequence[packing.Example], *, teacher: str, k: int, temperature: float
) -> Identity:
  """What a cache of these examples depends on. teacher: fingerprint of its parameters as they are stored.

  Raises:
    ConfigError: k is not within 1 and the tokenizer's ids, or the temperature is not positive.
  """
  spelled = tokenizer.vocabulary or tokenizer.fingerprint  # what ids mean; where texts end is in the data's hash
  data = teacher_cache.data_hash(examples)
  try:
    return Identity(teacher, spelled, data, tokenizer.vocab_size, k, temperature)
  except ValueError as error:
    raise schema.ConfigError(f'teacher cache: {error}') from error


def read_identity(folder: str) -> Identity:
  """What the cache of a folder was made with.

  Raises:
    ConfigError: there is none, or its manifest is damaged.
  """
  try:
    return teacher_cache.identity_of(folder)
  except (ValueError, FileNotFoundError) as error:
    raise schema.ConfigError(f'config.recipe.cache: {error}') from error


def open_known(folder: str, tokenizer: Tokenizer, examples, *, teacher: str | None) -> Cache:
  """The cache of a folder, for these examples.

  Args:
    teacher: fingerprint; None takes whichever teacher wrote the cache.

  Raises:
    ConfigError: it was written by another teacher, or for another tokenizer or other data (both values are named), or
      it is unfinished, damaged or missing.
  """
  there = read_identity(folder)
  wanted = identity(tokenizer, examples, teacher=teacher or there.teacher, k=there.k, temperature=there.temperature)
  try:
    return teacher_cache.open_cache(folder, wanted)
  except (ValueError, FileNotFoundError) as error:
    raise schema.ConfigError(f'config.recipe.cache: {error}') from error


def check(terms: Mapping[str, Any], there: Identity | None, rows: int):
  """Checks the terms of a loss against the cache that they read.

  Args:
    terms: {name: record whose `config` is a TermConfig of recipes.distill}.
    there: what the cache was made with; None where there is none.
    rows: of the student's vocabulary.

  Raises:
    ConfigError: a term reads a cache that is not there, was made at another temperature or has ids past `rows`; or
      there is a cache that no term reads.
  """
  reading = {name: one.config for name, one in terms.items() if one.config.kind == KIND}
  if there is not None and not reading:
    raise schema.ConfigError(f'no term of loss.terms {sorted(terms)} reads config.recipe.cache; fix: kind {KIND!r}')
  for name, config in reading.items():
    where = f'loss.terms.{name}'
    if there is None:
      raise schema.ConfigError(
          f"{where}: kind {KIND!r} reads a teacher cache; fix: recipe 'distill' with config.recipe.cache, a folder "
          'that experiments.cache_teacher writes'
      )
    temperature = config.options['options'].get('teacher_temperature', 1.0)
    if temperature != there.temperature:
      raise schema.ConfigError(
          f'{where}: teacher_temperature is {temperature!r}, the cache was made at {there.temperature:g}; '
          f'fix: options.teacher_temperature={there.temperature:g}, or another cache'
      )
    if there.vocab_size > rows:
      raise schema.ConfigError(
          f'{where}: the cache has {there.vocab_size} ids, the student rows for {rows}; fix: config.model.vocab_size'
      )


def open_source(
    data: DataConfig, batch: BatchConfig, context: Context, folder: str, teacher: str, *, adapt=None,
) -> tuple[Source, Identity | None]:
  """The source of a data section, and what its cache was made with.

  Args:
    folder: of the cache; '' gives the plain data set.
    teacher: folder of the model that must have written it; '' takes whichever did.
    adapt: as in `dataset`; a cache is read in a fixed order.

  Raises:
    ConfigError: as `open_known`.
  """
  if not folder:
    return dataset(data, batch, context, adapt=adapt), None
  examples = examples_of(data, context.tokenizer)
  # As it is stored: a cast teacher has another fingerprint.
  fingerprint = checkpoints.load_model(teacher).fingerprint if teacher else None
  cache = open_known(folder, context.tokenizer, examples, teacher=fingerprint)
  plan = schema.choose('batch.packing', batch.packing, PLANS)
  schedule = pipeline.Schedule(examples, batch_size=batch.size, length=batch.length, seed=context.seed, plan=plan)
  schedule.data_hash = records.content_hash([schedule.data_hash, cache.identity.as_dict()])

  def assemble(rows):
    laid_out = packing.lay_out(examples, rows, batch.length)
    return CachedBatch(laid_out, cache.gather(examples, rows, laid_out)._asdict())

  source = pipeline.scheduled_source(
      schedule, assemble=assemble, process_index=jax.process_index(), process_count=jax.process_count()
  )
  return source, cache.identity


def spoken(there: Identity | None) -> dict[str, str]:
  """What a run prints of its cache."""
  if there is None:
    return {}
  kept = f'{there.k} of {there.vocab_size} tokens at temperature {there.temperature:g}'
  return {'cached teacher': f'{kept}, teacher {there.teacher}'}
