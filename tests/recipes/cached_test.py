"""Learning from a cache is learning from the teacher that wrote it, in the same batches, and from no other."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from srm_jax import checkpoints, inspection, plan, schema, sharding
from srm_jax.cache_teacher import cache_teacher
from srm_jax.data import teacher_cache
from srm_jax.data import tokenizer as tokenizers
from srm_jax.inference.top_tokens import make_top_tokens
from srm_jax.losses import top_k
from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import cached, distill, on_policy_distill
from srm_jax.recipes.context import Context
from srm_jax.train import train
from srm_jax.train_step import value_and_grad
from srm_jax.types import Batch, CachedBatch
from tests import tiny
from tests.data import chats
from tests.tiny import one_device, tiny_tasks  # noqa: F401

VOCAB = 258
TEACHER = TransformerConfig(VOCAB, 2, 16, 2, 2, 8, 32, max_length=64)
STUDENT = TransformerConfig(VOCAB, **{
    key: value for key, value in base.model(**tiny.MODEL).items() if key != 'vocab_size'})
BYTES = tokenizers.load('byte')
CONTEXT = Context(STUDENT, BYTES, 5, 10)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
  return tiny.write_model(tmp_path_factory.mktemp('models') / 'teacher', TEACHER, scale=4.0)


@pytest.fixture(scope='module')
def write(teacher, tmp_path_factory):
  """(k, temperature) -> folder of a cache, written once."""

  @functools.cache
  def one(k, temperature=1.0):
    made = base.cache_teacher(teacher, tiny.data(), k=k, temperature=temperature, measured_tokens=20, chunk=5)
    made.progress = False
    return str(cache_teacher(made, tmp_path_factory.mktemp(f'cache{k}')).path)

  return one


def section(folder, *, teacher='', data=None, **terms):
  terms = terms or dict(kl=base.top_k('forward_kl'))
  return base.distill(teacher, data or tiny.data(), tiny.batch(), base.loss(**terms), cache=folder)


def build(*arguments, context=CONTEXT, **options):
  return distill.build(section(*arguments, **options).to_dict(), context)


def dense(teacher, name='forward_kl', **options):
  return distill.build(base.distill(teacher, tiny.data(), tiny.batch(), base.distillation(name, **options)), CONTEXT)


@functools.cache
def params():
  return {'model': jax.jit(transformer.init_params, static_argnums=0)(STUDENT, jax.random.key(3))}


def learner(recipe, *, microbatches=1):
  """batch -> (loss, gradient, metrics)."""
  frozen = {name: its for name, (_, its) in recipe.frozen.items()}

  @jax.jit
  def run(trained, batch, frozen):
    return value_and_grad(recipe.objective, trained, batch, frozen, jax.random.key(0), microbatches=microbatches)

  return lambda batch, trained=None: run(trained or params(), batch, frozen)


def assert_equal(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def gap(actual, expected):
  """Norm of the difference of two gradients, over the norm of the second."""
  difference = jax.tree.map(lambda a, b: a - b, actual[1], expected[1])
  return float(optax.tree.norm(difference) / optax.tree.norm(expected[1]))


def exactly(teacher, batch, **options):
  """A CachedBatch as if nothing had been quantised."""
  model = checkpoints.load_model(teacher)
  known = make_top_tokens(model.config, model.params, vocab_size=VOCAB, **options).top(batch)
  spread = []
  for field in known:
    spread.append(np.zeros((*batch.inputs.shape, field.shape[-1]), field.dtype))
    spread[-1][batch.loss_mask > 0] = field
  tail = np.where(batch.loss_mask > 0, 1 - np.exp(spread[1], dtype=np.float64).sum(-1), 0).astype(np.float32)
  return CachedBatch(batch, {'ids': spread[0], 'logprobs': spread[1], 'tail': np.maximum(tail, 0)})


def mean(metric):
  return float(metric.total / metric.count)


def test_all_tokens_are_the_dense_teacher(teacher, write):
  """To float32 rounding without the codec; with it, to what 10 bits change: log p moves by at most span / 1023."""
  names = {name: {} for name in top_k.TOP_K} | {'jensen_shannon': {'beta': 0.3}}
  recipe = build(write(VOCAB), **{name: base.top_k(name, **options) for name, options in names.items()})
  terms = {name: base.divergence(name, **options) for name, options in names.items()}
  theirs = distill.build(base.distill(teacher, tiny.data(), tiny.batch(), base.loss(**terms)), CONTEXT)
  batch, run = recipe.source.next(None, 0), learner(recipe)
  expected = learner(theirs)(batch.batch)
  exact, quantised = run(exactly(teacher, batch.batch, k=VOCAB)), run(batch)
  for name in [*names, 'cross_entropy']:
    assert mean(exact[2][name]) == pytest.approx(mean(expected[2][name]), rel=1e-4), name
    assert mean(quantised[2][name]) == pytest.approx(mean(expected[2][name]), rel=0.01), name
  supervised = batch.known['logprobs'][batch.batch.loss_mask > 0]
  assert gap(exact, expected) < 1e-4
  assert 1e-6 < gap(quantised, expected) < 3 * np.ptp(supervised, axis=-1).max() / 1023


def test_few_tokens_come_close_and_more_come_closer(teacher, write):
  expected, gaps = None, []
  for k in (4, 32, 128):
    recipe = build(write(k))
    batch = recipe.source.next(None, 0)
    expected = expected or learner(dense(teacher))(batch.batch)
    found = learner(recipe)(batch)
    assert batch.known['ids'].shape == (4, 32, k)
    assert found[0] < expected[0] * 1.001  # merging outcomes only loses information
    gaps.append(gap(found, expected))
  assert gaps[0] > 3 * gaps[1] > 3 * gaps[2] and gaps[1] < 0.1, gaps


def test_another_temperature(teacher, write):
  """A cache at T=2 is the dense divergence at T=2."""
  recipe = build(write(VOCAB, 2.0), kl=base.top_k('forward_kl', temperature=2.0, teacher_temperature=2.0))
  batch = recipe.source.next(None, 0)
  assert gap(learner(recipe)(batch), learner(dense(teacher, temperature=2.0))(batch.batch)) < 0.01


def garbled(batch, value):
  off = batch.batch.loss_mask == 0
  assert off.any()
  spoilt = {
      'ids': np.where(off[..., None], -7, batch.known['ids']),
      'logprobs': np.where(off[..., None], value, batch.known['logprobs']).astype(np.float32),
      'tail': np.where(off, value, batch.known['tail']).astype(np.float32),
  }
  return batch._replace(known=spoilt)


@pytest.mark.parametrize('chunk', [0, 13])
def test_what_stands_at_unsupervised_positions_means_nothing(chunk, write):
  made = section(write(4), kl=base.top_k(), back=base.top_k('reverse_kl', 0.5, policy='renormalise'))
  with made.loss.ignore_type():
    made.loss.head_chunk = chunk
  recipe = distill.build(made.to_dict(), CONTEXT)
  batch, run = recipe.source.next(None, 0), learner(recipe)
  expected = run(batch)
  for value in (5.0, -np.inf, np.nan):
    assert_equal(run(garbled(batch, value)), expected)


def test_microbatches_and_devices_change_nothing(write):
  recipe = build(write(16))
  batch = recipe.source.next(None, 0)
  expected = learner(recipe)(batch)
  assert gap(learner(recipe, microbatches=2)(batch), expected) < 1e-5
  mesh = jax.make_mesh((2, 2, 2), sharding.MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
  with jax.set_mesh(mesh):
    names = {'model': transformer.param_names(STUDENT)}
    placed = jax.device_put(params(), sharding.shardings(names, params(), mesh))
    assert gap(jax.device_get(learner(recipe)(sharding.shard_rows(batch, mesh), placed)), expected) < 1e-5


# The source.

def test_batches_are_those_of_the_plain_data_set(teacher, write):
  ours, plain = build(write(8)).source, dense(teacher).source
  for step in (0, 1, 5):
    batch = ours.next(None, step)
    assert isinstance(batch, CachedBatch)
    assert_equal(batch.batch, plain.next(None, step))


def test_a_source_continues_where_it_stopped(write):
  source = build(write(8)).source
  whole = [source.next(None, step) for step in range(9)]
  first = build(write(8)).source
  for step in range(4):
    first.next(None, step)
  second = build(write(8)).source
  second.set_state(first.get_state())
  for step in range(4, 9):
    assert_equal(second.next(None, step), whole[step])


def test_the_state_is_of_one_cache(write, teacher):
  state = build(write(8)).source.get_state()
  for other in (build(write(4)), dense(teacher)):
    with pytest.raises(ValueError, match='the state to resume from has data_hash'):
      other.source.set_state(state)


def test_every_host_reads_its_own_rows(write, monkeypatch):
  whole = build(write(8)).source.next(None, 2)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  parts = []
  for host in range(2):
    monkeypatch.setattr(jax, 'process_index', lambda host=host: host)
    parts.append(build(write(8)).source.next(None, 2))
  assert_equal(jax.tree.map(lambda *rows: np.concatenate(rows), *parts), whole)
  with pytest.raises(ValueError, match='batch_size 3 does not divide over 2 hosts'):
    made = section(write(8))
    made.batch.size = 3
    distill.build(made.to_dict(), CONTEXT)


# What does not fit.

def test_only_the_teacher_that_wrote_a_cache_may_stand_behind_it(teacher, write, tmp_path):
  other = tiny.write_model(tmp_path / 'other', TEACHER, seed=9)
  names = [checkpoints.load_model(folder).fingerprint for folder in (teacher, other)]
  with pytest.raises(schema.ConfigError, match=f"recipe.cache: .*teacher is '{names[0]}' there, '{names[1]}' here"):
    build(write(8), teacher=other)
  assert not build(write(8), teacher=teacher).frozen and not build(write(8)).frozen


def test_a_teacher_stays_for_the_terms_that_read_it(teacher, write):
  recipe = build(write(8), teacher=teacher, kl=base.top_k(), hidden=base.hidden())
  assert recipe.frozen['teacher'][0].num_layers == 2 and recipe.extra_params is not None
  assert isinstance(recipe.source.next(None, 0), CachedBatch)
  half = CONTEXT._replace(model=TransformerConfig(**{**vars(STUDENT), 'dtype': 'bfloat16'}))
  cast = build(write(8), teacher=teacher, hidden=base.hidden(), kl=base.top_k(), context=half)  # still the same one
  assert cast.frozen['teacher'][1]['embedding'].dtype == jnp.bfloat16


@pytest.mark.parametrize('change, message', [
    (dict(data=tiny.data(count=11)), r"data is '\w+' there, '\w+' here; fix: use the data"),
    (dict(kl=base.top_k(policy='zero', teacher_temperature=2.0)), r'temperature is 2\.0, the cache was made at 1; f'),
    (dict(kl=base.term('cross_entropy')), r"no term of loss\.terms \['cross_entropy', 'kl'\] reads config\.recipe\.c"),
    (dict(kl=base.divergence()), r"'divergence' needs a teacher; fix: kind 'top_k' reads a cached one"),
    (dict(kl=base.hidden()), r"'hidden' needs a teacher"),
])
def test_a_cache_that_does_not_fit_is_refused(change, message, write):
  with pytest.raises(schema.ConfigError, match=message):
    build(write(8), **change)


def test_a_cache_of_another_temperature_is_refused(write):
  with pytest.raises(schema.ConfigError, match=r'teacher_temperature is 1\.0, the cache was made at 2; fix: opt'):
    build(write(8, 2.0))


def test_a_cache_of_another_vocabulary_is_refused(write, tmp_path):
  tokenizer = tokenizers.load(chats.save_family(tmp_path, 'qwen2_5'))
  with pytest.raises(schema.ConfigError, match=r"tokenizer is 'byte' there, '\w+' here; data .*vocab_size is 258 the"):
    build(write(8), context=CONTEXT._replace(tokenizer=tokenizer))
  with pytest.raises(schema.ConfigError, match='the cache has 258 ids, the student rows for 200'):
    cached.check(distill.open_terms(
        schema.parse(distill.LossConfig, section('x').loss.to_dict(), 'loss'), STUDENT, None,
    ), cached.read_identity(write(8)), 200)


def test_a_term_without_its_cache_is_refused(teacher):
  with pytest.raises(schema.ConfigError, match=r"loss\.terms\.kl: kind 'top_k' reads a teacher cache; fix: recipe"):
    build('')
  recipe = base.on_policy_distill(teacher, tiny.data(), tiny.rollouts(), base.loss(kl=base.top_k()))
  with pytest.raises(schema.ConfigError, match=r"loss\.terms\.kl: kind 'top_k' reads a teacher cache; fix: recipe"):
    on_policy_distill.build(recipe.to_dict(), CONTEXT)


def test_what_is_missing_or_damaged_is_named(write, tmp_path):
  with pytest.raises(schema.ConfigError, match=r'config\.recipe\.cache: .*nowhere.manifest\.json does not exist'):
    build(str(tmp_path / 'nowhere'))
  folder = shutil.copytree(write(8), tmp_path / 'cut')
  path = sorted(folder.glob('shard-*'))[0]
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(schema.ConfigError, match=rf'config\.recipe\.cache: .*{path.name} has \d+ bytes, \d+ were'):
    build(str(folder))
  folder = shutil.copytree(write(8), tmp_path / 'spoilt')
  for path in folder.glob('shard-*'):
    raw = bytearray(path.read_bytes())
    raw[200] ^= 1
    path.write_bytes(raw)
  source = build(str(folder)).source
  with pytest.raises(ValueError, match=r"shard-\d+.array_record: example id='\d\+\d' is damaged: .*fix: delete"):
    for step in range(3):
      source.next(None, step)
  folder = shutil.copytree(write(8), tmp_path / 'unfinished')
  sorted(folder.glob('shard-*'))[-1].unlink()
  with pytest.raises(schema.ConfigError, match=r'shard-00002\.array_record is missing'):
    build(str(folder))


# Whole runs.

def run(recipe, workdir, **options):
  return train(tiny.train(recipe, **{'num_steps': 4, 'checkpoint_every': 2, **options}), workdir)


def test_a_run_on_a_cache_is_one_with_its_teacher(teacher, write, tmp_path, caplog):
  caplog.set_level('INFO', logger='srm_jax')
  ours = run(section(write(VOCAB)), tmp_path / 'ours')
  theirs = run(base.distill(teacher, tiny.data(), tiny.batch(), base.distillation()), tmp_path / 'theirs')
  assert ours.metrics[0]['kl'] == pytest.approx(theirs.metrics[0]['forward_kl'], rel=5e-3)
  moved = optax.tree.norm(jax.tree.map(lambda a, b: a - b, theirs.params, fresh(tmp_path)))
  apart = optax.tree.norm(jax.tree.map(lambda a, b: a - b, theirs.params, ours.params))
  assert apart < 0.05 * moved
  assert ours.metrics[-1]['flops'] < theirs.metrics[-1]['flops']  # the teacher's part
  assert 'cached teacher: 258 of 258 tokens at temperature 1' in caplog.text


def fresh(tmp_path):
  return run(base.sft(tiny.data(), tiny.batch()), tmp_path / 'fresh', num_steps=1, learning_rate=0.0).params


def test_a_stopped_run_continues_bit_for_bit(write, tmp_path):
  whole = run(section(write(8)), tmp_path / 'whole', microbatches=2)
  with tiny.stopped_after(3):
    run(section(write(8)), tmp_path / 'cut', microbatches=2)
  again = run(section(write(8)), tmp_path / 'cut', microbatches=2)
  assert again.step == 4
  assert_equal(jax.device_get(again.params), jax.device_get(whole.params))


def test_adapters_learn_from_a_cache(write, teacher, tmp_path):
  found = run(
      section(write(8)), tmp_path, adapters=base.adapters(2), init_from=teacher,
      model=dict(num_layers=2, vocab_size=VOCAB),
  )
  assert set(found.params) == {'adapters'} and found.metrics[0]['kl'] < 1e-3  # it starts as its own teacher


def test_a_cached_batch_is_shown(write):
  seen = inspection.inspect(tiny.train(section(write(8))), rows=2)
  assert set(seen.scores) == {'student'} and isinstance(seen.sequences, CachedBatch)
  page = inspection.render(seen, 'cached')
  assert 'cached teacher' in page and '8 of 258 tokens' in page


def test_a_plan_knows_the_shapes(write, teacher):
  recipe = section(write(8)).to_dict()
  abstract, real = plan.RECIPES['distill'](recipe, STUDENT), build(write(8)).source.next(None, 0)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), tree)
  assert shapes(abstract.batch) == shapes(real) and not abstract.frozen
  kept = section(write(8), teacher=teacher, kl=base.top_k(), hidden=base.hidden()).to_dict()
  assert set(plan.RECIPES['distill'](kept, STUDENT).frozen) == {'teacher'}
  with pytest.raises(schema.ConfigError, match="kind 'top_k' reads a teacher cache"):
    plan.RECIPES['distill'](section('').to_dict(), STUDENT)
  assert isinstance(plan.RECIPES['distill'](section('', kl=base.term('cross_entropy')).to_dict(), STUDENT).batch, Batch)


def test_contents_may_come_under_other_names(write, tmp_path):
  """The identity is of ids and contents; an example is looked up by its content."""
  cache = teacher_cache.open_cache(write(8), teacher_cache.identity_of(write(8)))
  source = build(write(8)).source
  batch = source.next(None, 0)
  rows = np.concatenate([cache[name].ids for name in cache])
  found = batch.known['ids'][batch.batch.loss_mask > 0]
  assert {tuple(row) for row in found} <= {tuple(row) for row in rows}
