"""No header is believed: whatever a file says, it is refused by name or every tensor in it can be read."""

import contextlib
import copy
import json
import math
import random
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors
from etils import epath

from srm_jax.models import tensor_files, tensor_header
from srm_jax.models.tensor_header import CheckpointError, open_file

GOOD = {
  '__metadata__': {'format': 'pt'},
  'a': {'dtype': 'F32', 'shape': [2, 3], 'data_offsets': [0, 24]},
  'b': {'dtype': 'BF16', 'shape': [4], 'data_offsets': [24, 32]},
  'c': {'dtype': 'I64', 'shape': [], 'data_offsets': [32, 40]},
}
MANY = 'model.layers.0.mlp.weight'


def with_length(raw: bytes, data=b'', length=None) -> bytes:
  return (len(raw) if length is None else length).to_bytes(8, 'little') + raw + data


def encoded(header=None, data=bytes(40)) -> bytes:
  """A file of this header; what is not a mapping is taken as the JSON text."""
  text = json.dumps(GOOD if header is None else header) if not isinstance(header, str) else header
  return with_length(text.encode(), data)


def changed(name, **fields):
  return encoded({**GOOD, name: {**GOOD[name], **fields}})


def one(data=bytes(4), **fields):
  return encoded({'a': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]} | fields}, data)


def twice(key):
  """A header in which a key of tensor 'a' stands twice."""
  again = f'"{key}":' + json.dumps(GOOD['a'][key])
  return encoded(json.dumps(GOOD).replace('"a": {', '"a": {' + again + ','))


@contextlib.contextmanager
def watched(monkeypatch):
  """Yields the list of (position, bytes) of every read of a file."""
  reads, original = [], tensor_header.opened

  class Watched:
    def __init__(self, stream):
      self.stream, self.seek, self.tell = stream, stream.seek, stream.tell

    def read(self, size):
      reads.append((self.tell(), size))
      return self.stream.read(size)

    def readinto(self, out):
      reads.append((self.tell(), len(out)))
      return self.stream.readinto(out)

  @contextlib.contextmanager
  def opened(path):
    with original(path) as stream:
      yield Watched(stream)

  with monkeypatch.context() as patch:
    patch.setattr(tensor_header, 'opened', opened)
    yield reads


BAD = {
  # name: (the file, what the message says of it)
  'empty': (b'', 'has 0 bytes'),
  'shorter than a length': (b'\x10\0\0', 'has 3 bytes'),
  'git-lfs pointer': (b'version https://git-lfs.github.com/spec/v1\noid sha256:0', 'git lfs pull'),
  'torch file': (b'PK\3\4\0\0\x08\x08' + bytes(99), 'pickle under another name.*run any code.*safe_serialization'),
  'old torch file': (b'\x80\2\x8a\nl\xfc\x9cF' + bytes(99), 'pickle under another name.*run any code'),
  'header past the end': (with_length(b'{}', length=3), 'header would have 3 bytes, but 2 follow'),
  'header of 2**64': (with_length(b'{}', length=2**64 - 1), f'header would have {2**64 - 1} bytes'),
  'header cut': (encoded()[:60], 'header would have .* cut short'),
  'no length': (with_length(b'', length=0), 'begins with b.., not with a brace'),
  'space first': (encoded(' ' + json.dumps(GOOD)), 'begins with .*, not with a brace'),
  'a list': (encoded('[]'), r"begins with b'\[\]', not with a brace"),
  'not UTF-8': (with_length(b'{"\xff": 1}'), 'header is no valid JSON .*utf-8'),
  'UTF-16': (with_length('{}'.encode('utf-16-le')), 'header is no valid JSON'),
  'not JSON': (encoded('{"a": }'), 'header is no valid JSON'),
  'two values': (encoded('{} {}'), 'header is no valid JSON'),
  'deep': (encoded('{"a":' + '[' * 200_000), 'header is no valid JSON'),
  'endless number': (encoded('{"a": ' + '9' * 9000 + '}'), 'header is no valid JSON'),
  'not a number': (one(extra=float('nan')), 'header is no valid JSON .NaN is no number'),
  'tensor twice': (encoded('{"a": 1, "a": 1}'), "header is no valid JSON .*'a' stands twice"),
  'field twice': (twice('shape'), "header is no valid JSON .*'shape' stands twice"),
  'metadata a list': (encoded({'__metadata__': []}), r'__metadata__ is \[\]'),
  'metadata a number': (encoded({'__metadata__': {'x': 1}}), r"__metadata__ is \{'x': 1\}"),
  'entry a list': (encoded({'a': [1]}), r"tensor 'a' is \[1\]"),
  'no dtype': (encoded({'a': {'shape': [], 'data_offsets': [0, 0]}}), "tensor 'a' is .*, not dtype"),
  'no shape': (encoded({'a': {'dtype': 'F32', 'data_offsets': [0, 0]}}), "tensor 'a' is .*, not dtype"),
  'no offsets': (encoded({'a': {'dtype': 'F32', 'shape': []}}), "tensor 'a' is .*, not dtype"),
  'unknown dtype': (changed('b', dtype='F4'), "tensor 'b' has dtype 'F4'; save it again in one of .*'BF16'"),
  'dtype a list': (changed('b', dtype=['F32']), r"tensor 'b' has dtype \['F32'\]"),
  'shape a number': (changed('b', shape=4), "tensor 'b' has shape 4, not"),
  'negative size': (changed('b', shape=[-2, -2]), r"tensor 'b' has shape \[-2, -2\], not"),
  'size a float': (changed('b', shape=[4.0]), r"tensor 'b' has shape \[4\.0\], not"),
  'size a bool': (one(shape=[True]), r"tensor 'a' has shape \[True\], not"),
  'size over 2**63': (changed('b', shape=[2**63, 0]), "tensor 'b' has shape .*, not"),
  'rank 65': (one(shape=[1] * 65), "tensor 'a' has shape .*, not a list of up to 64"),
  'product over 2**64': (changed('b', shape=[2**32, 2**31, 4]), "tensor 'b' has shape .* too large"),
  'product is 8 mod 2**64': (changed('b', shape=[2**62 + 1, 4]), "tensor 'b' has shape .* too large"),
  'empty, too large': (one(b'', shape=[0, 2**62, 2**62], data_offsets=[0, 0]), "tensor 'a' has shape .* too large"),
  'one offset': (changed('b', data_offsets=[24]), r"tensor 'b' has data_offsets \[24\], not"),
  'negative offset': (changed('a', data_offsets=[-24, 0]), r"tensor 'a' has data_offsets \[-24, 0\], not"),
  'offsets reversed': (changed('b', data_offsets=[32, 24]), r"tensor 'b' has data_offsets \[32, 24\], not"),
  'too few bytes': (changed('b', data_offsets=[24, 30]), r"tensor 'b' has 6 bytes, but BF16 of shape \[4\] takes 8"),
  'another dtype': (changed('b', dtype='F32'), r"tensor 'b' has 8 bytes, but F32 of shape \[4\] takes 16"),
  'overlap': (changed('b', data_offsets=[16, 24]), "tensor 'b' begins at byte .*, but tensor 'a' ends at"),
  'the same bytes': (
    encoded({'a': GOOD['b'], 'b': GOOD['b']} | {'c': {**GOOD['a']}}, bytes(32)), "tensor 'b' begins at byte .*, but"),
  'hole': (changed('c', data_offsets=[40, 48]) + bytes(8), "tensor 'c' begins at .*, tensor 'b' ends at .* no holes"),
  'hole at the start': (one(bytes(8), data_offsets=[4, 8]), "tensor 'a' begins at .*, the header ends at .* no holes"),
  'bytes at the end': (encoded() + bytes(3), 'last 3 bytes belong to no tensor'),
  'data cut': (encoded()[:-9], "tensor 'b' ends at byte .* cut short"),
  'no data': (encoded(data=b''), "tensor 'a' ends at byte .* cut short"),
  'a terabyte': (one(shape=[2**38], data_offsets=[0, 2**40]), "tensor 'a' ends at byte .* cut short"),
}


@pytest.mark.parametrize('name', BAD)
def test_a_bad_header_is_refused_before_anything_is_spent(name, tmp_path, monkeypatch):
  content, message = BAD[name]
  path = tmp_path / 'model.safetensors'
  path.write_bytes(content)
  with watched(monkeypatch) as reads:
    tracemalloc.start()
    try:
      with pytest.raises(CheckpointError, match=message) as error:
        open_file(path)
      peak = tracemalloc.get_traced_memory()[1]
    finally:
      tracemalloc.stop()
  assert str(path) in str(error.value) and len(str(error.value)) < 2000
  length = int.from_bytes(content[:8], 'little')
  allowed = 8 + length if length <= len(content) - 8 else 8
  assert reads and all(position + size <= allowed for position, size in reads)
  assert peak < 50_000 + 20 * min(length, len(content))


def test_a_good_header(tmp_path):
  path = tmp_path / 'x.safetensors'
  path.write_bytes(encoded({**GOOD, 'empty': {'dtype': 'BOOL', 'shape': [3, 0], 'data_offsets': [24, 24]}}))
  infos = open_file(str(path))
  data = path.stat().st_size - 40
  assert list(infos) == ['a', 'empty', 'b', 'c']
  assert infos['b'] == ('b', epath.Path(path), np.dtype(ml_dtypes.bfloat16), (4,), data + 24, data + 32)
  assert infos['c'].shape == () and infos['empty'].shape == (3, 0)


def test_a_header_of_the_greatest_length_is_read_and_one_byte_more_is_not(tmp_path, monkeypatch):
  path = tmp_path / 'x.safetensors'
  path.write_bytes(encoded())
  length = path.stat().st_size - 48
  monkeypatch.setattr(tensor_header, 'MAX_HEADER', length)
  assert len(open_file(path)) == 3
  monkeypatch.setattr(tensor_header, 'MAX_HEADER', length - 1)
  with pytest.raises(CheckpointError, match=f'{length - 1} are allowed'):
    open_file(path)


def test_files_that_cannot_be_opened(tmp_path):
  with pytest.raises(CheckpointError, match='absent cannot be read .No such file'):
    open_file(tmp_path / 'absent')
  with pytest.raises(CheckpointError, match='cannot be read .Is a directory'):
    open_file(tmp_path)


def test_messages_stay_short(tmp_path):
  entry = {'dtype': 'd' * 100_000, 'shape': [1] * 9999, 'data_offsets': 1}
  (tmp_path / 'x').write_bytes(encoded({'n' * 100_000: entry}))
  with pytest.raises(CheckpointError) as error:
    open_file(tmp_path / 'x')
  assert len(str(error.value)) < 1000


def test_what_encode_writes_is_aligned_and_read_alike_by_the_package():
  for name in ('a', 'ab', 'é' * 3, '"\\'):
    raw = tensor_header.encode([(name, np.dtype(ml_dtypes.bfloat16), (2, 0, 3)), ('x', np.dtype(np.uint8), (3,))])
    assert len(raw) % 8 == 0
    (first, found), (_, other) = sorted(safetensors.deserialize(raw + b'abc'), key=lambda pair: pair[0] == 'x')
    assert (first, found['dtype'], found['shape']) == (name, 'BF16', [2, 0, 3])
    assert bytes(other['data']) == b'abc'


# --- fuzzing


VALUES = [
  None, True, False, -1, 0, 1, 2, 3, 4, 8, 24, 32, 40, 2**31, 2**62, 2**63, 2**64, 10**400, 1.5, 24.0, float('nan'),
  '', 'F32', 'U8', 'BF16', 'F16', 'I32', 'f32', '\ud800', [], [0], [1], [0, 0], [0, 24], [24, 32], [0, 40], [2, 3],
  [3, 2], [6], [1, 6, 1], [1] * 70, [0, 2**60, 2**60], [[2]], {}, {'dtype': 'U8'}, GOOD['a'], GOOD['b']]


def flip(rng, content):
  content = bytearray(content)
  for _ in range(rng.randint(1, 3)):
    content[rng.choice([rng.randrange(8), rng.randrange(len(content))])] = rng.choice([rng.randrange(256), 0x30, 0x7d])
  return bytes(content)


def truncate(rng, content):
  return content[:rng.randrange(len(content))]


def insert(rng, content):
  at = rng.randrange(len(content) + 1)
  return content[:at] + rng.choice([rng.randbytes(rng.randint(1, 9)), b'0', b' ', b'"a":', b'{', b']']) + content[at:]


def in_the_header(rng, content, change):
  """Changes the text of the header and sets its length right."""
  length = int.from_bytes(content[:8], 'little')
  return with_length(change(rng, content[8:8 + length]), content[8 + length:])


def restructure(rng, content):
  """Replaces, adds, deletes or renames something anywhere in the header's tree."""
  tree = copy.deepcopy(GOOD)
  for _ in range(rng.choice([1, 1, 1, 2])):
    node = tree
    while isinstance(node, dict | list) and node:
      key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
      if not isinstance(node[key], dict | list) or rng.random() < .3:
        break
      node = node[key]
    if not isinstance(node, dict | list) or not node:
      continue
    if rng.random() < .15:
      del node[key]
    elif rng.random() < .15 and isinstance(node, dict):
      node[rng.choice(['a', 'b', 'shape', '__metadata__', '', 'é'])] = node.pop(key)
    else:
      node[key] = copy.deepcopy(rng.choice(VALUES))
  return with_length(json.dumps(tree).encode(), content[-40:])


def mutated(rng, content):
  change = rng.choice([flip, truncate, insert, restructure, restructure, restructure, flip, insert])
  if change in (flip, insert) and rng.random() < .7:
    return in_the_header(rng, content, change)
  return change(rng, content)


def read_all(path):
  """The bytes of each tensor that the file is said to hold; CheckpointError where it is refused."""
  found = {}
  for name, info in open_file(path).items():
    array = tensor_files.read(info)
    assert (array.dtype, array.shape) == (info.dtype, info.shape)
    assert array.nbytes == info.stop - info.start == math.prod(info.shape) * info.dtype.itemsize
    found[name] = array.tobytes()
  return found


def test_fuzzed_files_are_refused_or_read_as_the_package_reads_them(tmp_path):
  rng, path = random.Random(0), tmp_path / 'x.safetensors'
  good = encoded(data=bytes(range(40)))
  refused, cases = 0, 3000
  tracemalloc.start()
  try:
    with path.open('wb', buffering=0) as file:  # opening it anew would wait for the disk each time
      for _ in range(cases):
        content = mutated(rng, good)
        file.seek(0)
        file.truncate(file.write(content))
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
          found = read_all(path)
        except CheckpointError:
          refused += 1
          found = None
        assert tracemalloc.get_traced_memory()[1] - before < 200_000, content
        if found is not None:
          assert found == {name: bytes(entry['data']) for name, entry in safetensors.deserialize(content)}, content
  finally:
    tracemalloc.stop()
  assert 150 < cases - refused < 1000  # both ways are taken often
