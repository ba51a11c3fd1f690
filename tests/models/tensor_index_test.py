"""A folder opens when its files and its index agree, and says what is wrong with it when they do not."""

import contextlib
import io
import json
import random
import re

import numpy as np
import pytest
import safetensors.numpy

from srm_jax.models import tensor_files, tensor_header
from srm_jax.models.tensor_header import CheckpointError
from srm_jax.models.tensor_index import INDEX, SINGLE, open_folder
from tests import buckets

FIRST, SECOND = 'model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'


class HeaderOnly(io.BytesIO):
  """A file whose data must not be read."""

  def read(self, size):
    found = super().read(size)
    assert self.tell() <= 8 + int.from_bytes(self.getvalue()[:8], 'little')
    return found


@pytest.fixture
def no_data_is_read(monkeypatch):
  original = tensor_header.opened

  @contextlib.contextmanager
  def opened(path):
    with original(path) as stream:
      yield HeaderOnly(stream.read()) if path.suffix == '.safetensors' else stream

  monkeypatch.setattr(tensor_header, 'opened', opened)


def folder_of(tmp_path, **files):
  """Two shards and an index, changed: name -> content, a function of the present content, or None to remove it."""
  arrays = [tensor_files.source(name, np.full(4, i, np.float32)) for i, name in enumerate('abcd')]
  tensor_files.write_folder(tmp_path, arrays, max_shard_bytes=32)
  for name, content in files.items():
    path = tmp_path / {'index': INDEX, 'first': FIRST, 'second': SECOND}.get(name, name)
    if callable(content):
      content = content(path.read_bytes())
    path.unlink(missing_ok=True)
    if content is not None:
      path.write_bytes(content)


def index_with(**places):
  """Changes where tensors lie; None takes one out."""
  def change(content):
    index = json.loads(content)
    weight_map = index['weight_map'] | places
    return json.dumps(index | {'weight_map': {name: file for name, file in weight_map.items() if file}}).encode()
  return change


def placed(file):
  """The index has tensor 'a' in this file, which is not allowed to be named."""
  content = json.dumps({'weight_map': {'a': file}}).encode()
  return {'index': content}, f"index.json: tensor 'a' lies in {re.escape(repr(file))}, which is not the plain name"


def packed(**arrays):
  return safetensors.numpy.save(arrays)


EMPTY = dict.fromkeys(['index', 'first', 'second'])
PICKLED = 'pickled weights only.*run any code.*safe_serialization=True'
BAD_FOLDERS = {
  # name: (what is changed, what the message says)
  'nothing': (EMPTY, 'holds no weights: neither model.safetensors nor'),
  'other files': (EMPTY | {'config.json': b'{}', 'training_args.bin': b'x'}, 'holds no weights'),
  'pytorch_model.bin': (EMPTY | {'pytorch_model.bin': b'x'}, PICKLED),
  'pytorch shards': (EMPTY | {'pytorch_model-00001-of-00002.bin': b'x'}, PICKLED),
  'pth': (EMPTY | {'consolidated.00.pth': b'x'}, PICKLED),
  'pt': (EMPTY | {'model.pt': b'x'}, PICKLED),
  'ckpt': (EMPTY | {'last.ckpt': b'x'}, PICKLED),
  'an adapter': (EMPTY | {'adapter_model.safetensors': packed()}, "holds .'adapter_model.safetensors'., but neither"),
  'no index': ({'index': None}, f"holds .'{FIRST}', '{SECOND}'., but neither .* interrupted"),
  'both': ({SINGLE: packed(a=np.ones(1))}, f'holds both {SINGLE} and {INDEX}'),
  'damaged shard': ({'second': lambda content: content[:-1]}, f"{SECOND}: tensor 'd' ends .* cut short"),
  'pointer': ({'first': b'version https://git-lfs.github.com/spec/v1'}, f'{FIRST} is a git-lfs pointer'),
  'absent shard': ({'second': None}, rf"{INDEX} names \['{SECOND}'\], which are not there"),
  'index empty': ({'index': b''}, f'{INDEX}: the index is no valid JSON'),
  'index a list': ({'index': b'[]'}, rf'{INDEX}: the index is \[\], not a JSON object'),
  'no weight_map': ({'index': b'{"metadata": {}}'}, f"{INDEX}: 'weight_map' is None"),
  'empty weight_map': ({'index': b'{"weight_map": {}}'}, f"{INDEX}: 'weight_map' is {{}}"),
  'weight_map a list': ({'index': b'{"weight_map": ["a"]}'}, rf"{INDEX}: 'weight_map' is \['a'\]"),
  'tensor twice': ({'index': b'{"weight_map": {"a": "x", "a": "y"}}'}, f"{INDEX}: .* JSON .key 'a' stands twice"),
  'place a number': placed(1),
  'no name': placed(''),
  'absolute': placed('/etc/x.safetensors'),
  'above': placed('../x.safetensors'),
  'parent': placed('..'),
  'backslash': placed('..\\x.safetensors'),
  'scheme': placed('gs:x.safetensors'),
  'zero byte': placed('x\0.safetensors'),
  'half a pair': ({'index': b'{"weight_map": {"a": "\\ud800.safetensors"}}'}, f'{INDEX}: the index is no valid JSON'),
  'indexed pickle': ({'index': index_with(a='x.bin')}, f"{INDEX}: tensor 'a' lies in 'x.bin', .* run any code"),
  'promised': ({'index': index_with(e=SECOND)}, rf"{SECOND}: {INDEX} promises \['e'\] here"),
  'not promised': ({'index': index_with(d=None)}, f"{SECOND}: tensor 'd', but {INDEX} has it in None"),
  'in another shard': ({'index': index_with(a=SECOND)}, f"{FIRST}: tensor 'a', but {INDEX} has it in {SECOND}"),
  'in two shards': ({'second': packed(a=np.ones(1), c=np.ones(1))}, f"{SECOND}: tensor 'a' is in {FIRST} too"),
}


@pytest.mark.parametrize('name', BAD_FOLDERS)
def test_a_bad_folder_is_refused_by_name(name, tmp_path, no_data_is_read):
  files, message = BAD_FOLDERS[name]
  folder_of(tmp_path, **files)
  with pytest.raises(CheckpointError, match=message) as error:
    open_folder(tmp_path)
  assert str(tmp_path) in str(error.value) and len(str(error.value)) < 2000


def test_a_good_folder(tmp_path, no_data_is_read):
  folder_of(tmp_path, **{'notes.txt': b'x', 'adapter_model.safetensors': b'damaged', 'optimizer.pt': b'x'})
  found = open_folder(str(tmp_path))
  assert {name: info.file.name for name, info in found.items()} == dict(a=FIRST, b=FIRST, c=SECOND, d=SECOND)


def test_an_index_may_name_the_single_file(tmp_path):
  tensor_files.write_folder(tmp_path, [tensor_files.source('a', np.ones(3))])
  (tmp_path / INDEX).write_text(json.dumps({'weight_map': {'a': SINGLE}}))
  assert list(open_folder(tmp_path)) == ['a']


def test_paths_that_are_no_folders(tmp_path):
  with pytest.raises(CheckpointError, match='absent does not exist; give the folder'):
    open_folder(tmp_path / 'absent')
  (tmp_path / 'file').touch()
  with pytest.raises(CheckpointError, match='file is a file; give the folder'):
    open_folder(str(tmp_path / 'file'))
  (tmp_path / INDEX).mkdir()
  with pytest.raises(CheckpointError, match=f'{INDEX} cannot be read .Is a directory'):
    open_folder(tmp_path)


def test_an_index_too_long_to_be_one(tmp_path, monkeypatch):
  folder_of(tmp_path)
  monkeypatch.setattr(tensor_header, 'MAX_HEADER', (tmp_path / INDEX).stat().st_size - 1)
  with pytest.raises(CheckpointError, match=f'{INDEX} has .* bytes; .* are allowed'):
    open_folder(tmp_path)


def test_fuzzed_indexes_are_refused_or_right(tmp_path):
  folder_of(tmp_path)
  rng, path, opened = random.Random(0), tmp_path / INDEX, 0
  good, pieces = path.read_bytes(), [b'', b' ', b'"', b'/', b'\0', b'a', b'1', b'{', b'\xff', b'..']
  for _ in range(400):
    content = bytearray(good)
    for _ in range(rng.choice([1, 1, 2])):
      at = rng.randrange(len(content))
      content[at:at + rng.choice([0, 1, 1, 30])] = rng.choice(pieces)
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
      assert list(open_folder(tmp_path)) == list('abcd')
      opened += 1
  assert 20 < opened < 200


def test_shards_are_filled_in_order_and_indexed(tmp_path):
  sizes = [101, 40, 60, 1, 250, 50, 50, 0, 100]
  arrays = {str(i): np.full(size, i, np.uint8) for i, size in enumerate(sizes)}
  tensor_files.write_folder(tmp_path, [tensor_files.source(*item) for item in arrays.items()], max_shard_bytes=100)
  shard = 'model-0000{}-of-00006.safetensors'.format
  index = json.loads((tmp_path / INDEX).read_text())
  assert index['metadata'] == {'total_size': sum(sizes)}
  expected = dict(zip('012345678', [1, 2, 2, 3, 4, 5, 5, 5, 6], strict=True))
  assert index['weight_map'] == {name: shard(i) for name, i in expected.items()}
  assert sorted(path.name for path in tmp_path.iterdir()) == [*map(shard, range(1, 7)), INDEX]
  assert open_folder(tmp_path).keys() == arrays.keys()
  for name, info in open_folder(tmp_path).items():
    np.testing.assert_array_equal(tensor_files.read(info), arrays[name])
  assert safetensors.numpy.load_file(tmp_path / shard(5)).keys() == {'5', '6', '7'}


def test_a_bucket_is_a_folder(monkeypatch):
  folder = buckets.use(monkeypatch) + '/models/tiny'
  with pytest.raises(CheckpointError, match=f'{folder} does not exist'):
    open_folder(folder)
  for arrays in ({'old': np.ones(100)}, {name: np.full(7, i, np.float32) for i, name in enumerate('abc')}):
    tensors = [tensor_files.source(*item) for item in arrays.items()]
    tensor_files.write_folder(folder, tensors, max_shard_bytes=60, overwrite=True)
  found = {name: tensor_files.read(info) for name, info in open_folder(folder).items()}
  assert str(found) == str(arrays)
  shards = [f'/bucket/models/tiny/model-0000{i}-of-00002.safetensors' for i in (1, 2)]
  assert sorted(buckets.Bucket.store) == [*shards, f'/bucket/models/tiny/{INDEX}']
  with pytest.raises(CheckpointError, match='holds weights already'):
    tensor_files.write_folder(folder, tensors)
