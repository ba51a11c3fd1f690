"""Tensors come back bit for bit, slice by slice and without a second copy, and a folder is whole or does not open."""

import contextlib
import subprocess
import sys
import types
import weakref

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from etils import epath

from srm_jax.models import tensor_files, tensor_header
from srm_jax.models.tensor_files import INDEX, SINGLE, TensorSource, source
from srm_jax.models.tensor_header import CheckpointError
from tests import buckets

BF16 = np.dtype(ml_dtypes.bfloat16)


def random_array(rng, dtype, shape) -> np.ndarray:
  """Random bits, NaNs among them; bools are 0 or 1."""
  bits = rng.integers(0, 2 if dtype == bool else 256, size=(*shape, np.dtype(dtype).itemsize), dtype=np.uint8)
  return bits.view(dtype).reshape(shape)


def assert_same(actual, expected):
  assert (actual.dtype, actual.shape, actual.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.fixture
def arrays(rng):
  """One array of every dtype, with odd sizes so that alignment is not for free, and of every kind of shape."""
  shapes = [(3, 5), (), (7,), (0,), (2, 0, 3), (1, 1), (2, 3, 5)]
  return {
    f't.{kind}': random_array(rng, dtype, shapes[i % len(shapes)])
    for i, (kind, dtype) in enumerate(sorted(tensor_header.DTYPES.items()))}


@pytest.fixture
def reads(monkeypatch):
  """Bytes of every piece that is read."""
  sizes, fill = [], tensor_files._fill
  monkeypatch.setattr(tensor_files, '_fill', lambda *given: (sizes.append(given[1].nbytes), fill(*given)))
  return sizes


def sources(arrays):
  return [source(name, array) for name, array in arrays.items()]


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def read_folder(folder):
  return {name: tensor_files.read(info) for name, info in tensor_files.open_folder(folder).items()}


def assert_holds(folder, arrays):
  found = read_folder(folder)
  assert found.keys() == arrays.keys()
  for name, array in arrays.items():
    assert_same(found[name], array)


def test_every_dtype_from_here_to_the_package(arrays, tmp_path):
  tensor_files.write_folder(tmp_path / 'new' / 'folder', sources(arrays))
  path = tmp_path / 'new' / 'folder' / SINGLE
  assert names(path.parent) == [SINGLE]
  found = dict(safetensors.deserialize(path.read_bytes()))
  assert found.keys() == arrays.keys()
  for name, array in arrays.items():
    assert (f't.{found[name]["dtype"]}', tuple(found[name]['shape'])) == (name, array.shape)
    assert bytes(found[name]['data']) == array.tobytes()
  with safetensors.safe_open(path, 'np') as opened:
    assert opened.metadata() == {'format': 'pt'}
  assert all(info.start % info.dtype.itemsize == 0 for info in tensor_files.open_folder(path.parent).values())
  assert_holds(path.parent, arrays)


def test_every_dtype_from_the_package_to_here(arrays, tmp_path):
  safetensors.numpy.save_file(arrays, tmp_path / SINGLE, metadata={'by': 'the package'})
  assert_holds(tmp_path, arrays)


def test_what_has_holes_in_memory_is_written_as_it_looks(rng, tmp_path, monkeypatch):
  monkeypatch.setattr(tensor_files, 'BLOCK', 100)
  base = random_array(rng, BF16, (9, 8, 6))
  views = {'t': base.T, 'step': base[::2, ::-1], 'column': base[:, 1, 2], 'wide': np.broadcast_to(base[0], (3, 8, 6))}
  tensor_files.write_folder(tmp_path, sources(views))
  assert_holds(tmp_path, views)


def test_a_file_of_another_name(arrays, tmp_path):
  tensor_files.write_file(tmp_path / 'adapter_model.safetensors', sources({'old': np.ones(3)}))
  tensor_files.write_file(tmp_path / 'adapter_model.safetensors', sources(arrays))
  infos = tensor_files.open_file(tmp_path / 'adapter_model.safetensors')
  assert names(tmp_path) == ['adapter_model.safetensors'] and infos.keys() == arrays.keys()


# --- slices


def random_slice(rng, size):
  pick = lambda: None if rng.random() < .3 else int(rng.integers(-size - 2, size + 3))
  return slice(pick(), pick(), rng.choice([None, None, 1, 2, 3, -1, -2]))


@pytest.mark.parametrize('block', [1, 16, 100, 2**20])
def test_slices_equal_numpys(block, rng, reads, tmp_path, monkeypatch):
  monkeypatch.setattr(tensor_files, 'BLOCK', block)
  shapes = [tuple(rng.integers(0 if rng.random() < .2 else 1, 9, size=rng.integers(0, 5))) for _ in range(30)]
  arrays = {str(i): random_array(rng, [BF16, np.float32, np.int8][i % 3], shape) for i, shape in enumerate(shapes)}
  tensor_files.write_folder(tmp_path, sources(arrays))
  infos = tensor_files.open_folder(tmp_path)
  for name, array in arrays.items():
    for _ in range(12):
      index = tuple(random_slice(rng, size) for size in array.shape[:rng.integers(0, array.ndim + 1)])
      found = tensor_files.read(infos[name], index)
      assert_same(found, array[index])
      row = array.nbytes // max([1, *array.shape[:1]])
      assert max(reads, default=0) <= max(block, row)
      reads.clear()
      assert found.flags.c_contiguous and found.flags.writeable
      assert not found.size or found.ctypes.data % tensor_files.ALIGNMENT == 0


def test_read_into_stacks_transposes_and_casts(rng, tmp_path, monkeypatch):
  monkeypatch.setattr(tensor_files, 'BLOCK', 64)
  layers = {str(i): rng.normal(size=(12, 7)).astype(BF16) for i in range(3)}
  tensor_files.write_folder(tmp_path, sources(layers))
  stack, turned = tensor_files.aligned_empty((3, 12, 7), BF16), np.empty((3, 7, 12), np.float32)
  cast, rows = np.empty((3, 12, 7), np.float32), np.full((3, 4, 2), np.nan, BF16)
  for i, info in enumerate(tensor_files.open_folder(tmp_path).values()):
    tensor_files.read_into(info, stack[i])
    tensor_files.read_into(info, cast[i])
    tensor_files.read_into(info, turned[i].T)
    tensor_files.read_into(info, rows[i], (slice(2, 10, 2), slice(5, 7)))
  expected = np.stack(list(layers.values()))
  assert_same(stack, expected)
  assert_same(cast, expected.astype(np.float32))
  assert_same(turned, np.ascontiguousarray(expected.transpose(0, 2, 1)).astype(np.float32))
  assert_same(rows, np.ascontiguousarray(expected[:, 2:10:2, 5:7]))


@pytest.mark.parametrize('index, rows', [
  ((), 1000), ((slice(250, 500),), 250), ((slice(250, 500), slice(0, 2)), 250), ((slice(5, 5),), 0),
  ((slice(None), slice(3, 3)), 0), ((slice(990, None, -1),), 991), ((slice(0, 100, 3),), 100)])
def test_only_the_rows_of_the_first_slice_are_read(index, rows, reads, tmp_path):
  tensor_files.write_folder(tmp_path, sources({'a': np.zeros((1000, 8), BF16)}))
  tensor_files.read(tensor_files.open_folder(tmp_path)['a'], index)
  assert sum(reads) == rows * 16


def test_a_slice_fetches_its_rows_and_no_more(rng, monkeypatch):
  address = buckets.use(monkeypatch) + '/models/tiny'
  array = random_array(rng, BF16, (100, 8))
  tensor_files.write_folder(address, sources({'a': array, 'b': np.ones(10_000)}))
  info = tensor_files.open_folder(address)['a']
  buckets.RangeFile.ranges.clear()
  assert_same(tensor_files.read(info, (slice(30, 40), slice(2, 4))), np.ascontiguousarray(array[30:40, 2:4]))
  assert buckets.RangeFile.ranges == [(info.start + 30 * 16, info.start + 40 * 16)]


@pytest.mark.parametrize('index', [(0,), (slice(None), Ellipsis), (slice(None),) * 3, (None,), ([0, 1],)])
def test_an_index_that_does_not_fit(index, tmp_path):
  tensor_files.write_folder(tmp_path, sources({'a': np.zeros((3, 2))}))
  info = tensor_files.open_folder(tmp_path)['a']
  with pytest.raises(CheckpointError, match=r"tensor 'a' has shape \(3, 2\); .* is no tuple of slices"):
    tensor_files.read(info, index)
  with pytest.raises(CheckpointError, match=r"'a': the slice has shape \(1, 2\), the array to read it into \(2,\)"):
    tensor_files.read_into(info, np.empty(2), (slice(1),))


def test_a_file_that_became_shorter_is_noticed(tmp_path):
  tensor_files.write_folder(tmp_path, sources({'a': np.zeros(9), 'b': np.zeros(9)}))
  infos = tensor_files.open_folder(tmp_path)
  with (tmp_path / SINGLE).open('r+b') as stream:
    stream.truncate(infos['b'].start + 8)
  assert tensor_files.read(infos['a']).size == 9
  with pytest.raises(CheckpointError, match=r"model.safetensors: tensor 'b' ends 64 bytes early"):
    tensor_files.read(infos['b'])
  (tmp_path / SINGLE).unlink()
  with pytest.raises(CheckpointError, match='model.safetensors cannot be read .No such file'):
    tensor_files.read(infos['a'])


@pytest.mark.parametrize('method', ['readinto', 'read'])
def test_streams_that_give_little_at_a_time(method, rng, tmp_path):
  array = random_array(rng, np.float32, (100,))
  tensor_files.write_folder(tmp_path, sources({'a': array}))
  info, out = tensor_files.open_folder(tmp_path)['a'], np.empty(400, np.uint8)
  with (tmp_path / SINGLE).open('rb') as file:
    file.seek(info.start)
    few = {'read': lambda size: file.read(min(size, 7)), 'readinto': lambda view: file.readinto(view[:7])}
    tensor_files._fill(types.SimpleNamespace(**{method: few[method]}), out, info)
  assert out.tobytes() == array.tobytes()


MEASURE = '''
import sys
from srm_jax.models import tensor_files
infos = tensor_files.open_folder(sys.argv[1])
def status(key):
  return int(next(line for line in open('/proc/self/status') if line.startswith(key)).split()[1]) * 1024
before = status('VmRSS')
if sys.argv[2] == 'as they lie':
  held = [tensor_files.read(info) for info in infos.values()]
else:
  held = [tensor_files.aligned_empty(info.shape[::-1], info.dtype) for info in infos.values()]
  for info, array in zip(infos.values(), held):
    tensor_files.read_into(info, array.T)
print((status('VmHWM') - before) / sum(array.nbytes for array in held))
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='reads the peak memory of a process from /proc')
@pytest.mark.parametrize('how', ['as they lie', 'transposed'])
def test_peak_memory_of_loading_is_the_model_and_little_else(how, tmp_path):
  arrays = {str(i): np.full((2048, 4096), i, BF16) for i in range(8)}  # 16 MiB each
  tensor_files.write_folder(tmp_path, sources(arrays), max_shard_bytes=2**26)
  command = [sys.executable, '-c', MEASURE, str(tmp_path), how]
  ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=epath.Path(__file__).parents[2])
  assert .95 < float(ran.stdout) < 1.15  # up to 8 MiB of 128 are in flight


# --- writing


@pytest.mark.parametrize('change, message', [
  (lambda a: [*a, source('x', np.ones(1)), source('x', np.ones(2))], "tensor 'x' is given twice"),
  (lambda a: [], 'no tensors to write'),
  (lambda a: [source('__metadata__', np.ones(1))], "tensor '__metadata__' cannot be a name"),
  (lambda a: [source(3, np.ones(1))], 'tensor 3 cannot be a name'),
  (lambda a: [*a, source('x', np.ones(1, complex))], "tensor 'x' has dtype <c16; cast it to one of .*'bfloat16'"),
  (lambda a: [*a, source('x', np.ones(1, '>f4'))], "tensor 'x' has dtype >f4; cast it"),
  (lambda a: [*a, source('x', np.array(['s']))], "tensor 'x' has dtype <U1; cast it"),
  (lambda a: [*a, TensorSource('x', np.float32, (2,), lambda: np.ones(2))],
   r"safetensors.tmp: tensor 'x' was announced as float32 \(2,\), but is float64 \(2,\)"),
  (lambda a: [*a, TensorSource('x', np.float64, (2, 1), lambda: np.ones(2))], "'x' was announced as .* is float64"),
])
def test_what_cannot_be_written_leaves_nothing(change, message, arrays, tmp_path):
  with pytest.raises(CheckpointError, match=message) as error:
    tensor_files.write_folder(tmp_path, change(sources(arrays)))
  assert str(tmp_path) in str(error.value) and not names(tmp_path)


def test_arguments_of_writing(arrays, tmp_path):
  with pytest.raises(CheckpointError, match='max_shard_bytes=0 leaves no room'):
    tensor_files.write_folder(tmp_path, sources(arrays), max_shard_bytes=0)
  (tmp_path / 'file').touch()
  with pytest.raises(CheckpointError, match='file is a file; give a folder'):
    tensor_files.write_folder(tmp_path / 'file', sources(arrays))


def test_tensors_are_made_one_at_a_time(tmp_path):
  alive, most = weakref.WeakSet(), []

  class Array(np.ndarray):  # which weak references may point at in a set
    __hash__ = object.__hash__

  def make():
    array = np.ones(10).view(Array)
    alive.add(array)
    most.append(len(alive))
    return array

  many = (TensorSource(str(i), np.float64, (10,), make) for i in range(20))
  tensor_files.write_folder(tmp_path, many, max_shard_bytes=300)
  assert most == [1] * 20


LAYOUTS = {'none': None, 'single': 10_000, 'two shards': 100, 'three shards': 60}
OLD = {name: np.full(5, i, np.float64) for i, name in enumerate('abcd')}
NEW = {name: np.full(5, -i, np.float64) for i, name in enumerate('bcde', start=1)}
WRITTEN = [layout for layout in LAYOUTS if LAYOUTS[layout]]


def write_layout(folder, arrays, layout, **options):
  if LAYOUTS[layout]:
    tensor_files.write_folder(folder, sources(arrays), max_shard_bytes=LAYOUTS[layout], **options)


@pytest.mark.parametrize('old', ['single', 'two shards'])
def test_weights_are_replaced_only_on_demand(old, tmp_path):
  write_layout(tmp_path, OLD, old)
  with pytest.raises(CheckpointError, match=r"holds weights already \(\['model.*overwrite=True"):
    write_layout(tmp_path, NEW, 'single')
  assert_holds(tmp_path, OLD)


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'x.pth', 'adapter_model.safetensors'])
def test_other_weights_are_a_reason_to_ask_but_stay(name, tmp_path):
  (tmp_path / name).write_bytes(b'x')
  with pytest.raises(CheckpointError, match='holds weights already'):
    write_layout(tmp_path, NEW, 'single')
  write_layout(tmp_path, NEW, 'single', overwrite=True)
  assert names(tmp_path) == sorted([SINGLE, name])
  assert_holds(tmp_path, NEW)


@pytest.mark.parametrize('old', LAYOUTS)
@pytest.mark.parametrize('new', WRITTEN)
def test_nothing_of_the_old_weights_is_left(old, new, tmp_path):
  fresh, folder = tmp_path / 'fresh', tmp_path / 'used'
  write_layout(fresh, NEW, new)
  write_layout(folder, OLD, old)
  folder.mkdir(exist_ok=True)
  for name in ('model-00007-of-00009.safetensors', 'model-00001-of-00002.safetensors.tmp', INDEX + '.tmp'):
    (folder / name).write_bytes(b'of a write that was killed')
  write_layout(folder, NEW, new, overwrite=True)
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
    path.name: path.read_bytes() for path in fresh.iterdir()}


def test_a_folder_may_be_rewritten_from_itself(tmp_path):
  write_layout(tmp_path, OLD, 'two shards')
  again = [
    TensorSource(name, info.dtype, info.shape, lambda info=info: -tensor_files.read(info))
    for name, info in tensor_files.open_folder(tmp_path).items()]
  tensor_files.write_folder(tmp_path, again, max_shard_bytes=60, overwrite=True)
  assert_holds(tmp_path, {name: -array for name, array in OLD.items()})


@pytest.mark.parametrize('old', LAYOUTS)
@pytest.mark.parametrize('at', range(4))
def test_an_error_while_writing_changes_nothing(old, at, tmp_path):
  def fail():
    raise KeyboardInterrupt

  write_layout(tmp_path, OLD, old)
  before, failing = names(tmp_path), sources(NEW)
  failing[at] = failing[at]._replace(make=fail)
  with pytest.raises(KeyboardInterrupt):
    tensor_files.write_folder(tmp_path, failing, max_shard_bytes=60, overwrite=True)
  assert names(tmp_path) == before
  if before:
    assert_holds(tmp_path, OLD)


class Killed(BaseException):
  """The process is gone."""


@contextlib.contextmanager
def killed_after(count, monkeypatch):
  """Yields whether it happened: only `count` openings, renamings and removals of files come about, in clean-up too."""
  left, killed, kind = [count], [], type(epath.Path('/'))

  def limited(original):
    def change(*arguments, **options):
      if left[0] <= 0:
        killed.append(True)
        raise Killed
      left[0] -= 1
      return original(*arguments, **options)
    return change

  with monkeypatch.context() as patch:
    for name in ('replace', 'unlink', 'open'):
      patch.setattr(kind, name, limited(getattr(kind, name)))
    with contextlib.suppress(Killed):
      yield killed


def state_of(folder):
  """'old', 'new' or 'nothing': what a reader finds. A mixture fails."""
  with contextlib.suppress(CheckpointError):
    return {str(OLD): 'old', str(NEW): 'new'}[str(read_folder(folder))]
  return 'nothing'


@pytest.mark.parametrize('old', LAYOUTS)
@pytest.mark.parametrize('new', WRITTEN)
def test_a_kill_at_any_moment_leaves_old_or_new_or_nothing_that_opens(old, new, tmp_path, monkeypatch):
  states = []
  for count in range(100):
    folder = tmp_path / str(count)
    write_layout(folder, OLD, old)
    with killed_after(count, monkeypatch) as killed:
      write_layout(folder, NEW, new, overwrite=True)
    if not killed:
      break
    states.append(state_of(folder))
    write_layout(folder, NEW, new, overwrite=True)  # the next write mends it
    assert_holds(folder, NEW)
  assert len(states) >= 2 and states == sorted(states, key=['old', 'nothing', 'new'].index)
  assert states[0] == ('nothing' if old == 'none' else 'old')
  assert 'nothing' not in states or (old, new) != ('single', 'single')  # one file takes another's place at once
