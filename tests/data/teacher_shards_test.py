import hashlib
import json
import os

import numpy as np
import pytest

from srm_jax.data import teacher_shards
from srm_jax.data.teacher_shards import Entry, Manifest, ShardReader


def make_records(count=5, *, seed=0):
  generator = np.random.default_rng(seed)
  entries = [Entry(f'é{number}', f'key{number}', 0 if number == 2 else number + 2) for number in range(count)]
  return [(entry, generator.integers(0, 256, (entry.tokens, 19), np.uint8)) for entry in entries]


def write(folder, shards=2):
  manifest = Manifest({'teacher': 'α', 'temperature': 0.1}, [])
  for number in range(shards):
    manifest.shards.append(teacher_shards.write_shard(folder, manifest, make_records(seed=number)))
    teacher_shards.save_manifest(folder, manifest)
  return manifest


def readers(folder, manifest):
  return [ShardReader(folder, shard, manifest.seal) for shard in manifest.shards]


def flip(path, position, generator):
  raw = bytearray(path.read_bytes())
  raw[position] ^= int(generator.integers(1, 256))
  path.write_bytes(raw)


def test_round_trip(tmp_path):
  manifest = write(tmp_path)
  assert teacher_shards.load_manifest(tmp_path) == manifest
  assert (manifest.examples, manifest.tokens) == (10, 32)
  for seed, reader in enumerate(readers(tmp_path, manifest)):
    wanted = [rows for _, rows in make_records(seed=seed)]
    for order in (range(5), [3, 0, 3], []):
      found = reader.rows(order)
      assert len(found) == len(order)
      for number, rows in zip(order, found, strict=True):
        np.testing.assert_array_equal(rows, wanted[number].reshape(rows.shape))
    for rows, number in zip(reader.all_rows(), range(5), strict=True):
      np.testing.assert_array_equal(rows, wanted[number].reshape(rows.shape))


def test_the_manifest_tells_files_sizes_and_hashes(tmp_path):
  manifest = write(tmp_path)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['manifest.json', *(s.file for s in manifest.shards)]
  for shard in json.loads((tmp_path / 'manifest.json').read_text())['shards']:
    raw = (tmp_path / shard['file']).read_bytes()
    assert (len(raw), hashlib.sha256(raw).hexdigest()) == (shard['size'], shard['sha256'])
    assert shard['entries'][1] == ['é1', 'key1', 3]


def test_names_follow_contents_to_the_disk(tmp_path, monkeypatch):
  """What is renamed before it is on disk may be empty after a power cut."""
  events, replace, synchronise = [], os.replace, teacher_shards._synchronise
  monkeypatch.setattr(os, 'replace', lambda old, new: (events.append((old.name, new.name)), replace(old, new)))
  monkeypatch.setattr(teacher_shards, '_synchronise', lambda path: (events.append(path.name), synchronise(path)))
  write(tmp_path, shards=1)
  assert events == [
      event for name in ('shard-00000.array_record', 'manifest.json')
      for event in (f'{name}.partial', (f'{name}.partial', name), tmp_path.name)]


def test_a_freed_name_is_taken_again(tmp_path):
  manifest = write(tmp_path, shards=3)
  del manifest.shards[1]
  assert teacher_shards.write_shard(tmp_path, manifest, make_records()).file == 'shard-00001.array_record'


def test_leftovers_of_a_killed_writer_are_deleted_and_nothing_else(tmp_path):
  manifest = write(tmp_path)
  before = {path.name for path in tmp_path.iterdir()}
  (tmp_path / 'shard-00002.array_record').write_bytes(b'renamed, not listed')
  (tmp_path / 'shard-00003.array_record.partial').write_bytes(b'half')
  (tmp_path / 'notes.txt').write_bytes(b'of the user')
  teacher_shards.clear_leftovers(tmp_path, manifest)
  assert {path.name for path in tmp_path.iterdir()} == before | {'notes.txt'}


def test_any_change_of_the_manifest_is_found(tmp_path):
  write(tmp_path)
  path = tmp_path / 'manifest.json'
  raw, generator = path.read_bytes(), np.random.default_rng(0)
  for position in range(0, len(raw), 3):
    flip(path, position, generator)
    with pytest.raises(ValueError, match=r'manifest\.json is damaged'):
      teacher_shards.load_manifest(tmp_path)
    path.write_bytes(raw)
  for wrong in (raw[:-1], raw + b' ', raw[:200], b'', b'[]\n', b'{}\n', b'null\n', raw.replace(b', ', b',  ', 1)):
    path.write_bytes(wrong)
    with pytest.raises(ValueError, match=r'manifest\.json is damaged'):
      teacher_shards.load_manifest(tmp_path)
  path.unlink()
  with pytest.raises(FileNotFoundError, match=r'manifest\.json does not exist; give the folder'):
    teacher_shards.load_manifest(tmp_path)


def test_another_format_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(teacher_shards, 'FORMAT', 7)
  write(tmp_path)
  monkeypatch.undo()
  with pytest.raises(ValueError, match='has format 7, this version reads 1; fix'):
    teacher_shards.load_manifest(tmp_path)


def positions(path, generator):
  """Every tenth byte of where the records are, and some of everywhere: headers, index, padding."""
  raw = path.read_bytes()
  used = np.flatnonzero(np.frombuffer(raw, np.uint8))
  everywhere = generator.integers(0, len(raw), 40)
  return np.unique(np.concatenate([used[::10], used[:40], used[-60:], everywhere])).tolist()


def test_any_change_of_a_shard_is_found_and_named(tmp_path):
  """Outside the records reading may still be right; what is read is never wrong."""
  manifest = write(tmp_path, shards=1)
  shard, seal, records = manifest.shards[0], manifest.seal, make_records()
  path, generator = tmp_path / shard.file, np.random.default_rng(0)
  raw = path.read_bytes()
  spans = [(start := raw.index(rows.tobytes()), start + rows.size, entry) for entry, rows in records if entry.tokens]
  named = 0
  for position in positions(path, generator):
    flip(path, position, generator)
    found = teacher_shards.damage(tmp_path, shard, seal)
    assert found.startswith(str(path)) and 'damaged' in found
    inside = [entry.id for start, stop, entry in spans if start <= position < stop]
    if inside:
      assert f"lost are 1 examples, id='{inside[0]}'" in found
      named += 1
    read_or_refused(ShardReader(tmp_path, shard, seal), records)
    path.write_bytes(raw)
  assert named > 20
  assert teacher_shards.damage(tmp_path, shard, seal) is None


def read_or_refused(reader, records):
  for number, (entry, rows) in enumerate(records):
    try:
      np.testing.assert_array_equal(reader.rows([number])[0].reshape(rows.shape), rows)
    except ValueError as error:
      assert f"{reader.path}: example id='{entry.id}' is damaged" in str(error)


def test_one_damaged_record_does_not_hide_its_neighbours(tmp_path):
  manifest = write(tmp_path, shards=1)
  path, records = tmp_path / manifest.shards[0].file, make_records()
  flip(path, path.read_bytes().index(records[3][1].tobytes()), np.random.default_rng(0))
  reader = readers(tmp_path, manifest)[0]
  assert len(reader.rows([0, 1, 2, 4])) == 4
  for read in (lambda: reader.rows([0, 3, 4]), reader.all_rows):
    with pytest.raises(ValueError, match="example id='é3' is damaged: .*; fix: delete the file and run"):
      read()


@pytest.mark.parametrize('keep', [0, 1, 100, 1000, 65_536, -1])
def test_a_truncated_shard_is_named(tmp_path, keep):
  manifest = write(tmp_path, shards=1)
  path = tmp_path / manifest.shards[0].file
  raw = path.read_bytes()
  path.write_bytes(raw[:keep])
  shard, seal = manifest.shards[0], manifest.seal
  fault = f'{path} has {len(raw[:keep])} bytes, {len(raw)} were written'
  assert teacher_shards.size_fault(tmp_path, shard) == fault
  assert teacher_shards.damage(tmp_path, shard, seal).startswith(fault)
  read_or_refused(ShardReader(tmp_path, shard, seal), make_records())


def test_a_missing_shard_is_named(tmp_path):
  manifest = write(tmp_path, shards=1)
  shard = manifest.shards[0]
  (tmp_path / shard.file).unlink()
  assert teacher_shards.size_fault(tmp_path, shard) == f'{tmp_path / shard.file} is missing'
  assert "is missing: lost are 5 examples, id='é0', id='é1'" in teacher_shards.damage(tmp_path, shard, manifest.seal)
  with pytest.raises(ValueError, match="example id='é1' is damaged"):
    ShardReader(tmp_path, shard, manifest.seal).rows([1])


def test_records_of_another_cache_or_place_are_refused(tmp_path):
  manifest = write(tmp_path, shards=1)
  shard = manifest.shards[0]
  other = Manifest({**manifest.identity, 'teacher': 'β'}, manifest.shards)
  with pytest.raises(ValueError, match='its checksum does not match'):
    ShardReader(tmp_path, shard, other.seal).rows([0])
  swapped = shard._replace(entries=[shard.entries[1], shard.entries[0], *shard.entries[2:]])
  with pytest.raises(ValueError, match="example id='é1' is damaged: another example is in its place"):
    ShardReader(tmp_path, swapped, manifest.seal).rows([0])
