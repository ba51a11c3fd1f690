"""Files of a teacher cache: ArrayRecord shards of sealed records, and the manifest that lists them.

A file gets its name only when it is whole and on disk, and a shard is in the manifest only then: whatever moment a
process is killed at, what the manifest lists can be read. Every byte is under a checksum, that of the shard's file in
the manifest and the manifest's own; every record has one besides, so that reading a single example needs no more.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module

MANIFEST = 'manifest.json'
FORMAT = 1
DIGEST_BYTES = 16
WRITE = 'group_size:1,uncompressed'  # a chunk a record: random access reads no other; ids and codes do not compress
RANDOM_ACCESS = 'readahead_buffer_size:0,max_parallelism:0'
ANEW = 'fix: delete the file and run what wrote the cache again, it makes anew what is missing'
SHOWN = 8  # ids in a message


class Entry(NamedTuple):
  """What a record holds. key: hash of the example's content. tokens: rows of bytes."""

  id: str
  key: str
  tokens: int


class Shard(NamedTuple):
  """One file, and the entries of its records in order."""

  file: str
  size: int
  sha256: str
  entries: Sequence[Entry]


@dataclasses.dataclass
class Manifest:
  """identity: what the cache was made with, plain values. complete: the writer came to its end."""

  identity: Mapping[str, Any]
  shards: list[Shard]
  complete: bool = False

  @property
  def examples(self):
    return sum(len(shard.entries) for shard in self.shards)

  @property
  def tokens(self):
    return sum(entry.tokens for shard in self.shards for entry in shard.entries)

  @property
  def seal(self):
    """Key of the records' checksums: a record of a cache of another identity is as wrong as a damaged one."""
    return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).digest()


def save_manifest(folder: pathlib.Path, manifest: Manifest):
  """Puts a manifest in the place of the old one."""
  content = {
      'format': FORMAT, 'identity': dict(manifest.identity), 'complete': manifest.complete,
      'examples': manifest.examples, 'tokens': manifest.tokens,
      'shards': [shard._asdict() for shard in manifest.shards],
  }
  partial = _partial(folder / MANIFEST)
  partial.write_bytes(_rendered(content))
  _publish(partial, folder / MANIFEST)


def load_manifest(folder: pathlib.Path) -> Manifest:
  """Reads what `save_manifest` wrote.

  Raises:
    FileNotFoundError: there is none.
    ValueError: any byte of it has changed, or it is of another format.
  """
  path = folder / MANIFEST
  if not path.exists():
    raise FileNotFoundError(f'{path} does not exist; give the folder of a teacher cache, or write one there')
  raw = path.read_bytes()
  try:
    content = json.loads(raw)
    same = isinstance(content, dict) and _rendered({**content}) == raw
  except (ValueError, RecursionError):
    same = False
  if not same:
    raise ValueError(
        f'{path} is damaged: its checksum does not match; fix: restore it, or write the cache in another folder')
  if content['format'] != FORMAT:
    raise ValueError(f'{path} has format {content["format"]}, this version reads {FORMAT}; fix: write the cache anew')
  shards = [Shard(**{**shard, 'entries': [Entry(*entry) for entry in shard['entries']]}) for shard in content['shards']]
  return Manifest(content['identity'], shards, content['complete'])


def _rendered(content):
  """The bytes of a manifest; a checksum that it brings along is made anew."""
  content.pop('checksum', None)
  checksum = hashlib.sha256(json.dumps(content).encode()).hexdigest()
  return f'{json.dumps(content | {"checksum": checksum})}\n'.encode()


def shard_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Paths of all shards that lie in a folder, listed or not."""
  return sorted(folder.glob('shard-*.array_record'))


def clear_leftovers(folder: pathlib.Path, manifest: Manifest):
  """Deletes what a killed writer left: files that were being written, and shards that it had not listed yet."""
  listed = {shard.file for shard in manifest.shards}
  for path in [*folder.glob('*.partial'), *shard_files(folder)]:
    if path.name not in listed:
      path.unlink()


def write_shard(folder: pathlib.Path, manifest: Manifest, records: Sequence[tuple[Entry, np.ndarray]]) -> Shard:
  """Writes a shard under the first free name; the caller lists it. records: entries with their uint8 rows."""
  taken = {shard.file for shard in manifest.shards}
  numbers = range(len(taken) + 1)
  name = next(name for name in (f'shard-{number:05d}.array_record' for number in numbers) if name not in taken)
  partial, seal = _partial(folder / name), manifest.seal
  writer = array_record_module.ArrayRecordWriter(str(partial), WRITE)
  for entry, rows in records:
    writer.write(_sealed(entry, rows, seal))
  writer.close()
  with partial.open('rb') as stream:
    digest = hashlib.file_digest(stream, 'sha256').hexdigest()
  shard = Shard(name, partial.stat().st_size, digest, [entry for entry, _ in records])
  _publish(partial, folder / name)
  return shard


def _partial(path):
  return path.with_name(f'{path.name}.partial')


def _publish(partial, path):
  """Gives a file its name once it is on disk; then the name is."""
  _synchronise(partial)
  os.replace(partial, path)
  _synchronise(path.parent)


def _synchronise(path):
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _sealed(entry, rows, seal):
  body = _label(entry) + np.ascontiguousarray(rows).tobytes()
  return _digest(body, seal) + body


def _label(entry):
  """In front of the rows, so that a shard without its manifest still tells what it holds."""
  return f'{json.dumps(entry)}\n'.encode()


def _digest(body, seal):
  return hashlib.blake2b(body, digest_size=DIGEST_BYTES, key=seal).digest()


def _unsealed(record, entry, seal):
  """uint8 rows of a record; ValueError where it is not that of the entry."""
  label = _label(entry)
  body = memoryview(record)[DIGEST_BYTES:]
  if _digest(body, seal) != record[:DIGEST_BYTES]:
    raise ValueError('its checksum does not match')
  if body[: len(label)] != label:
    raise ValueError('another example is in its place')
  values = np.frombuffer(record, np.uint8)[DIGEST_BYTES + len(label) :]
  return values.reshape(entry.tokens, values.size // max(entry.tokens, 1))


class ShardReader:
  """Reads one shard; several threads may."""

  def __init__(self, folder: pathlib.Path, shard: Shard, seal: bytes):
    self.path = folder / shard.file
    self.shard = shard
    self._seal = seal
    self._reader = None

  def rows(self, numbers: Sequence[int]) -> list[np.ndarray]:
    """uint8 [tokens, bytes] of the records with these numbers.

    Raises:
      ValueError: names the file and the example that cannot be read, and says why.
    """
    try:
      records = self._open().read(list(numbers))
    except (RuntimeError, IndexError, ValueError):
      records = [None] * len(numbers)
    return [self._checked(number, record) for number, record in zip(numbers, records, strict=True)]

  def all_rows(self) -> list[np.ndarray]:
    """`rows` of all records, in one pass over the file; that is faster."""
    try:
      records = array_record_module.ArrayRecordReader(str(self.path)).read_all()
    except (RuntimeError, IndexError, ValueError):
      records = []
    if len(records) != len(self.shard.entries):
      return self.rows(range(len(self.shard.entries)))
    return [self._checked(number, record) for number, record in enumerate(records)]

  def _open(self):
    if self._reader is None:
      self._reader = array_record_module.ArrayRecordReader(str(self.path), RANDOM_ACCESS)
    return self._reader

  def _checked(self, number, record):
    entry = self.shard.entries[number]
    try:
      if record is None:  # one of several, or this one
        record = self._open().read([number])[0]
      return _unsealed(record, entry, self._seal)
    except (RuntimeError, IndexError, ValueError) as error:
      reason = str(error).split('\n')[0][:120]
      raise ValueError(f"{self.path}: example id='{entry.id}' is damaged: {reason}; {ANEW}") from error


def size_fault(folder: pathlib.Path, shard: Shard) -> str | None:
  """Whether a shard's file is there in its size: what is wrong, or None."""
  path = folder / shard.file
  if not path.exists():
    return f'{path} is missing'
  size = path.stat().st_size
  return f'{path} has {size} bytes, {shard.size} were written' if size != shard.size else None


def damage(folder: pathlib.Path, shard: Shard, seal: bytes) -> str | None:
  """What reading every byte of a shard's file tells, with the examples that are lost; None where all is right."""
  path, fault = folder / shard.file, size_fault(folder, shard)
  if not path.exists():
    return f'{fault}: {_listed([entry.id for entry in shard.entries])}'
  with path.open('rb') as stream:
    if hashlib.file_digest(stream, 'sha256').hexdigest() != shard.sha256:
      fault = fault or f'{path} is damaged: its SHA-256 is not the one in the manifest'
  lost = _unreadable(ShardReader(folder, shard, seal))
  if lost:
    return f'{fault or f"{path} is damaged"}: {_listed(lost)}'
  return f'{fault}: outside of its records, which can all be read' if fault else None


def _unreadable(reader: ShardReader) -> list[str]:
  try:
    reader.all_rows()
  except ValueError:
    pass
  else:
    return []
  lost = []
  for number, entry in enumerate(reader.shard.entries):
    try:
      reader.rows([number])
    except ValueError:
      lost.append(entry.id)
  return lost


def _listed(ids):
  names = ', '.join(f"id='{name}'" for name in ids[:SHOWN])
  return f'lost are {len(ids)} examples, {names}{" ..." if len(ids) > SHOWN else ""}'
