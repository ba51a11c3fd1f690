import concurrent.futures
import pathlib
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from scipy import special

from srm_jax.data import packing, teacher_cache, teacher_shards, top_k_codec
from srm_jax.data.teacher_cache import open_cache, verify, writer
from tests.data.cached import EOS, VOCAB, K, contents, identity_of, logits_of, make_examples, shards, top_of, write

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_round_trip(tmp_path):
  examples = make_examples()
  write(tmp_path, examples)
  cache = open_cache(tmp_path, identity_of(examples))
  assert len(cache) == len(examples) and list(cache) == [example.id for example in examples] and 'e4' in cache
  codec, together = top_k_codec.Codec(VOCAB, K), cache.read([example.id for example in reversed(examples)])
  for example, read in zip(reversed(examples), together, strict=True):
    wanted = codec.decode(codec.encode(*top_of(example)))
    for found in (read, cache[example.id]):
      for name, field, value in zip(found._fields, found, wanted, strict=True):
        np.testing.assert_array_equal(field, value, err_msg=name)
  assert cache['e3'].ids.shape == (0, K) and cache.read([]) == []


def test_scan_reads_all_in_order(tmp_path):
  examples = make_examples()
  write(tmp_path, examples)
  cache = open_cache(tmp_path, identity_of(examples))
  scanned = dict(cache.scan())
  assert list(scanned) == [example.id for example in examples]
  for example_id, tokens in scanned.items():
    for field, value in zip(tokens, cache[example_id], strict=True):
      np.testing.assert_array_equal(field, value)


@pytest.mark.parametrize('plan', [packing.plan, packing.one_per_row])
def test_gather_is_aligned_with_the_targets_of_a_batch(tmp_path, plan):
  """Against the teacher itself, asked at every supervised position of the rows."""
  examples = make_examples(30)
  write(tmp_path, examples)
  cache = open_cache(tmp_path, identity_of(examples))
  bins = plan([len(example.tokens) for example in examples], 40)
  batch = packing.pack(examples, bins, 40)
  ids, logprobs, tail = cache.gather(examples, bins, batch)
  assert ids.shape == logprobs.shape == (*batch.inputs.shape, K) and tail.shape == batch.inputs.shape
  assert (ids.dtype, logprobs.dtype, tail.dtype) == (np.int32, np.float32, np.float32)
  for row, column in np.ndindex(batch.inputs.shape):
    if batch.loss_mask[row, column]:
      seed = int(batch.inputs[row, column]), int(batch.positions[row, column])
      exact = special.log_softmax(np.random.default_rng(seed).normal(0, 3, VOCAB))
      np.testing.assert_array_equal(ids[row, column], np.sort(np.argsort(-exact)[:K]))
      np.testing.assert_allclose(logprobs[row, column], exact[ids[row, column]], atol=0.01)
      np.testing.assert_allclose(tail[row, column], 1 - np.exp(exact[ids[row, column]]).sum(), rtol=0.01)
  off = batch.loss_mask == 0
  assert off.any() and not ids[off].any() and not logprobs[off].any() and not tail[off].any()


def test_gather_of_some_rows_of_a_plan(tmp_path):
  """As a host does: a slice of the bin table, in which an example may come twice."""
  examples = make_examples(12)
  write(tmp_path, examples)
  cache = open_cache(tmp_path, identity_of(examples))
  bins = np.array([[5, 2, -1], [0, 5, 7]])
  batch = packing.lay_out(examples, bins, 64)
  found = cache.gather(examples, bins, batch)
  for row, chosen in enumerate(([5, 2], [0, 5, 7])):
    wanted = np.concatenate([cache[examples[i].id].ids for i in chosen])
    np.testing.assert_array_equal(found.ids[row][batch.loss_mask[row] > 0], wanted)
  with pytest.raises(ValueError, match='give the examples and bins that it was packed from'):
    cache.gather(examples, bins[:1], batch)


def test_content_is_found_under_another_id(tmp_path):
  examples = make_examples()
  write(tmp_path, examples)
  cache = open_cache(tmp_path, identity_of(examples))
  assert cache.find(examples[6]) == 'e6'
  assert cache.find(examples[6]._replace(id='renamed')) == 'e6'
  assert cache.find(examples[6]._replace(id='e5')) == 'e6'
  changed = examples[6]._replace(tokens=examples[6].tokens + np.int32(1))
  with pytest.raises(ValueError, match="example id='e6' was cached with other tokens or another loss mask; fix"):
    cache.find(changed)
  with pytest.raises(ValueError, match="example id='e6' was cached with other tokens or another loss mask"):
    cache.find(examples[6]._replace(loss_mask=np.ones(len(changed.tokens), bool)))
  with pytest.raises(ValueError, match="example id='new' is none of the 11 in the cache"):
    cache.find(changed._replace(id='new'))
  with pytest.raises(KeyError, match='id=new is none of the 11'):
    cache.read(['e0', 'new'])


def test_the_key_of_a_content():
  example = packing.from_prompt_completion('a', [7, 8], [9, 10], EOS)
  key = teacher_cache.content_key(example)
  assert key == teacher_cache.content_key(example._replace(id='b', tokens=example.tokens.astype(np.int64)))
  others = [([7], [8, 9, 10]), ([7, 8, 9], [10]), ([7, 8], [10, 9]), ([7, 8], [9])]
  keys = {teacher_cache.content_key(packing.from_prompt_completion('a', *parts, EOS)) for parts in others}
  assert len(keys | {key}) == 5


def test_data_hash_is_of_ids_and_contents_in_any_order():
  examples = make_examples()
  found = teacher_cache.data_hash(examples)
  assert found == teacher_cache.data_hash([*examples[::-1], examples[2]])
  assert found != teacher_cache.data_hash(examples[1:])
  assert found != teacher_cache.data_hash([examples[0]._replace(id='x'), *examples[1:]])


@pytest.mark.parametrize('change, message', [
    ({'teacher': 't2'}, "teacher is 't1' there, 't2' here; fix: load the teacher that wrote it, or write"),
    ({'tokenizer': 'v2'}, "tokenizer is 'v1' there, 'v2' here; fix: use the tokenizer"),
    ({'data': 'd2'}, "data is '.*' there, 'd2' here; fix: use the data"),
    ({'vocab_size': 301}, 'vocab_size is 300 there, 301 here; fix: use the vocabulary'),
    ({'k': 9}, 'k is 8 there, 9 here; fix: ask for the k'),
    ({'temperature': 0.5}, 'temperature is 1.0 there, 0.5 here; fix: ask for the temperature'),
    ({'k': 9, 'teacher': 't2'}, "teacher is .*; k is 8 there, 9 here; fix: load .*, ask for the k that is there, or"),
])
def test_another_identity_is_refused_for_reading_and_for_writing(tmp_path, change, message):
  examples = make_examples()
  write(tmp_path, examples)
  before, other = contents(tmp_path), identity_of(examples, **change)
  with pytest.raises(ValueError, match=message):
    open_cache(tmp_path, other)
  with pytest.raises(ValueError, match=message), writer(tmp_path, other):
    pass
  assert contents(tmp_path) == before
  assert len(open_cache(tmp_path, identity_of(examples, temperature=1, k=np.int64(K)))) == 11


def test_the_identity_is_read_back(tmp_path):
  examples = make_examples()
  with pytest.raises(InterruptedError):
    write(tmp_path, examples, stop=6, temperature=2)
  assert teacher_cache.identity_of(tmp_path) == identity_of(examples, temperature=2.0)
  with pytest.raises(FileNotFoundError, match='give the folder of a teacher cache'):
    teacher_cache.identity_of(tmp_path / 'elsewhere')


def test_another_codec_is_refused(tmp_path, monkeypatch):
  examples = make_examples()
  write(tmp_path, examples)
  monkeypatch.setattr(top_k_codec, 'VERSION', 9)
  with pytest.raises(ValueError, match='codec is 1 there, 9 here; fix: use the version of srm_jax'):
    open_cache(tmp_path, identity_of(examples))


@pytest.mark.parametrize('change, message', [
    ({'k': 301}, 'k 301 is not within'), ({'k': 0}, 'k 0 is not within'), ({'temperature': 0.0}, 'not positive')])
def test_an_identity_that_cannot_be(change, message):
  with pytest.raises(ValueError, match=message):
    identity_of(make_examples(), **change)


@pytest.mark.parametrize('stop', [0, 1, 4, 7, 8, 10])
def test_an_interrupted_writer_continues_and_makes_the_same_bytes(tmp_path, stop):
  examples = make_examples()
  write(tmp_path / 'whole', examples)
  with pytest.raises(InterruptedError):
    write(tmp_path / 'cut', examples, stop=stop)
  assert verify(tmp_path / 'cut').examples == stop // 4 * 4
  with pytest.raises(ValueError, match=f'unfinished, with {stop // 4 * 4} examples in {stop // 4} shards; fix: run'):
    open_cache(tmp_path / 'cut', identity_of(examples))
  with writer(tmp_path / 'cut', identity_of(examples), shard_examples=4) as out:
    assert out.finished == {example.id for example in examples[: stop // 4 * 4]}
    for example in examples[stop // 4 * 4 :]:
      out.append(example, *top_of(example))
      assert example.id in out.finished
  assert contents(tmp_path / 'cut') == contents(tmp_path / 'whole')


KILLED = textwrap.dedent("""
  import os, pathlib, signal, sys
  from srm_jax.data import teacher_shards
  from tests.data import cached as case
  folder, function, count = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
  owner = os if hasattr(os, function) else teacher_shards
  real, calls = getattr(owner, function), []
  def deadly(*args):
    calls.append(args)
    if len(calls) == count:
      os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
  setattr(owner, function, deadly)
  case.write(folder, case.make_examples(), shard_examples=2)
""")


@pytest.mark.parametrize('function, count', [
    ('replace', 1), ('replace', 4), ('replace', 5), ('_sealed', 4), ('save_manifest', 3),
])
def test_a_killed_writer_continues(tmp_path, function, count):
  """SIGKILL before the first manifest, before a shard or its manifest is renamed, within a shard, between the two."""
  examples = make_examples()
  command = [sys.executable, '-c', KILLED, str(tmp_path / 'cut'), function, str(count)]
  assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
  if (tmp_path / 'cut' / 'manifest.json').exists():
    assert verify(tmp_path / 'cut').examples < len(examples)
  write(tmp_path / 'cut', examples, shard_examples=2)
  write(tmp_path / 'whole', examples, shard_examples=2)
  assert contents(tmp_path / 'cut') == contents(tmp_path / 'whole')


def test_a_finished_cache_stays_as_it_is_and_can_grow(tmp_path):
  examples = make_examples()
  identity = identity_of(examples)
  with writer(tmp_path, identity, shard_examples=4) as out:
    for example in examples[:6]:
      out.append(example, *top_of(example))
  before, old = contents(tmp_path), shards(tmp_path)
  with writer(tmp_path, identity, shard_examples=4):
    assert len(open_cache(tmp_path, identity)) == 6
  assert contents(tmp_path) == before
  write(tmp_path, examples)
  assert len(open_cache(tmp_path, identity)) == 11
  assert shards(tmp_path).items() >= old.items()


def test_a_finished_cache_that_was_growing_when_stopped_is_unfinished(tmp_path):
  examples = make_examples()
  identity = identity_of(examples)
  with writer(tmp_path, identity, shard_examples=4) as out:
    out.append(examples[0], *top_of(examples[0]))
  with pytest.raises(InterruptedError):
    write(tmp_path, examples, stop=7)
  with pytest.raises(ValueError, match='unfinished, with 5 examples in 2 shards'):
    open_cache(tmp_path, identity)


def test_the_writer_clears_what_a_killed_one_left(tmp_path):
  examples = make_examples()
  write(tmp_path, examples)
  before = contents(tmp_path)
  for name in ('shard-00003.array_record', 'shard-00003.array_record.partial', 'manifest.json.partial'):
    (tmp_path / name).write_bytes(b'half')
  write(tmp_path, examples)
  assert contents(tmp_path) == before


def test_shards_without_their_manifest_are_not_overwritten(tmp_path):
  examples = make_examples()
  write(tmp_path, examples)
  (tmp_path / 'manifest.json').unlink()
  before = contents(tmp_path)
  with pytest.raises(ValueError, match=r'holds 3 shards and no manifest\.json; fix: restore it, delete the shards'):
    write(tmp_path, examples)
  assert contents(tmp_path) == before


def test_one_writer_at_a_time(tmp_path):
  examples = make_examples()
  with writer(tmp_path, identity_of(examples)):
    with pytest.raises(ValueError, match='is being written by another process; wait'), writer(
        tmp_path, identity_of(examples)):
      pass
  write(tmp_path, examples)


@pytest.mark.parametrize('spoil', [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:500])])
def test_lost_shards_are_refused_by_readers_and_made_anew_by_the_writer(tmp_path, spoil, caplog):
  examples = make_examples()
  write(tmp_path, examples)
  before = shards(tmp_path)
  spoil(tmp_path / 'shard-00001.array_record')
  for read in (lambda: open_cache(tmp_path, identity_of(examples)), lambda: verify(tmp_path)):
    with pytest.raises(ValueError, match=r'shard-00001\.array_record (is missing|has 500 bytes).*; fix: delete'):
      read()
  write(tmp_path, examples)
  assert 'shard-00001.array_record' in caplog.text
  assert verify(tmp_path).examples == len(open_cache(tmp_path, identity_of(examples))) == 11
  assert shards(tmp_path) == before


def test_a_repair_that_was_not_finished_leaves_the_cache_unfinished(tmp_path):
  examples = make_examples()
  write(tmp_path, examples)
  (tmp_path / 'shard-00000.array_record').unlink()
  with pytest.raises(InterruptedError):
    write(tmp_path, examples, stop=1)
  with pytest.raises(ValueError, match='unfinished, with 7 examples in 2 shards'):
    open_cache(tmp_path, identity_of(examples))


def test_flipped_bytes_anywhere_are_found(tmp_path):
  """A position of each file at a time: verify names the file; a read is right or refused, with the example's id."""
  examples, generator = make_examples(9), np.random.default_rng(0)
  write(tmp_path, examples)
  identity, files = identity_of(examples), contents(tmp_path)
  assert verify(tmp_path) == open_cache(tmp_path, identity).contents
  intact = dict(open_cache(tmp_path, identity).scan())
  for name, raw in files.items():
    used = np.flatnonzero(np.frombuffer(raw, np.uint8))
    for position in [*generator.choice(used, 40).tolist(), *generator.integers(0, len(raw), 15).tolist()]:
      spoiled = bytearray(raw)
      spoiled[position] ^= 1 << int(generator.integers(8))
      (tmp_path / name).write_bytes(spoiled)
      with pytest.raises(ValueError, match=f'{name} is damaged'):
        verify(tmp_path)
      if name != teacher_shards.MANIFEST:
        right_or_refused(open_cache(tmp_path, identity), intact, name)
    (tmp_path / name).write_bytes(raw)
  verify(tmp_path)


def right_or_refused(cache, intact, name):
  for example_id, wanted in intact.items():
    try:
      found = cache[example_id]
    except ValueError as error:
      assert name in str(error) and f"example id='{example_id}' is damaged" in str(error)
    else:
      for field, value in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(field, value)


def test_several_damages_are_named_together(tmp_path):
  examples = make_examples()
  write(tmp_path, examples)
  first, last = tmp_path / 'shard-00000.array_record', tmp_path / 'shard-00002.array_record'
  raw = bytearray(first.read_bytes())
  key = teacher_cache.content_key(examples[1]).encode()
  raw[raw.index(key) + 3] ^= 1
  first.write_bytes(raw)
  last.unlink()
  message = r"shard-00000.* lost are 1 examples, id='e1'; .*shard-00002.* missing: lost are 3 examples, id='e8', "
  with pytest.raises(ValueError, match=message):
    verify(tmp_path)


def test_contents_count_all_files(tmp_path):
  examples = make_examples()
  write(tmp_path, examples)
  supervised = sum(int(example.loss_mask.sum()) for example in examples)
  assert verify(tmp_path) == (11, supervised, sum(map(len, contents(tmp_path).values())))


def test_what_cannot_be_appended_names_the_example(tmp_path):
  examples = make_examples()
  ids, logprobs = top_of(examples[0])
  with writer(tmp_path, identity_of(examples)) as out:
    with pytest.raises(ValueError, match=f"example id='e0' has {len(ids)} supervised tokens, not {len(ids) - 1}; give"):
      out.append(examples[0], ids[1:], logprobs[1:])
    with pytest.raises(ValueError, match="example id='e0': token 0 has ids from "):
      out.append(examples[0], ids + VOCAB, logprobs)
    with pytest.raises(ValueError, match=r"example id='e0': ids .* must both be \[n, k=8\]"):
      out.append(examples[0], ids[:, :4], logprobs[:, :4])
    out.append(examples[0], ids, logprobs)
    with pytest.raises(ValueError, match="example id='e0' is in the cache already; append only"):
      out.append(examples[0], ids, logprobs)
  assert list(open_cache(tmp_path, identity_of(examples))) == ['e0']
  with pytest.raises(ValueError, match='shard_examples 0 is not positive'), writer(
      tmp_path, identity_of(examples), shard_examples=0):
    pass


def test_a_supervised_first_token_is_nobodys_target(tmp_path):
  example = packing.Example('a', np.array([4, 5, 6], np.int32), np.ones(3, bool))
  ids, logprobs = np.tile(np.arange(K), (2, 1)), np.log(np.full((2, K), 0.1))
  identity = identity_of([example])
  with writer(tmp_path, identity) as out:
    out.append(example, ids, logprobs)
  bins = np.array([[0]])
  found = open_cache(tmp_path, identity).gather([example], bins, packing.pack([example], bins, 4))
  np.testing.assert_allclose(found.tail, [[0.2, 0.2, 0, 0]], rtol=1e-5)


def test_threads_may_read_one_cache(tmp_path, monkeypatch):
  monkeypatch.setattr(teacher_cache, 'OPEN_SHARDS', 2)  # fewer than there are shards, so readers come and go
  examples = make_examples(40)
  write(tmp_path, examples)
  cache = open_cache(tmp_path, identity_of(examples))
  wanted = dict(cache.scan())
  order = np.random.default_rng(0).integers(0, 40, 400).tolist()
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for number, found in zip(order, pool.map(lambda i: cache[f'e{i}'], order), strict=True):
      np.testing.assert_array_equal(found.logprobs, wanted[f'e{number}'].logprobs)


def test_reconstruction_from_a_cache(tmp_path):
  examples = make_examples()
  write(tmp_path, examples)
  cache = open_cache(tmp_path, identity_of(examples))
  total, quantisation = top_k_codec.reconstruction_kl(logits_of(examples[0]), cache['e0'])
  assert (total > quantisation).all() and (quantisation < 1e-5).all()
