"""The header of a safetensors file, distrusted: all of it is checked before data is read or memory spent.

A file is 8 bytes of header length (little-endian), a JSON header {name: {dtype, shape, data_offsets}} and the tensors'
bytes, back to back. The format is small enough to check by hand, and its own package neither reads `gs://` nor
minds a key that stands twice; the tests hold both to the same files.
"""

import contextlib
import json
import math
import os
import reprlib
from collections.abc import Iterable
from typing import NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

DTYPES = {
  'F64': np.dtype(np.float64), 'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn), 'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
  'I64': np.dtype(np.int64), 'I32': np.dtype(np.int32), 'I16': np.dtype(np.int16), 'I8': np.dtype(np.int8),
  'U64': np.dtype(np.uint64), 'U32': np.dtype(np.uint32), 'U16': np.dtype(np.uint16), 'U8': np.dtype(np.uint8),
  'BOOL': np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_RANK = 64  # numpy's limit
AGAIN = 'copy or download it again'

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200
show = _SHORT.repr  # for messages: what a damaged file holds may have any length


class CheckpointError(ValueError):
  """Weights that cannot be read or written. The message names the file, the tensor where there is one, and the fix."""


class TensorInfo(NamedTuple):
  """Where one tensor lies: bytes start to stop, counted from the beginning of the file."""

  name: str
  file: epath.Path
  dtype: np.dtype
  shape: tuple[int, ...]
  start: int
  stop: int

  @property
  def place(self) -> str:
    """For messages."""
    return f'{self.file}: tensor {show(self.name)}'


def open_file(path) -> dict[str, TensorInfo]:
  """All tensors of one safetensors file, in the order in which they lie.

  Raises:
    CheckpointError: the file cannot be opened, is cut short or is not what the format demands.
  """
  path = epath.Path(path)
  with opened(path) as stream:
    size = size_of(stream)
    raw = _raw_header(stream, path, size)
  header = json_object(raw, path, 'header')
  metadata = header.pop('__metadata__', {})
  if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
    raise CheckpointError(f'{path}: __metadata__ is {show(metadata)}, not strings by name; {AGAIN}')
  data = 8 + len(raw)
  infos = [_tensor_info(path, name, entry, data) for name, entry in header.items()]
  infos.sort(key=lambda info: (info.start, info.stop))
  _check_layout(path, infos, data, size)
  return {info.name: info for info in infos}


def encode(tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]]) -> bytes:
  """The first bytes of a file of these tensors in this order, padded so that the data begins at a multiple of 8."""
  header, at = {'__metadata__': {'format': 'pt'}}, 0  # transformers refuses a file that names no format
  for name, dtype, shape in tensors:
    end = at + math.prod(shape) * dtype.itemsize
    header[name] = {'dtype': NAMES[dtype], 'shape': [*map(int, shape)], 'data_offsets': [at, end]}
    at = end
  raw = json.dumps(header, separators=(',', ':')).encode()
  raw += b' ' * (-len(raw) % 8)
  return len(raw).to_bytes(8, 'little') + raw


@contextlib.contextmanager
def opened(path):
  """The file to read from, with the operating system's errors told as ours."""
  try:
    with path.open('rb') as stream:
      if hasattr(stream, 'cache'):  # fsspec reads 5 MiB ahead, which every small tensor would pay anew
        stream.cache.blocksize = 0
      yield stream
  except OSError as error:
    reason = error.strerror or error
    raise CheckpointError(f'{path} cannot be read ({reason}); is it there, a file, and yours to read?') from error


def size_of(stream) -> int:
  """Bytes of a file that stands at its beginning (stat would ask for its owner's name, which a container may lack)."""
  stream.seek(0, os.SEEK_END)
  size = stream.tell()
  stream.seek(0)
  return size


def json_object(raw: bytes, path, what: str) -> dict:
  """A JSON object as the standard has it, in UTF-8; Python's reader would take more.

  Raises:
    CheckpointError: among others, a key stands twice (which one counts depends on the reader).
  """
  try:
    found = json.loads(raw.decode('utf-8'), object_pairs_hook=_distinct, parse_constant=_no_constant)
  except (ValueError, RecursionError) as error:
    raise CheckpointError(f'{path}: the {what} is no valid JSON ({str(error)[:300]}); {AGAIN}') from error
  if not isinstance(found, dict):
    raise CheckpointError(f'{path}: the {what} is {show(found)}, not a JSON object; {AGAIN}')
  return found


def _distinct(pairs) -> dict:
  found = {}
  for key, value in pairs:
    if key in found:
      raise ValueError(f'key {show(key)} stands twice')
    (key + value if isinstance(value, str) else key).encode()  # half a surrogate pair is no text: ValueError
    found[key] = value
  return found


def _no_constant(name: str):
  raise ValueError(f'{name} is no number')


def no_pickles(folder) -> str:
  """The reason and the fix, for messages."""
  return (
    'A pickle can run any code when it is read, so none is. Where you trust it, convert it to safetensors: '
    f"transformers' from_pretrained({str(folder)!r}), then save_pretrained(ANOTHER_FOLDER, safe_serialization=True)")


def are_sizes(found) -> bool:
  """A list of integers that fit a file offset; true and 1.0 are none."""
  return isinstance(found, list) and all(type(size) is int and 0 <= size < 2**63 for size in found)


def _raw_header(stream, path, size: int) -> bytes:
  """The bytes of the JSON header of a file of `size` bytes."""
  start = stream.read(min(size, 8))
  if len(start) < 8:
    raise CheckpointError(f'{path} has {len(start)} bytes, fewer than the 8 of a header length; {AGAIN}')
  length = int.from_bytes(start, 'little')
  if length > min(MAX_HEADER, size - 8):
    raise _no_header(path, start, size)
  raw = stream.read(length)
  if not raw.startswith(b'{'):
    raise CheckpointError(f'{path}: its header begins with {raw[:8]!r}, not with a brace; {AGAIN}')
  return raw


def _no_header(path, start: bytes, size: int) -> CheckpointError:
  """What a file is whose first bytes are no length of a header."""
  if start == b'version ':
    return CheckpointError(f'{path} is a git-lfs pointer, not the weights; run `git lfs pull` in its repository')
  if start.startswith((b'PK\3\4', b'\x80\2')):  # as torch.save begins, now and formerly
    return CheckpointError(f'{path} is a pickle under another name. {no_pickles(path.parent)}')
  return CheckpointError(
    f'{path}: its header would have {int.from_bytes(start, "little")} bytes, but {size - 8} follow and {MAX_HEADER} '
    f'are allowed: it is cut short, or no safetensors file; {AGAIN}')


def _tensor_info(path, name: str, entry, data: int) -> TensorInfo:
  """One entry of a header whose data part begins at byte `data`, checked as far as it can be by itself."""
  where = f'{path}: tensor {show(name)}'
  if not isinstance(entry, dict) or not entry.keys() >= {'dtype', 'shape', 'data_offsets'}:
    raise CheckpointError(f'{where} is {show(entry)}, not dtype, shape and data_offsets; {AGAIN}')
  kind, shape, offsets = entry['dtype'], entry['shape'], entry['data_offsets']
  if not isinstance(kind, str) or kind not in DTYPES:
    raise CheckpointError(f'{where} has dtype {show(kind)}; save it again in one of {sorted(DTYPES)}')
  if not are_sizes(shape) or len(shape) > MAX_RANK:
    raise CheckpointError(f'{where} has shape {show(shape)}, not a list of up to {MAX_RANK} sizes; {AGAIN}')
  if not are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
    raise CheckpointError(f'{where} has data_offsets {show(offsets)}, not [begin, end]; {AGAIN}')
  _check_size(where, kind, shape, offsets[1] - offsets[0])
  return TensorInfo(name, path, DTYPES[kind], tuple(shape), data + offsets[0], data + offsets[1])


def _check_size(where: str, kind: str, shape: list[int], found: int):
  """That a tensor has the bytes of its shape. Python's integers do not overflow."""
  itemsize = DTYPES[kind].itemsize
  if math.prod(size or 1 for size in shape) * itemsize >= 2**63:  # numpy minds an empty array's other axes, too
    raise CheckpointError(f'{where} has shape {show(shape)}, which is too large for an array; {AGAIN}')
  expected = math.prod(shape) * itemsize
  if found != expected:
    raise CheckpointError(f'{where} has {found} bytes, but {kind} of shape {show(shape)} takes {expected}; {AGAIN}')


def _check_layout(path, infos: list[TensorInfo], data: int, size: int):
  """The sorted tensors fill the bytes from `data` to `size`: nothing missing, nothing twice, nothing hidden between."""
  at, before = data, 'the header'
  for info in infos:
    if info.stop > size:
      raise CheckpointError(f'{info.place} ends at byte {info.stop} of a file of {size}: it is cut short; {AGAIN}')
    if info.start < at:
      raise CheckpointError(f'{info.place} begins at byte {info.start}, but {before} ends at {at}; {AGAIN}')
    if info.start > at:
      raise CheckpointError(
        f'{info.place} begins at byte {info.start}, {before} ends at {at}: the format allows no holes; {AGAIN}')
    at, before = info.stop, f'tensor {show(info.name)}'
  if at != size:
    raise CheckpointError(f'{path}: its last {size - at} bytes belong to no tensor; the format allows none; {AGAIN}')
