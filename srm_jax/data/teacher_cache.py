"""The teacher's next-token distributions of a data set, stored once: distillation without the teacher in memory.

Per supervised token the k most likely ids, their log-probabilities and the mass of the rest (`top_k_codec`), in shards
that are read by example (`teacher_shards`).

  identity = Identity(teacher=..., tokenizer=..., data=data_hash(examples), vocab_size=V, k=64, temperature=1.0)
  with writer(folder, identity) as out:              # killed, the same lines continue after the last whole shard
    for example in examples:
      if example.id not in out.finished:
        out.append(example, top_ids, top_logprobs)   # [n, k], one row a supervised token
  cache = open_cache(folder, identity)
  tokens = cache.gather(examples, bins, packing.pack(examples, bins, capacity))    # [B, T, k], [B, T, k], [B, T]
"""

import collections
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from srm_jax import types
from srm_jax.data import packing, records, teacher_shards, top_k_codec
from srm_jax.data.teacher_shards import Entry, Manifest, ShardReader
from srm_jax.data.top_k_codec import TeacherTokens

_LOG = logging.getLogger(__name__)

OPEN_SHARDS = 64  # readers that are kept: each holds an open file
FIXES = {
    'teacher': 'load the teacher that wrote it',
    'tokenizer': 'use the tokenizer that wrote it',
    'data': 'use the data that it was written for',
    'vocab_size': 'use the vocabulary that wrote it',
    'k': 'ask for the k that is there',
    'temperature': 'ask for the temperature that is there',
    'codec': 'use the version of srm_jax that wrote it',
}


@dataclasses.dataclass(frozen=True)
class Identity:
  """What a cache depends on. teacher, tokenizer: fingerprints. data: `data_hash`. temperature: divides the logits."""

  teacher: str
  tokenizer: str
  data: str
  vocab_size: int
  k: int
  temperature: float

  def __post_init__(self):
    top_k_codec.Codec(self.vocab_size, self.k)
    if not self.temperature > 0:
      raise ValueError(f'temperature {self.temperature} of a teacher cache is not positive; give a number above 0')

  def as_dict(self):
    """Plain values, and the version of the codec."""
    fields = dataclasses.fields(self)
    return {f.name: f.type(getattr(self, f.name)) for f in fields} | {'codec': top_k_codec.VERSION}


class Contents(NamedTuple):
  """bytes: of all files."""

  examples: int
  tokens: int
  bytes: int


def content_key(example: packing.Example) -> str:
  """Hash of an example's token ids, prompt and completion, and of which of them are supervised; not of its id."""
  tokens, mask = np.asarray(example.tokens, '<i4'), np.asarray(example.loss_mask, bool)
  return hashlib.blake2b(tokens.tobytes() + mask.tobytes(), digest_size=16).hexdigest()


def data_hash(examples: Sequence[packing.Example]) -> str:
  """Hash of ids and contents; their order, and how often one occurs, do not matter to a cache."""
  return records.content_hash([list(pair) for pair in sorted({(e.id, content_key(e)) for e in examples})])


def num_supervised(example: packing.Example) -> int:
  """Rows that an example has in a cache. The first token is nobody's target."""
  return int(np.count_nonzero(example.loss_mask[1:]))


@contextlib.contextmanager
def writer(folder, identity: Identity, *, shard_examples=256) -> Iterator['Writer']:
  """Writes a cache, or continues one; it is complete when the block ends without an exception.

  Args:
    folder: made if need be; one process writes it at a time.
    identity: what the cache is made with.
    shard_examples: examples of a file, held in memory until it is written; a killed writer loses no more.

  Raises:
    ValueError: the folder holds a cache of another identity, or one whose manifest is damaged or gone, or another
      process writes it.
  """
  if shard_examples < 1:
    raise ValueError(f'shard_examples {shard_examples} is not positive; give at least 1')
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  with _alone(folder):
    out = Writer(folder, identity, _resume(folder, identity), shard_examples)
    yield out
    out.finish()


class Writer:
  """Made by `writer`. finished: ids that need not be appended again; after a kill, those on disk."""

  def __init__(self, folder: pathlib.Path, identity: Identity, manifest: Manifest, shard_examples: int):
    self.finished = {entry.id for shard in manifest.shards for entry in shard.entries}
    self._folder = folder
    self._codec = top_k_codec.Codec(identity.vocab_size, identity.k)
    self._manifest = manifest
    self._shard_examples = shard_examples
    self._pending = []

  def append(self, example: packing.Example, top_ids, top_logprobs):
    """Adds an example.

    Args:
      example: its supervised tokens, in order, are what the rows below are for.
      top_ids: int [n, k].
      top_logprobs: float [n, k] log-softmax(logits / temperature) over the whole vocabulary at these ids.

    Raises:
      ValueError: names the example: its id is there already, n differs, or the rows are no top-k (`Codec.encode`).
    """
    if example.id in self.finished:
      raise ValueError(f"example id='{example.id}' is in the cache already; append only what is not in `finished`")
    count = num_supervised(example)
    if len(top_ids) != count:
      raise ValueError(f"example id='{example.id}' has {count} supervised tokens, not {len(top_ids)}; give a row each")
    try:
      rows = self._codec.encode(top_ids, top_logprobs)
    except ValueError as error:
      raise ValueError(f"example id='{example.id}': {error}") from error
    self._pending.append((Entry(example.id, content_key(example), count), rows))
    self.finished.add(example.id)
    if len(self._pending) >= self._shard_examples:
      self._flush()

  def finish(self):
    """Writes what is left and marks the cache as complete."""
    if self._pending:
      self._flush()
    self._manifest.complete = True
    teacher_shards.save_manifest(self._folder, self._manifest)

  def _flush(self):
    shard = teacher_shards.write_shard(self._folder, self._manifest, self._pending)
    self._manifest.shards.append(shard)
    self._manifest.complete = False
    teacher_shards.save_manifest(self._folder, self._manifest)
    self._pending = []


@contextlib.contextmanager
def _alone(folder):
  """The kernel drops the lock with the process, however it ends."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise ValueError(f'{folder} is being written by another process; wait for it, or choose another folder') from error
  else:
    yield
  finally:
    os.close(descriptor)


def _resume(folder, identity) -> Manifest:
  """The manifest to continue with, on disk before the first shard is."""
  if (folder / teacher_shards.MANIFEST).exists():
    manifest = teacher_shards.load_manifest(folder)
    _require_same(folder, manifest, identity)
    faults = [teacher_shards.size_fault(folder, shard) for shard in manifest.shards]
    for fault in filter(None, faults):
      _LOG.warning('%s; its examples are written anew', fault)
    manifest.shards = [shard for shard, fault in zip(manifest.shards, faults, strict=True) if not fault]
    manifest.complete = manifest.complete and not any(faults)
  else:
    _require_no_shards(folder)
    manifest = Manifest(identity.as_dict(), [])
  teacher_shards.save_manifest(folder, manifest)
  teacher_shards.clear_leftovers(folder, manifest)
  return manifest


def _require_no_shards(folder):
  """A killed writer leaves no shard without a manifest: these are of a cache that lost it, and may be hours of work."""
  shards = teacher_shards.shard_files(folder)
  if shards:
    raise ValueError(
        f'{folder} holds {len(shards)} shards and no {teacher_shards.MANIFEST}; '
        'fix: restore it, delete the shards, or choose another folder')


def _require_same(folder, manifest, identity):
  wanted = identity.as_dict()
  different = [key for key in wanted if manifest.identity.get(key) != wanted[key]]
  if different:
    listed = '; '.join(f'{key} is {manifest.identity.get(key)!r} there, {wanted[key]!r} here' for key in different)
    fixes = ', '.join(FIXES[key] for key in different)
    raise ValueError(f'teacher cache {folder}: {listed}; fix: {fixes}, or write a cache in another folder')


def identity_of(folder) -> Identity:
  """What a cache was made with, finished or not.

  Raises:
    FileNotFoundError: no manifest.
    ValueError: it is damaged.
  """
  written = teacher_shards.load_manifest(pathlib.Path(folder)).identity
  return Identity(**{field.name: written[field.name] for field in dataclasses.fields(Identity)})


def verify(folder) -> Contents:
  """Reads every byte of a cache, finished or not.

  Raises:
    FileNotFoundError: no manifest.
    ValueError: names every file that is damaged, truncated or missing, and the examples that it costs.
  """
  folder = pathlib.Path(folder)
  manifest = teacher_shards.load_manifest(folder)
  faults = [fault for shard in manifest.shards if (fault := teacher_shards.damage(folder, shard, manifest.seal))]
  if faults:
    raise ValueError(f'{"; ".join(faults)}; {teacher_shards.ANEW}')
  return _contents(folder, manifest)


def _contents(folder, manifest):
  size = (folder / teacher_shards.MANIFEST).stat().st_size + sum(shard.size for shard in manifest.shards)
  return Contents(manifest.examples, manifest.tokens, size)


def open_cache(folder, identity: Identity) -> 'Cache':
  """Opens a complete cache. Files are checked for presence and size, and each record's checksum when it is read.

  Raises:
    FileNotFoundError: no manifest.
    ValueError: made with another identity (names what differs), not complete, or a file damaged, truncated or missing.
  """
  folder = pathlib.Path(folder)
  manifest = teacher_shards.load_manifest(folder)
  _require_same(folder, manifest, identity)
  faults = [fault for shard in manifest.shards if (fault := teacher_shards.size_fault(folder, shard))]
  if faults:
    raise ValueError(f'{"; ".join(faults)}; {teacher_shards.ANEW}')
  if not manifest.complete:
    raise ValueError(
        f'teacher cache {folder} is unfinished, with {manifest.examples} examples in {len(manifest.shards)} shards; '
        'fix: run what writes it again, it continues')
  return Cache(folder, identity, manifest)


class Cache:
  """Made by `open_cache`; several threads may read. Iterates over the ids of its examples, shard by shard."""

  def __init__(self, folder: pathlib.Path, identity: Identity, manifest: Manifest):
    self.identity = identity
    self.contents = _contents(folder, manifest)
    self._codec = top_k_codec.Codec(identity.vocab_size, identity.k)
    self._shards = manifest.shards
    located = [(entry, (s, r)) for s, shard in enumerate(manifest.shards) for r, entry in enumerate(shard.entries)]
    self._places = {entry.id: place for entry, place in located}
    self._ids = {entry.key: entry.id for entry, _ in located}
    seal = manifest.seal
    self._reader = functools.lru_cache(OPEN_SHARDS)(lambda s: ShardReader(folder, manifest.shards[s], seal))

  def __len__(self):
    return len(self._places)

  def __iter__(self):
    return iter(self._places)

  def __contains__(self, example_id):
    return example_id in self._places

  def __getitem__(self, example_id: str) -> TeacherTokens:
    """[n, k], [n, k] and [n] for the n supervised tokens of an example; raises like `read`."""
    return self.read([example_id])[0]

  def read(self, example_ids: Sequence[str]) -> list[TeacherTokens]:
    """Examples by id, decoded together: faster than one by one.

    Raises:
      KeyError: an id that is not there.
      ValueError: names file and example of a record that is damaged.
    """
    return self._split(self._rows(example_ids))

  def scan(self) -> Iterator[tuple[str, TeacherTokens]]:
    """All examples with their ids, in the order of the files; each file is read at once."""
    for s, shard in enumerate(self._shards):
      tokens = self._split(self._reader(s).all_rows())
      yield from zip((entry.id for entry in shard.entries), tokens, strict=True)

  def find(self, example: packing.Example) -> str:
    """Id under which an example's content is stored; its own where that has the same content.

    Raises:
      ValueError: the content is not there; says whether its id is.
    """
    key = content_key(example)
    place = self._places.get(example.id)
    if place and self._shards[place[0]].entries[place[1]].key == key:
      return example.id
    if key in self._ids:
      return self._ids[key]
    why = 'was cached with other tokens or another loss mask' if place else f'is none of the {len(self)} in the cache'
    raise ValueError(f"example id='{example.id}' {why}; fix: write a cache for this data in another folder")

  def gather(self, examples: Sequence[packing.Example], bins, batch: types.Batch) -> TeacherTokens:
    """What the teacher predicts at every position of a packed batch.

    Args:
      examples, bins: what the batch was laid out from, as for `packing.pack`.
      batch: [B, T].

    Returns:
      ids int32 [B, T, k], logprobs float32 [B, T, k], tail float32 [B, T]; at position i for token i + 1, like
      `batch.targets`; zeros where `batch.loss_mask` is zero.

    Raises:
      ValueError: as `find` and `read`, or the batch was laid out from other examples.
    """
    bins = np.asarray(bins)
    rows = self._rows([self.find(examples[i]) for i in bins[bins >= 0]])  # in the order in which pack lays them out
    supervised = np.asarray(batch.loss_mask) > 0
    count = sum(map(len, rows))
    if supervised.sum() != count:
      raise ValueError(
          f'the batch has {supervised.sum()} supervised tokens, its examples have {count}; '
          'give the examples and bins that it was packed from')

    def field(values):
      out = np.zeros((*supervised.shape, *values.shape[1:]), values.dtype)
      out[supervised] = values
      return out

    return TeacherTokens(*map(field, self._decode(rows)))

  def _rows(self, example_ids):
    """Encoded rows of examples, in this order; a shard is read once."""
    wanted = collections.defaultdict(list)
    for position, example_id in enumerate(example_ids):
      if example_id not in self._places:
        raise KeyError(f'example id={example_id} is none of the {len(self)} in the cache; ask for one of those')
      shard, record = self._places[example_id]
      wanted[shard].append((record, position))
    found = [None] * len(example_ids)
    for shard, pairs in wanted.items():
      for (_, position), rows in zip(pairs, self._reader(shard).rows([record for record, _ in pairs]), strict=True):
        found[position] = rows
    return found

  def _decode(self, rows):
    none = np.empty((0, self._codec.bytes_per_token), np.uint8)
    return self._codec.decode(np.concatenate([none, *(part for part in rows if len(part))]))

  def _split(self, rows):
    ends = np.cumsum([len(part) for part in rows], dtype=int)
    fields = (np.split(field, ends)[:-1] for field in self._decode(rows))
    return [TeacherTokens(*parts) for parts in zip(*fields, strict=True)]
