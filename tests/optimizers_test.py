"""Which parameter goes to which optimizer, what each does to it, and schedules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from configs import base
from srm_jax import optimizers, schema
from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig

MODEL = TransformerConfig(32, 2, 16, 2, 1, 8, 24, tie_embeddings=False, qkv_bias=True, qk_norm=True)
NAMES = {'model': transformer.param_names(MODEL), 'projectors': {'0': PartitionSpec()}}
MATRICES = {'q', 'k', 'v', 'out', 'gate', 'up', 'down'}


def config(name='muon', **options):
  fixed = dict(learning_rate=0.1, matrix_learning_rate=0.5, schedule='constant', warmup_steps=0, clip_norm=0.0)
  return schema.parse(optimizers.OptimizerConfig, base.optimizer(name, **(fixed | options)), 'optimizer')


def paths(tree, **options):
  leaves = jax.tree_util.tree_leaves_with_path(tree, **options)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


@pytest.fixture(scope='module')
def params():
  model = transformer.abstract_params(MODEL)
  unboxed = jax.tree.map(lambda box: box.value, model, is_leaf=lambda x: hasattr(x, 'value'))
  shapes = jax.tree.map(lambda x: x.shape, unboxed)
  rng = np.random.default_rng(0)
  draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {
      'model': jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple)), 'projectors': {'0': draw((16, 8))},
  }


@pytest.fixture(scope='module')
def muon_updates(params):
  """First updates of Muon for gradients equal to the parameters: {path: array}."""
  tx = optimizers.make_optimizer(config(weight_decay=0.0), 10, NAMES)
  return paths(jax.jit(lambda grads: tx.update(grads, tx.init(grads), grads)[0])(params))


def test_muon_takes_block_matrices_and_nothing_else():
  is_leaf = lambda x: x is None or not isinstance(x, dict)
  taken = {path for path, leaf in paths(optimizers.muon_dimensions(NAMES), is_leaf=is_leaf).items() if leaf is not None}
  every = set(paths(NAMES, is_leaf=lambda x: isinstance(x, PartitionSpec)))
  expected = {path for path in every if path.endswith('kernel') and path.split('/')[-2] in MATRICES}
  assert taken == expected and len(expected) == 7
  left = {path.split('/', 1)[1] for path in every - taken}
  known = {'embedding', 'head', 'final_norm/scale', '0', 'layers/attention/q/bias', 'layers/attention/q_norm/scale'}
  assert known <= left


def test_first_updates_show_the_partition(params, muon_updates):
  """Adam's first update has one size everywhere, Muon's has not."""
  for path, update in muon_updates.items():
    sizes = np.abs(update)
    if path.split('/')[-2] in MATRICES and path.endswith('kernel'):
      assert sizes.max() > 2 * sizes.min(), path
    else:
      np.testing.assert_allclose(update, -sizes.max() * jnp.sign(paths(params)[path]), rtol=1e-4, err_msg=path)
      assert 0.1 <= sizes.max() < 0.2, path  # the learning rate, and what Nesterov's form adds to the first step


@pytest.mark.parametrize('path, inputs', [
    ('attention/q', 16), ('attention/k', 16), ('attention/out', 16), ('mlp/gate', 16), ('mlp/down', 24),
])
def test_stacked_layers_are_orthogonalised_one_by_one(params, muon_updates, path, inputs):
  path = f'model/layers/{path}/kernel'
  stacked, update = paths(params)[path], muon_updates[path]
  tx = optax.contrib.muon(0.5, adam_b2=0.95)
  for layer in range(MODEL.num_layers):
    matrix = stacked[layer].reshape(inputs, -1)
    alone = tx.update({'w': matrix}, tx.init({'w': matrix}), {'w': matrix})[0]['w']
    np.testing.assert_allclose(update[layer].reshape(inputs, -1), alone, rtol=1e-4, atol=1e-5)
    scale = 0.5 * max(1, matrix.shape[1] / matrix.shape[0]) ** 0.5
    singular = np.linalg.svd(np.asarray(alone), compute_uv=False) / scale
    assert singular.max() < 1.3 and np.median(singular) > 0.6  # five Newton-Schulz steps come this near to 1


def rates(schedule, steps=10, **options):
  curve = optimizers.schedule(config(schedule=schedule, **options), 2.0, steps)
  return [float(curve(step)) for step in range(steps + 1)]


def test_schedules():
  assert rates('constant', warmup_steps=4) == [0.0, 0.5, 1.0, 1.5] + [2.0] * 7
  np.testing.assert_allclose(rates('linear', warmup_steps=2), [0, 1, *np.linspace(2, 0, 9)], atol=1e-6)
  np.testing.assert_allclose(rates('cosine')[::5], [2.0, 1.0, 0.0], atol=1e-6)
  for name in optimizers.SCHEDULES:
    curve = rates(name, warmup_steps=3)
    assert curve[0] == 0 and max(curve) == curve[3] == 2.0, name


@pytest.fixture(scope='module')
def toy():
  return {'kernel': jnp.full((2, 2), 2.0), 'norm': {'scale': jnp.ones(2)}, 'bias': jnp.ones(2)}


def toy_update(toy, grads, **options):
  names = jax.tree.map(lambda _: PartitionSpec(), toy)
  tx = optimizers.make_optimizer(config('adamw', **options), 10, names)
  return tx.update(grads, tx.init(toy), toy)


def test_weight_decay_spares_norms_and_biases(toy):
  updates, _ = toy_update(toy, jax.tree.map(jnp.zeros_like, toy), weight_decay=0.3)
  np.testing.assert_allclose(updates['kernel'], -0.1 * 0.3 * 2.0, rtol=1e-6)
  assert not updates['norm']['scale'].any() and not updates['bias'].any()


@pytest.mark.parametrize('clip_norm, expected', [(2.0, 2.0), (100.0, 5.0), (0.0, 5.0)])
def test_gradients_are_clipped_by_their_global_norm(toy, clip_norm, expected):
  grads = {
      'kernel': jnp.array([[3.0, 0.0], [0.0, 0.0]]), 'norm': {'scale': jnp.array([0.0, 4.0])}, 'bias': jnp.zeros(2),
  }
  _, state = toy_update(toy, grads, clip_norm=clip_norm)
  momentum = optax.tree_utils.tree_get(state, 'mu')
  np.testing.assert_allclose(optax.tree.norm(momentum) / (1 - 0.9), expected, rtol=1e-5)


@pytest.mark.parametrize('options, message', [
    ({'name': 'muonn'}, r"optimizer 'muonn' unknown \(did you mean 'muon'\?\)"),
    ({'schedule': 'cosin'}, r"schedule 'cosin' unknown \(did you mean 'cosine'\?\)"),
])
def test_unknown_names(options, message):
  with pytest.raises(schema.ConfigError, match=message):
    optimizers.make_optimizer(dataclasses.replace(config(), **options), 10, NAMES)


@pytest.mark.parametrize('name', optimizers.OPTIMIZERS)
def test_every_optimizer_descends(name):
  params = {'layers': {'kernel': jnp.eye(4)[None] * 2}, 'bias': jnp.ones(3)}
  names = {'layers': {'kernel': PartitionSpec('layers', 'embed', 'mlp')}, 'bias': PartitionSpec('mlp')}
  tx = optimizers.make_optimizer(config(name, learning_rate=0.02, matrix_learning_rate=0.02), 10, names)
  loss = lambda params: sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
  updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
  assert loss(optax.apply_updates(params, updates)) < loss(params)
