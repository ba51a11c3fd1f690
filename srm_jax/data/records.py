"""Problems and annotations on disk: JSON lines, one record a line, strict when read, whole or absent when written."""

import dataclasses
import functools
import gzip
import hashlib
import json
import os
import pathlib
import types as python_types
import typing
from collections.abc import Iterable, Mapping

import numpy as np

from srm_jax import types

T = typing.TypeVar('T')


@dataclasses.dataclass(frozen=True)
class Teacher:
  """Who wrote an annotation. step: of the checkpoint. content_hash: of its parameters."""

  name: str
  step: int
  content_hash: str


@dataclasses.dataclass(frozen=True)
class Annotation:
  """One sampled chain of thought with its grade and everything that is needed to sample it again.

  num_tokens: sampled tokens, end-of-text included. correct: None where the completion could not be graded. finished:
  False where the length limit cut it. sample: index among sampling.samples of this problem. sampling holds the seed.
  config_hash: of the resolved configuration of the annotating run. hint: what the sampler read behind the problem and
  `prompt` leaves out, with {answer} for the answer; '' for nothing.
  """

  problem: types.Problem
  prompt: str
  completion: str
  num_tokens: int
  correct: bool | None
  finished: bool
  teacher: Teacher
  sampling: types.SamplingParams
  sample: int
  config_hash: str
  hint: str = ''

  @property
  def id(self) -> str:
    return f'{self.problem.id}#{self.sample}'


@dataclasses.dataclass(frozen=True)
class StepLabels:
  """How often a student that went on from each step of an annotation came to the right answer.

  segmentation: from data.steps. ends: where the steps end, in characters of the completion. rates: share of right ones
  among sampling.samples continuations; of a text that holds the answer, its grade; None where nothing could be graded.
  num_tokens: sampled for them. student: who went on.
  """

  annotation: Annotation
  segmentation: str
  ends: list
  rates: list
  num_tokens: int
  student: Teacher
  sampling: types.SamplingParams
  config_hash: str

  @property
  def id(self) -> str:
    return self.annotation.id


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Messages of a user and an assistant, each a mapping with 'role' and 'content'."""

  id: str
  messages: list


def write(path, annotations: Iterable[Annotation | StepLabels]):
  """Writes a file in place of what was there; `.gz` compresses. Readers see the old file or the whole new one."""
  _replace(path, b'', annotations)


def append(path, annotations: Iterable[Annotation | StepLabels]):
  """Adds records to a file that may not exist yet, as atomically as `write`.

  To resume a run: `done = finished_ids(path)`, then append only what is not in it.
  """
  path = pathlib.Path(path)
  old = path.read_bytes() if path.exists() else b''
  if old and path.suffix != '.gz' and not old.endswith(b'\n'):
    old += b'\n'
  _replace(path, old, annotations)


def finished_ids(path, kind: type[T] = Annotation) -> set[str]:
  """Ids of the records in a file; empty where it does not exist."""
  return {record.id for record in read(path, kind)} if pathlib.Path(path).exists() else set()


def read(path, kind: type[T] = Annotation) -> list[T]:
  """Reads what `write` wrote.

  Raises:
    ValueError: names file, line and what is wrong: not JSON, a missing, unknown or mistyped key, an id seen before.
  """
  return _unique(path, _read_records(path, kind))


def read_conversations(path) -> list[Conversation]:
  """Reads {"id", "messages": [{"role", "content"}, ...]} a line, messages as `data.chat` wants them.

  Raises:
    ValueError: as `read`; also where the file has no conversation.
  """
  conversations = _unique(path, _read_records(path, Conversation))
  if not conversations:
    raise ValueError(f'{path}: no conversation in it; give one JSON object a line with "id" and "messages"')
  return conversations


def problems_from_jsonl(path) -> list[types.Problem]:
  """Reads problems of the user: {"id", "question", "answer"} and optionally "rationale" and "metadata" a line.

  Raises:
    ValueError: as `read`; also where the file has no problem.
  """
  problems = _unique(path, _read_records(path, types.Problem))
  if not problems:
    raise ValueError(f'{path}: no problem in it; give one JSON object a line with "id", "question" and "answer"')
  return problems


def content_hash(tree) -> str:
  """SHA-256 over a tree of mappings, sequences, dataclasses, scalars and arrays (values, shapes and dtypes)."""
  digest = hashlib.sha256()
  _update(digest, tree)
  return digest.hexdigest()[:32]


def _update(digest, tree):
  if dataclasses.is_dataclass(tree):
    tree = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
  if isinstance(tree, Mapping):
    digest.update(f'mapping {len(tree)};'.encode())
    for key in sorted(tree):
      _update(digest, key)
      _update(digest, tree[key])
  elif isinstance(tree, (list, tuple)):
    digest.update(f'sequence {len(tree)};'.encode())
    for item in tree:
      _update(digest, item)
  elif tree is None or isinstance(tree, (str, int, float, bool)):
    digest.update(f'{json.dumps(tree)};'.encode())
  else:
    array = np.ascontiguousarray(tree)
    if array.dtype == object:
      raise TypeError(f'no content hash for {type(tree).__name__}; give arrays, scalars, sequences or mappings')
    digest.update(f'array {np.shape(tree)} {array.dtype.name};'.encode())
    digest.update(array.reshape(-1).view(np.uint8))


def _plain(value):
  if isinstance(value, (np.ndarray, np.generic)):
    return value.tolist()
  raise TypeError(f'{type(value).__name__} {value!r} has no JSON form; store strings, numbers, lists or mappings')


def _replace(path, old, records):
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = (json.dumps(dataclasses.asdict(record), ensure_ascii=False, default=_plain) + '\n' for record in records)
  new = ''.join(lines).encode('utf-8')
  partial = path.with_name(f'{path.name}.{os.getpid()}.partial')
  with partial.open('wb') as file:
    file.write(old)
    file.write(gzip.compress(new, mtime=0) if path.suffix == '.gz' else new)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)


def _read_records(path, kind):
  """[(line number, record)]."""
  path = pathlib.Path(path)
  try:
    content = path.read_bytes()
    lines = (gzip.decompress(content) if path.suffix == '.gz' else content).decode('utf-8-sig').split('\n')
  except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
    raise ValueError(f'{path}: not readable as UTF-8 text: {error}') from error
  records = []
  for number, line in enumerate(lines, 1):
    if line.strip():
      records.append((number, _parse(kind, line, f'{path}:{number}')))
  return records


def _parse(kind, line, place):
  try:
    value = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(f'{place}: not JSON: {error.msg} at column {error.colno}') from error
  return _decode(kind, value, place, '')


def _unique(path, numbered):
  seen = {}
  for number, record in numbered:
    if record.id in seen:
      raise ValueError(f"{path}:{number}: id '{record.id}' was already used in line {seen[record.id]}; drop one")
    seen[record.id] = number
  return [record for _, record in numbered]


def _decode(kind, value, place, field):
  """A JSON value as `kind`: a record, a union, a mapping or a scalar."""
  if dataclasses.is_dataclass(kind):
    return _decode_record(kind, value, place, field)
  if isinstance(kind, python_types.UnionType):
    if value is None and type(None) in kind.__args__:
      return None
    kind = next(option for option in kind.__args__ if option is not type(None))
  expected = typing.get_origin(kind) or kind
  accepted = {float: (int, float), Mapping: dict}.get(expected, expected)
  if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
    found = f'{type(value).__name__} {json.dumps(value, ensure_ascii=False)[:60]}'
    raise ValueError(f'{place}: "{field}" must be {expected.__name__}, found {found}')
  return expected(value) if expected is float else value


@functools.cache
def _schema(kind):
  """({key: type}, required keys); resolving type hints anew for each line would take longer than parsing it."""
  fields = dataclasses.fields(kind)
  required = {f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
  return typing.get_type_hints(kind), required


def _decode_record(kind, value, place, prefix):
  if not isinstance(value, dict):
    what = repr(prefix) if prefix else 'the line'
    raise ValueError(f'{place}: {what} must be a JSON object, found {str(value)[:60]}')
  hints, required = _schema(kind)
  for problem, names in (('unknown', value.keys() - hints.keys()), ('missing', required - value.keys())):
    if names:
      names = sorted(f'{prefix}.{name}'.lstrip('.') for name in names)
      raise ValueError(f'{place}: {problem} key {", ".join(names)}; the keys are {", ".join(hints)}')
  return kind(**{k: _decode(hints[k], v, place, f'{prefix}.{k}'.lstrip('.')) for k, v in value.items()})
