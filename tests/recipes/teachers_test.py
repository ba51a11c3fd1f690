"""Several teachers: whose weight is where, routing by domain, mixtures against plain formulas, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from srm_jax import schema, sharding
from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import distill, teachers
from srm_jax.train_step import value_and_grad
from tests import tiny
from tests.recipes import dense

STUDENT = TransformerConfig(64, 1, 16, 2, 2, 8, 32)
TEACHERS = {
    'teacher/a': TransformerConfig(72, 1, 24, 2, 1, 12, 32, tie_embeddings=False),  # padded to other sizes
    'teacher/b': TransformerConfig(64, 2, 16, 2, 2, 8, 32),
}
SOURCES = ('math', 'law')


def section(**weights):
  return {name: dict(folder=f'runs/{name}', weight=weight) for name, weight in weights.items()}


@pytest.mark.parametrize('given, sources, table', [
    (section(b=3, a=1.0), (), [[1, 3]]),
    (section(a=1, b=2), SOURCES, [[1, 2], [1, 2]]),
    (section(a={'math': 1.0}, b={'law': 2.0, 'math': 0.5}), SOURCES, [[1, 0.5], [0, 2]]),
])
def test_weights_by_source(given, sources, table):
  np.testing.assert_array_equal(teachers.weights(given, sources), np.array(table, np.float32))


def test_folders_have_names():
  assert teachers.folders('runs/a') == {'teacher': 'runs/a'} and teachers.folders('') == {}
  assert teachers.folders(section(b=1, a=1)) == {'teacher/a': 'runs/a', 'teacher/b': 'runs/b'}
  assert teachers.weights('runs/a', SOURCES) is None


@pytest.mark.parametrize('given, sources, message', [
    (section(a={'physics': 1}), SOURCES, "part of data.mix 'physics' unknown"),
    (section(a=-1), (), 'expected numbers from 0 on'), (section(a=True), (), 'expected numbers'),
    (section(a='much'), (), 'expected numbers'), (section(a=0, b=0), (), 'no teacher has a weight on the data'),
    (section(a={'law': 1}), SOURCES, 'no teacher has a weight on math'), ({}, (), 'expected a folder'),
    (None, (), 'expected a folder'), ({'a': {'folder': 'x'}}, (), 'weight is missing'),
])
def test_sections_that_cannot_be_are_refused(given, sources, message):
  with pytest.raises(schema.ConfigError, match=message):
    teachers.weights(given, sources)


@pytest.fixture(scope='module')
def setting():
  """(student's params, {teacher: params}, batch of two sources, a segment of the second in every row)."""
  init = jax.jit(transformer.init_params, static_argnums=0)
  params, *theirs = (
      jax.tree.map(lambda x: 1.5 * x, init(config, jax.random.key(i)))
      for i, config in enumerate((STUDENT, *TEACHERS.values()))
  )
  batch = tiny.random_batch()
  sources = (np.arange(16) >= 8).astype(np.int32) * np.ones((8, 1), np.int32)
  return {'model': params}, dict(zip(TEACHERS, theirs)), batch._replace(sources=sources)


def gradient_of(setting, loss, table, sources=(), **options):
  params, frozen, batch = setting
  given = teachers.Teachers(TEACHERS, np.array(table, np.float32))
  objective = distill.objective(schema.parse(distill.LossConfig, loss, 'loss'), STUDENT, given, sources=sources)
  run = jax.jit(lambda p: value_and_grad(objective, p, batch, frozen, jax.random.key(0), **options))
  return run(params)


def assert_same(found, expected):
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
  difference = optax.tree.norm(jax.tree.map(jnp.subtract, found[1], expected[1]))
  assert difference < 1e-5 * optax.tree.norm(expected[1])


def chunked(loss):
  loss.head_chunk = 24
  return loss


def test_a_mixture_is_its_plain_formula(setting):
  params, frozen, batch = setting
  table = np.array([[1.0, 3.0], [2.0, 0.0]], np.float32)
  shares = (table / table.sum(1, keepdims=True))[batch.sources]
  logits = [dense.outputs(TEACHERS[name], frozen[name], batch, ())[0][..., :64] for name in TEACHERS]
  mixed = jnp.log(sum(shares[..., k, None] * jax.nn.softmax(one) for k, one in enumerate(logits)))

  def plain(params):
    ours = jax.nn.log_softmax(dense.outputs(STUDENT, params['model'], batch, ())[0])
    values = jnp.sum(jnp.exp(mixed) * (mixed - ours), axis=-1)
    return jnp.sum(values * batch.loss_mask) / jnp.sum(batch.loss_mask)

  found = gradient_of(setting, chunked(base.distillation()), table, SOURCES)
  assert_same(found, jax.jit(jax.value_and_grad(plain))(params))


def test_routing_is_each_teacher_on_its_own_rows(setting):
  """Weights of 0 and 1 give the sum of two losses, each of one teacher on the tokens of one source."""
  params, frozen, batch = setting
  routed = gradient_of(setting, chunked(base.distillation()), np.eye(2), SOURCES)
  tokens = np.array([(batch.loss_mask * (batch.sources == source)).sum() for source in (0, 1)])
  parts = []
  for source, name, count in zip(SOURCES, TEACHERS, tokens):
    loss = base.loss(kl=base.divergence(rows=source))
    objective = distill.objective(
        schema.parse(distill.LossConfig, loss, 'loss'), STUDENT, TEACHERS[name], sources=SOURCES
    )
    found = jax.jit(lambda p, objective=objective, name=name: value_and_grad(
        objective, p, batch, {'teacher': frozen[name]}, jax.random.key(0)))(params)
    parts.append(jax.tree.map(lambda x, share=count / tokens.sum(): share * x, found[:2]))
  assert_same(routed, jax.tree.map(jnp.add, *parts))


def test_microbatches_and_meshes_change_nothing(setting):
  params, frozen, batch = setting
  loss, table = chunked(base.distillation('reverse_kl', cross_entropy=0.5)), [[1.0, 3.0], [2.0, 1.0]]
  whole = gradient_of(setting, loss, table, SOURCES)
  assert_same(gradient_of(setting, loss, table, SOURCES, microbatches=4), whole)
  mesh = sharding.make_mesh((2, 2, 2))
  with jax.set_mesh(mesh):
    place = lambda config, tree: jax.device_put(
        tree, sharding.shardings(transformer.param_names(config), tree, mesh)
    )
    placed = (
        {'model': place(STUDENT, params['model'])}, {name: place(TEACHERS[name], frozen[name]) for name in TEACHERS},
        sharding.shard_rows(batch, mesh),
    )
    assert_same(gradient_of(placed, loss, table, SOURCES), whole)


@pytest.mark.parametrize('terms, message', [
    (dict(h=base.hidden()), 'compares layers with those of one teacher'),
    (dict(kl=base.divergence(rows='physics')), "rows 'physics' unknown"),
])
def test_terms_that_cannot_have_several_teachers(terms, message):
  given = teachers.Teachers(TEACHERS, np.ones((1, 2), np.float32))
  with pytest.raises(schema.ConfigError, match=message):
    distill.open_terms(schema.parse(distill.LossConfig, base.loss(**terms), 'loss'), STUDENT, given, sources=SOURCES)
