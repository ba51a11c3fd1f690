"""A cache holds what the dense teacher predicts, whatever interrupts its writing, and refuses another's folder."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from scipy import special

from configs import base
from srm_jax import cache_teacher as module
from srm_jax import checkpoints, schema, sharding
from srm_jax.annotate import annotate
from srm_jax.cache_teacher import cache_teacher
from srm_jax.data import records, teacher_cache, teacher_shards, top_k_codec
from srm_jax.data import tokenizer as tokenizers
from srm_jax.models import heads
from srm_jax.models.config import TransformerConfig, forward_flops
from srm_jax.recipes import context
from srm_jax.types import Batch
from tests import tiny
from tests.data import chats
from tests.tiny import one_device, tiny_tasks  # noqa: F401

MODEL = TransformerConfig(270, 2, 16, 2, 2, 8, 32, max_length=64)  # 12 rows that pad the 258 of bytes
VOCAB, K = 258, 6


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
  return tiny.write_model(tmp_path_factory.mktemp('models') / 'teacher', MODEL, scale=3.0)


def config(teacher, **options):
  data = options.pop('data', tiny.data(count=21))
  defaults = {'k': K, 'batch_tokens': 128, 'chunk': 8, 'measured_tokens': 50}
  made = base.cache_teacher(teacher, data, **{**defaults, **options})
  made.progress = False
  return made


@pytest.fixture(scope='module')
def whole(teacher, tmp_path_factory):
  return cache_teacher(config(teacher), tmp_path_factory.mktemp('cache'))


def examples():
  section = schema.parse(context.DataConfig, tiny.data(count=21), 'data')
  return context.examples_of(section, tokenizers.load('byte'))


def opened(done):
  return teacher_cache.open_cache(done.path, teacher_cache.identity_of(done.path))


@functools.cache
def dense_model(folder):
  """tokens [1, 16] -> float32 logits [16, VOCAB]."""
  model = checkpoints.load_model(folder)

  @jax.jit
  def logits(params, tokens):
    positions = np.arange(tokens.shape[1])[None]
    batch = Batch(tokens, tokens, tokens, positions, np.ones_like(positions))
    return heads.logits(model.config, params, context.forward(model.config, params, batch).hidden[0])[:, :VOCAB]

  return functools.partial(logits, model.params)


def dense(folder, example):
  """float64 [n, VOCAB] log-softmax at the supervised targets of one example, by itself."""
  tokens = np.zeros((1, 16), np.int32)
  tokens[0, : len(example.tokens)] = example.tokens
  logits = np.asarray(dense_model(folder)(tokens), np.float64)
  return special.log_softmax(logits[np.flatnonzero(example.loss_mask) - 1], axis=1)


def test_every_example_holds_the_likeliest_tokens_of_the_teacher(whole, teacher):
  cache = opened(whole)
  assert sorted(cache) == sorted(example.id for example in examples()) and len(cache) == 21
  for example in examples()[::5]:
    exact, found = dense(teacher, example), cache[example.id]
    np.testing.assert_array_equal(found.ids, np.sort(np.argsort(-exact, axis=1)[:, :K], axis=1))
    np.testing.assert_allclose(found.logprobs, np.take_along_axis(exact, found.ids, axis=1), atol=5e-3)
    np.testing.assert_allclose(found.tail, 1 - np.exp(np.take_along_axis(exact, found.ids, axis=1)).sum(1), rtol=5e-3)


def test_summary(whole, teacher):
  model, found = checkpoints.load_model(teacher), dict(whole.summary)
  tokens = sum(teacher_cache.num_supervised(example) for example in examples())
  size = sum(path.stat().st_size for path in whole.path.glob('shard-*')) + (
      whole.path / teacher_shards.MANIFEST).stat().st_size
  assert 0 < found.pop('seconds') < 600
  assert 0.1 < found.pop('tail') < 0.99 and 0 <= found.pop('quantisation_kl') < 1e-5
  assert 0.01 < found.pop('reconstruction_kl') < 2
  assert found == {
      'examples': 21, 'tokens': tokens, 'bytes': size, 'bytes_per_token': size / tokens, 'k': K, 'temperature': 1.0,
      'vocab_size': VOCAB, 'teacher': model.fingerprint, 'measured_tokens': 50,
      'flops': forward_flops(MODEL, sum(len(example.tokens) for example in examples())),
  }
  assert json.loads((whole.path / module.SUMMARY).read_text()) == whole.summary


def test_the_measured_loss_is_that_of_all_tokens_where_all_are_measured(whole, teacher, tmp_path):
  """In several batches, against one KL a token by hand."""
  done = cache_teacher(config(teacher, measured_tokens=10_000), tmp_path)
  cache, parts = opened(done), []
  for example in examples():
    logits, known = dense(teacher, example), cache[example.id]
    parts.append(top_k_codec.reconstruction_kl(logits, known))
  total, quantisation = (np.concatenate(part) for part in zip(*parts, strict=True))
  assert done.summary['measured_tokens'] == len(total) == done.summary['tokens'] > 128
  np.testing.assert_allclose(done.summary['reconstruction_kl'], total.mean(), rtol=1e-4)
  np.testing.assert_allclose(done.summary['quantisation_kl'], quantisation.mean(), rtol=0.05)
  assert whole.summary['reconstruction_kl'] == pytest.approx(total.mean(), rel=0.5)


def test_all_tokens_lose_nothing_but_the_quantisation(teacher, tmp_path):
  found = cache_teacher(config(teacher, k=VOCAB, temperature=2.0), tmp_path).summary
  assert found['tail'] < 1e-6 and found['temperature'] == 2.0
  np.testing.assert_allclose(found['reconstruction_kl'], found['quantisation_kl'], atol=1e-7)
  assert 0 < found['quantisation_kl'] < 1e-5


def kill_after(count, monkeypatch):
  """The writer fails at its `count` + 1-st example."""
  appended = []

  def append(self, *arguments):
    if len(appended) == count:
      raise KeyboardInterrupt
    appended.append(1)
    return original(self, *arguments)

  original = teacher_cache.Writer.append
  monkeypatch.setattr(teacher_cache.Writer, 'append', append)


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != module.SUMMARY}


@pytest.mark.parametrize('count', [3, 13, 20])
def test_a_killed_run_continues_to_the_same_bytes(whole, teacher, tmp_path, monkeypatch, count):
  with monkeypatch.context() as patch:
    kill_after(count, patch)
    with pytest.raises(KeyboardInterrupt):
      cache_teacher(config(teacher), tmp_path)
  assert not (tmp_path / module.SUMMARY).exists()
  assert len(list(tmp_path.glob('shard-*'))) == count // 8
  asked = []
  with monkeypatch.context() as patch:
    patch.setattr(module._Asked, 'tops', lambda self, part: asked.extend(part) or tops(self, part))
    done = cache_teacher(config(teacher), tmp_path)
  assert len(asked) == 21 - count // 8 * 8
  assert contents(tmp_path) == contents(whole.path)
  assert {**done.summary, 'seconds': 0} == {**whole.summary, 'seconds': 0}


tops = module._Asked.tops


def test_a_finished_cache_is_read_back(whole, teacher, monkeypatch):
  before = contents(whole.path)
  monkeypatch.setattr(module._Asked, 'batches', lambda *_: pytest.fail('the teacher was asked again'))
  assert cache_teacher(config(teacher), whole.path) == whole and contents(whole.path) == before


def test_what_a_damaged_file_held_is_asked_for_again(whole, teacher, tmp_path):
  cache_teacher(config(teacher), tmp_path)
  path = sorted(tmp_path.glob('shard-*'))[1]
  path.write_bytes(path.read_bytes()[:-1])
  again = cache_teacher(config(teacher), tmp_path)
  assert path.read_bytes() == (whole.path / path.name).read_bytes()
  assert again.summary['reconstruction_kl'] == whole.summary['reconstruction_kl']
  assert teacher_cache.verify(tmp_path).examples == 21


def test_a_mesh_writes_the_same(whole, teacher, tmp_path, monkeypatch):
  monkeypatch.setattr(sharding, 'make_mesh', functools.partial(sharding.make_mesh.func, devices=jax.devices()))
  made = config(teacher)
  made.mesh = (2, 2, 2)
  done = cache_teacher(made, tmp_path)
  ours, theirs = opened(done), opened(whole)
  for name in theirs:
    np.testing.assert_array_equal(ours[name].ids, theirs[name].ids)
    np.testing.assert_allclose(ours[name].logprobs, theirs[name].logprobs, atol=0.01)


def test_errors(whole, teacher, tmp_path):
  def refused(message, folder='a', **options):
    with pytest.raises(ValueError, match=message):
      cache_teacher(config(options.pop('teacher', teacher), **options), tmp_path / folder)
    assert not (tmp_path / folder).exists()

  refused('nowhere holds no model', teacher=str(tmp_path / 'nowhere'))
  refused(r'k 259 is not within 1 and the vocabulary of 258', k=259)
  refused(r'k 0 is not within', k=0)
  refused(r'temperature 0.0 of a teacher cache is not positive', temperature=0.0)
  refused(r'chunk=0 is not positive', chunk=0)
  refused(r'measured_tokens=0 is not positive', measured_tokens=0)
  refused(r"task 'sum' unknown \(did you mean 'sums'", data=tiny.data('sum'))
  with pytest.raises(schema.ConfigError, match=r'begun with another config: config\.k was 6, is 7'):
    cache_teacher(config(teacher, k=7), whole.path)


def test_a_teacher_that_changed_since_is_named(whole, teacher, tmp_path):
  """The folder is the same and its parameters are not: both fingerprints are in the message."""
  moved = tmp_path / 'teacher'
  tiny.write_model(moved, MODEL, seed=1)
  made = config(str(moved))
  done = cache_teacher(made, tmp_path / 'cache')
  (moved / 'checkpoints').rename(tmp_path / 'old')
  tiny.write_model(moved, MODEL, seed=2)
  theirs = checkpoints.load_model(str(moved)).fingerprint
  with pytest.raises(ValueError, match=f"teacher is '{done.summary['teacher']}' there, '{theirs}' here"):
    cache_teacher(made, tmp_path / 'cache')


def test_an_example_longer_than_the_teachers_context_is_named(tmp_path):
  short = tiny.write_model(tmp_path / 'teacher', dataclasses.replace(MODEL, max_length=11))
  with pytest.raises(ValueError, match=r"example id='\d\+\d' has 12 tokens, context is 11"):
    cache_teacher(config(short), tmp_path / 'cache')


def test_the_students_tokenizer_decides_the_tokens(tmp_path):
  """Of the teacher's vocabulary, but with another end of text; another vocabulary is refused."""
  folder = chats.save_family(tmp_path / 'published', 'qwen2_5')
  student = shutil.copytree(folder, tmp_path / 'student')
  (student / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '<|endoftext|>'}))
  model = dataclasses.replace(MODEL, vocab_size=512, max_length=160)
  chat = tiny.write_model(tmp_path / 'teacher', model, tokenizer=str(folder))
  theirs, ours = tokenizers.load(folder), tokenizers.load(student)
  assert theirs.eos_id != ours.eos_id and theirs.fingerprint != ours.fingerprint
  done = cache_teacher(config(chat, tokenizer=str(student)), tmp_path / 'cache')
  identity = teacher_cache.identity_of(done.path)
  assert identity.vocab_size == ours.vocab_size < 512 and identity.tokenizer == theirs.vocabulary
  section = schema.parse(context.DataConfig, tiny.data(count=21), 'data')
  data = {one.eos_id: teacher_cache.data_hash(context.examples_of(section, one)) for one in (theirs, ours)}
  assert identity.data == data[ours.eos_id] != data[theirs.eos_id]
  message = 'config.tokenizer byte of 258; logits .* one vocabulary; fix: .*cross_tokenizer'
  with pytest.raises(schema.ConfigError, match=message):
    cache_teacher(config(chat, tokenizer='byte'), tmp_path / 'other')


@pytest.mark.parametrize('chunk', [4, 8])
def test_a_mix_may_hold_an_example_twice_and_a_problem_in_two_forms(teacher, tmp_path, chunk):
  data = tiny.data('sums', count=4)
  asked = lambda preface: dict(data, prompt=base.prompt(preface=preface))
  mix = base.mix(16, plain=(3, data), question=(2, asked('a ')), rationale=(1, asked('b ')))
  done = cache_teacher(config(teacher, data=mix, chunk=chunk), tmp_path)
  held = context.examples_of(schema.parse(context.DataConfig, mix, 'data'), tokenizers.load('byte'))
  contents = {teacher_cache.content_key(example) for example in held}
  assert len(held) == 16 > len(contents) > len({example.id for example in held})
  assert done.summary['examples'] == len(contents)
  cache = opened(done)
  for example in held:
    found = cache[cache.find(example)]
    expected = dense(teacher, example)
    np.testing.assert_allclose(found.logprobs, np.take_along_axis(expected, found.ids, axis=-1), atol=0.01)


def test_several_processes_are_refused(teacher, tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(schema.ConfigError, match='written by one process, here are 2'):
    cache_teacher(config(teacher), tmp_path)


def test_annotations_come_with_their_cache(teacher, tmp_path):
  sampling = base.sampling(samples=4, max_new_tokens=8, seed=3)
  made = base.annotate(teacher, tiny.data('parity', count=5), sampling, batch_size=8, chunk=2, cache_k=K)
  made.progress = False
  done = annotate(made, tmp_path)
  section = dict(tiny.data('parity'), records=str(done.path), target='completion')
  right = context.examples_of(schema.parse(context.DataConfig, section, 'data'), tokenizers.load('byte'))
  identity = teacher_cache.identity_of(tmp_path / 'cache')
  assert identity.data == teacher_cache.data_hash(right) and identity.k == K
  assert set(teacher_cache.open_cache(tmp_path / 'cache', identity)) == {example.id for example in right}
  assert done.summary['cache']['examples'] == len(right) < len(records.read(done.path))
  assert annotate(made, tmp_path).summary == done.summary
