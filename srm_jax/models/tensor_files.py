"""Folders of safetensors, read slice by slice and written tensor by tensor: the model is never twice on the host.

Why not the `safetensors` package: it maps a file whole, and mapped pages that were touched count as resident until the
file is closed, so a load peaks at twice the model; it writes only what is all in memory; and it knows no `gs://`.
"""

import contextlib
import json
import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from etils import epath

from srm_jax.models import tensor_header, tensor_index
from srm_jax.models.tensor_header import CheckpointError, TensorInfo, open_file, show  # noqa: F401, offered from here
from srm_jax.models.tensor_index import INDEX, SINGLE, open_folder  # noqa: F401

BLOCK = 8 * 2**20  # bytes that are in flight beside the result
TILE = 128  # rows moved at a time: twice as fast a transposition as all at once
ALIGNMENT = 64  # bytes; what XLA wants of a host buffer that it is to use without a copy

_OWN_FILE = re.compile(r'model(-\d+-of-\d+)?\.safetensors(\.index\.json)?(\.tmp)?')


class TensorSource(NamedTuple):
  """A tensor to be written. make() is called once, when its turn comes, and gives an array of this dtype and shape."""

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def source(name: str, array: np.ndarray) -> TensorSource:
  """An array that is there already, as something to be written."""
  return TensorSource(name, array.dtype, array.shape, lambda: array)


# --- reading


def read(info: TensorInfo, index: tuple[slice, ...] = ()) -> np.ndarray:
  """A slice of a tensor, in new memory as `aligned_empty` gives it.

  Only the rows that the first slice covers are read; the other slices are cut from these, a block at a time.

  Args:
    index: a slice for each of the leading axes, as `jax.make_array_from_callback` gives them; () is all.

  Raises:
    CheckpointError: the index does not fit, or the file has become shorter since it was opened.
  """
  out = aligned_empty([len(picked) for picked in _ranges(info, index)], info.dtype)
  read_into(info, out, index)
  return out


def read_into(info: TensorInfo, out: np.ndarray, index: tuple[slice, ...] = ()):
  """As `read`, into memory that is there: a row of a stack, a transposed view, an array of another dtype (cast).

  Raises:
    CheckpointError: as `read`, and where `out` has not the shape of the slice.
  """
  ranges = _ranges(info, index)
  shape = tuple(map(len, ranges))
  if out.shape != shape:
    raise CheckpointError(f'{info.place}: the slice has shape {shape}, the array to read it into {out.shape}')
  if not out.size:
    return
  if not shape:  # a scalar is a row of one
    info, out, ranges = info._replace(shape=(1,)), out.reshape(1), [range(1)]
  rows, inner = ranges[0], tuple(index[1:])
  whole = all(picked == range(size) for picked, size in zip(ranges[1:], info.shape[1:], strict=True))
  direct = whole and rows.step == 1 and out.dtype == info.dtype and out.flags.c_contiguous
  with tensor_header.opened(info.file) as stream:
    for first, last in _blocks(rows, _row_bytes(info)):
      _read_rows(stream, info, rows[first:last], inner, out[first:last], direct)


def aligned_empty(shape, dtype) -> np.ndarray:
  """np.empty at a multiple of ALIGNMENT (numpy promises 16): JAX on a CPU then uses the memory itself, without a copy.

  It must not be written to once JAX has it.
  """
  nbytes = math.prod(shape) * np.dtype(dtype).itemsize
  raw = np.empty(nbytes + ALIGNMENT, np.uint8)
  first = -raw.ctypes.data % ALIGNMENT
  return raw[first:first + nbytes].view(dtype).reshape(shape)


def _ranges(info: TensorInfo, index) -> list[range]:
  """The positions that an index picks, one range an axis."""
  if len(index) > len(info.shape) or not all(isinstance(picked, slice) for picked in index):
    raise CheckpointError(f'{info.place} has shape {info.shape}; {show(index)} is no tuple of slices for it')
  index = (*index, *[slice(None)] * (len(info.shape) - len(index)))
  return [range(size)[picked] for picked, size in zip(index, info.shape, strict=True)]


def _row_bytes(info: TensorInfo) -> int:
  return math.prod(info.shape[1:]) * info.dtype.itemsize


def _blocks(rows: range, row_bytes: int) -> Iterator[tuple[int, int]]:
  """Cuts rows into pieces [first, last) that cover BLOCK bytes of the file, or one row where that is longer."""
  count = max(1, BLOCK // (row_bytes * abs(rows.step)))
  for first in range(0, len(rows), count):
    yield first, min(first + count, len(rows))


def _read_rows(stream, info: TensorInfo, rows: range, inner: tuple[slice, ...], out: np.ndarray, direct: bool):
  """Reads rows of a tensor, and of these what `inner` picks, into `out`; direct where their bytes are those of out."""
  low, high = min(rows[0], rows[-1]), max(rows[0], rows[-1]) + 1
  block = out if direct else np.empty((high - low, *info.shape[1:]), info.dtype)
  stream.seek(info.start + low * _row_bytes(info))
  _fill(stream, block.reshape(-1).view(np.uint8), info)
  if not direct:
    _copy(block[(slice(None, None, rows.step), *inner)], out)


def _copy(values: np.ndarray, out: np.ndarray):
  """Casts, then moves: as integers, which numpy moves several times faster than the types of ml_dtypes.

  A transposed `out` is filled some rows at a time, so that what lies side by side there is still in the first cache.
  """
  values = values.astype(out.dtype, copy=False)
  values, out = (x.view(f'u{x.itemsize}') for x in (values, out))
  for first in range(0, len(out), TILE):
    out[first:first + TILE] = values[first:first + TILE]


def _fill(stream, out: np.ndarray, info: TensorInfo):
  """Reads as many bytes as `out` has; a stream may give fewer at a time, and TensorFlow's has no readinto."""
  view, done = memoryview(out), 0
  while done < len(view):
    piece = view[done:done + BLOCK]
    if hasattr(stream, 'readinto'):
      count = stream.readinto(piece)
    else:
      found = stream.read(len(piece))
      count = len(found)
      piece[:count] = found
    if not count:
      raise CheckpointError(f'{info.place} ends {len(view) - done} bytes early: the file was rewritten; open it anew')
    done += count


# --- writing


def write_folder(
    folder, tensors: Iterable[TensorSource], *, max_shard_bytes: int = 5 * 2**30, overwrite: bool = False):
  """Writes a folder that `open_folder` and transformers read: model.safetensors, or shards and their index.

  One tensor at a time is in memory. Shards are filled in the order given; a tensor that is larger has its own. Inside
  a shard the wider dtypes come first, so that every tensor is aligned. All is written under temporary names, and the
  old weights, where they are to be replaced, go only when the new ones are complete (both are on the disk then):
  whatever happens, the folder holds the old weights, the new ones, or none that `open_folder` accepts.

  Args:
    folder: made where it is missing.
    max_shard_bytes: of tensors in one file.
    overwrite: replaces model*.safetensors and their index; what else there is (adapters, pickles) stays.

  Raises:
    CheckpointError: the folder holds weights already, or a tensor cannot be written, or is not what was announced.
  """
  folder = epath.Path(folder)
  tensors = _checked(folder, tensors)
  if max_shard_bytes < 1:
    raise CheckpointError(f'max_shard_bytes={max_shard_bytes} leaves no room for a tensor; give at least 1')
  shards = _shards(tensors, max_shard_bytes)
  if folder.exists() and not folder.is_dir():
    raise CheckpointError(f'{folder} is a file; give a folder')
  folder.mkdir(parents=True, exist_ok=True)
  present = tensor_index.weight_files(folder)
  if present and not overwrite:
    raise CheckpointError(
      f'{folder} holds weights already ({show(present)}); give another folder, or overwrite=True')
  files = {folder / name: shard for name, shard in shards.items()}
  with _removed_on_error([_temporary(path) for path in files]):
    for path, shard in files.items():
      _write_new(_temporary(path), shard)
    _replace_all(folder, list(files))
  if len(files) > 1:
    _write_index(folder / INDEX, shards)


def write_file(path, tensors: Iterable[TensorSource]):
  """Writes one safetensors file, whole or not at all, in place of one of this name.

  Raises:
    CheckpointError: a tensor cannot be written, or is not what was announced.
  """
  path = epath.Path(path)
  tensors = _checked(path, tensors)
  with _removed_on_error([_temporary(path)]):
    _write_new(_temporary(path), tensors)
    _temporary(path).replace(path)


def _checked(place, tensors: Iterable[TensorSource]) -> list[TensorSource]:
  """The tensors with numpy's dtypes and Python's ints, after what can be checked before anything is made or written."""
  found = {}
  for name, dtype, shape, make in tensors:
    where = f'{place}: tensor {show(name)}'
    if not isinstance(name, str) or name == '__metadata__':
      raise CheckpointError(f'{where} cannot be a name; rename it')
    if name in found:
      raise CheckpointError(f'{where} is given twice; rename one of them')
    if np.dtype(dtype) not in tensor_header.NAMES:
      known = sorted(map(str, tensor_header.NAMES))
      raise CheckpointError(f'{where} has dtype {np.dtype(dtype).str}; cast it to one of {known}')
    found[name] = TensorSource(name, np.dtype(dtype), tuple(map(operator.index, shape)), make)
  if not found:
    raise CheckpointError(f'{place}: no tensors to write; give at least one')
  return list(found.values())


def _shards(tensors: list[TensorSource], max_shard_bytes: int) -> dict[str, list[TensorSource]]:
  """{file name: its tensors}."""
  shards, filled = [[]], 0
  for tensor in tensors:
    if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(tensor)
    filled += tensor.nbytes
  if len(shards) == 1:
    return {SINGLE: shards[0]}
  return {f'model-{i:05}-of-{len(shards):05}.safetensors': shard for i, shard in enumerate(shards, start=1)}


def _temporary(path):
  return path.with_name(f'{path.name}.tmp')


@contextlib.contextmanager
def _removed_on_error(paths):
  try:
    yield
  except BaseException:  # an interrupt too: what is half written is of no use to anybody
    for path in paths:
      path.unlink(missing_ok=True)
    raise


def _write_new(path, tensors: list[TensorSource]):
  """Writes one file under its temporary name, down to the disk."""
  tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
  with path.open('wb') as stream:
    stream.write(tensor_header.encode(tensor[:3] for tensor in tensors))
    for tensor in tensors:
      _write_tensor(stream, tensor, path)
    _to_disk(stream, path)


def _to_disk(stream, path):
  if '://' not in os.fspath(path):  # a preempted machine would otherwise keep the new name without its content
    stream.flush()
    os.fsync(stream.fileno())


def _write_tensor(stream, tensor: TensorSource, path):
  """A function of its own, so that the array is gone before the next one is made."""
  array = np.asarray(tensor.make())
  if array.dtype != tensor.dtype or array.shape != tensor.shape:
    raise CheckpointError(
      f'{path}: tensor {show(tensor.name)} was announced as {tensor.dtype} {tensor.shape}, '
      f'but is {array.dtype} {array.shape}; announce what is made')
  if not array.size:
    return
  array = array.reshape(array.shape or 1)
  for first, last in _blocks(range(len(array)), array.nbytes // len(array)):
    stream.write(memoryview(np.ascontiguousarray(array[first:last]).reshape(-1).view(np.uint8)))


def _replace_all(folder, paths):
  """Puts complete files in place of all weights of the folder's own, of which none stays beside a new one."""
  kept = {_temporary(path).name for path in paths} | {path.name for path in paths if path.name == SINGLE}
  for name in tensor_index.matching(folder, _OWN_FILE):
    if name not in kept:
      (folder / name).unlink(missing_ok=True)
  for path in paths:
    _temporary(path).replace(path)


def _write_index(path, shards: dict[str, list[TensorSource]]):
  """The index comes last: without it shards are no model."""
  weight_map = {tensor.name: shard for shard, tensors in shards.items() for tensor in tensors}
  total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)
  text = json.dumps({'metadata': {'total_size': total}, 'weight_map': dict(sorted(weight_map.items()))}, indent=2)
  with _temporary(path).open('wb') as stream:
    stream.write(text.encode() + b'\n')
    _to_disk(stream, path)
  _temporary(path).replace(path)
