"""The step's loss and gradient do not depend on microbatches, devices or packing; a bad step changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from srm_jax import schema, sharding
from srm_jax.data import packing
from srm_jax.models import heads, transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import distill, policy_gradient, sft
from srm_jax.train_step import build_train_step, combine, init_state, split_microbatches, value_and_grad
from srm_jax.types import Max, Mean, Objective
from tests import tiny

STUDENT = TransformerConfig(64, 1, 16, 2, 2, 8, 32)
TEACHER = TransformerConfig(64, 1, 32, 4, 2, 8, 32, tie_embeddings=False)


def distillation():
  section = base.distillation('jensen_shannon', cross_entropy=0.3, hidden_weight=0.5, feature='fitnets', beta=0.3)
  return distill.objective(schema.parse(distill.LossConfig, section, 'loss'), STUDENT, TEACHER)


def reinforcement():
  section = base.grpo(tiny.data(), tiny.rollouts())
  return policy_gradient.objective(schema.parse(policy_gradient.PolicyGradientConfig, section, 'recipe'), STUDENT)


OBJECTIVES = {
    'sft': lambda: sft.objective(STUDENT, head_chunk=None), 'distill': distillation, 'policy_gradient': reinforcement,
}
NAMES = {
    'model': transformer.param_names(STUDENT), 'projectors': {'hidden': {'0': jax.sharding.PartitionSpec()}},
}
TEACHER_NAMES = transformer.param_names(TEACHER)


@pytest.fixture(scope='module', autouse=True)
def exact_products():
  with jax.default_matmul_precision('highest'):
    yield


@pytest.fixture(scope='module')
def setting():
  """{objective: (params, batch, frozen)}."""
  init = jax.jit(transformer.init_params, static_argnums=0)
  student, teacher = init(STUDENT, jax.random.key(1)), init(TEACHER, jax.random.key(2))
  projectors = {'hidden': {'0': heads.init_projector(jax.random.key(3), 16, 32)}}
  params, batch, rollouts = {'model': student}, tiny.random_batch(), tiny.random_rollouts()
  return {
      'sft': (params, batch, {}),
      'distill': (params | {'projectors': projectors}, batch, {'teacher': teacher}),
      'policy_gradient': (params, rollouts, {}),
  }


@functools.cache
def program(name, microbatches):
  """The jitted value_and_grad of an objective, without a mesh."""
  return jax.jit(functools.partial(value_and_grad, OBJECTIVES[name](), microbatches=microbatches))


def assert_same(actual, expected, tolerance):
  """Losses, gradients and metrics agree to a relative tolerance; gradients by the norm of their difference."""
  np.testing.assert_allclose(actual[0], expected[0], rtol=tolerance)
  norm = optax.tree.norm(expected[1])
  assert norm > 1e-3
  gap = jax.tree.map(jnp.subtract, jax.device_get(actual[1]), jax.device_get(expected[1]))
  assert optax.tree.norm(gap) < tolerance * norm
  assert actual[2].keys() == expected[2].keys()
  for key, value in expected[2].items():
    for left, right in zip(actual[2][key], value, strict=True):
      np.testing.assert_allclose(left, right, rtol=10 * tolerance, atol=tolerance, err_msg=key)


@pytest.mark.parametrize('name, microbatches', [('sft', 2), ('sft', 4), ('distill', 4), ('policy_gradient', 4)])
def test_microbatches_change_nothing_on_ragged_masks(setting, name, microbatches):
  params, batch, frozen = setting[name]
  mask = getattr(batch, 'batch', batch).loss_mask
  assert len(set(mask[:microbatches].sum(1))) > 1  # or averaging over microbatches would pass as well
  key = jax.random.key(0)
  split, whole = (program(name, parts)(params, batch, frozen, key) for parts in (microbatches, 1))
  assert_same(split, whole, 1e-6)


@pytest.mark.parametrize('name', OBJECTIVES)
def test_eight_devices_give_the_numbers_of_one(setting, name):
  params, batch, frozen = setting[name]
  expected = program(name, 1)(params, batch, frozen, jax.random.key(0))
  mesh = sharding.make_mesh((2, 2, 2))
  with jax.set_mesh(mesh):
    names = {key: NAMES[key] for key in params}
    placed = jax.device_put(params, sharding.shardings(names, params, mesh))
    teachers = {
        key: jax.device_put(tree, sharding.shardings(TEACHER_NAMES, tree, mesh)) for key, tree in frozen.items()
    }
    step = jax.jit(functools.partial(value_and_grad, OBJECTIVES[name](), microbatches=2 if name == 'sft' else 1))
    actual = step(placed, sharding.shard_rows(batch, mesh), teachers, jax.random.key(0))
  assert len(placed['model']['embedding'].sharding.device_set) == 8
  assert not placed['model']['layers']['mlp']['up']['kernel'].sharding.is_fully_replicated
  assert_same(actual, expected, 2e-6)


def test_packing_changes_nothing(setting):
  params, _, frozen = setting['sft']
  rng = np.random.default_rng(4)
  examples = [
      packing.from_prompt_completion(str(i), rng.integers(1, 64, 2), rng.integers(1, 64, 1 + i), 0) for i in range(6)
  ]
  bins = packing.plan([len(example.tokens) for example in examples], 16)
  packed, padded = packing.pack(examples, bins, 16), packing.pad_batch(examples, 16)
  assert len(packed.inputs) < len(padded.inputs)
  eight_rows = lambda batch: jax.tree.map(lambda x: np.pad(x, ((0, 8 - len(x)), (0, 0))), batch)
  run = lambda batch: program('sft', 1)(params, eight_rows(batch), frozen, jax.random.key(0))
  assert_same(run(packed), run(padded), 1e-6)


def square():
  """loss = mean of weight * (w - x)^2 over x; exact by hand, quick to compile. Its metric is the largest x."""

  def terms(params, batch, frozen, rng):
    del frozen, rng
    return {'square': (0.5, jnp.sum(jnp.square(params['w'] - batch)))}, {'largest': Max(jnp.max(batch))}

  return Objective(terms, lambda batch: {'square': jnp.asarray(batch.size)}, {})


def test_loss_is_the_sum_of_weighted_totals_over_counts():
  loss, grads, metrics = value_and_grad(square(), {'w': jnp.float32(1.0)}, jnp.array([0.0, 3.0]), {}, jax.random.key(0))
  assert loss == 0.5 * (1 + 4) / 2
  assert grads['w'] == 0.5 * (2 - 4) / 2
  assert metrics['loss/square'].total / metrics['loss/square'].count == 2.5
  assert metrics['largest'] == Max(3.0)


def test_a_term_without_a_count_is_refused():
  objective = square()._replace(denominators=lambda batch: {})
  with pytest.raises(ValueError, match=r"\['square'\].*not both"):
    value_and_grad(objective, {'w': jnp.float32(1.0)}, jnp.ones(2), {}, jax.random.key(0))


def test_every_microbatch_has_its_own_key():
  def terms(params, batch, frozen, rng):
    del frozen
    return {'noise': (1.0, params['w'] * jax.random.normal(rng) * jnp.sum(batch))}, {}

  noise = Objective(terms, lambda batch: {'noise': jnp.asarray(1.0)}, {})
  grads = value_and_grad(noise, {'w': jnp.float32(1.0)}, jnp.ones(2), {}, jax.random.key(0), microbatches=2)[1]
  key = jax.random.key(0)
  expected = sum(jax.random.normal(jax.random.fold_in(key, i)) for i in range(2))
  np.testing.assert_allclose(grads['w'], expected, rtol=1e-6)


def test_microbatches_are_strided():
  parts = split_microbatches(np.arange(6), 2)
  np.testing.assert_array_equal(parts, [[0, 2, 4], [1, 3, 5]])
  with pytest.raises(ValueError, match='6 rows do not divide into 4 microbatches'):
    split_microbatches(np.arange(6), 4)


def test_combine_adds_means_and_keeps_the_larger_maximum():
  both = combine({'a': Mean(1.0, 2.0), 'b': Max(3.0)}, {'a': Mean(4.0, 1.0), 'b': Max(-1.0)})
  assert both == {'a': Mean(5.0, 3.0), 'b': Max(3.0)}


@pytest.fixture(scope='module')
def step():
  return jax.jit(build_train_step(square(), optax.adam(0.1), ema_decay=0.75))


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing(step, bad):
  state = init_state({'w': jnp.float32(1.0)}, optax.adam(0.1), ema=True)
  state = step(state, jnp.array([5.0, 5.0]), {}, jax.random.key(0))[0]._replace(ema={'w': jnp.float32(9.0)})
  after, metrics = step(state, jnp.array([1.0, bad]), {}, jax.random.key(0))
  assert metrics['finite'].total == 0
  jax.tree.map(np.testing.assert_array_equal, after, state)
  later, metrics = step(after, jnp.array([1.0, 2.0]), {}, jax.random.key(0))
  assert metrics['finite'].total == 1
  assert later.step == after.step + 1 and later.params['w'] != after.params['w']


def test_average_follows_the_parameters(step):
  state = init_state({'w': jnp.float32(1.0)}, optax.adam(0.1), ema=True)
  after, _ = step(state, jnp.array([5.0, 5.0]), {}, jax.random.key(0))
  np.testing.assert_allclose(after.params['w'], 1.1, rtol=1e-5)
  np.testing.assert_allclose(after.ema['w'], 0.75 * 1.0 + 0.25 * after.params['w'], rtol=1e-6)
  assert init_state(state.params, optax.adam(0.1)).ema is None


def test_state_keeps_its_types_so_that_nothing_compiles_twice(step):
  state = init_state({'w': jnp.float32(1.0)}, optax.adam(0.1), ema=True)
  after, _ = jax.eval_shape(step, state, jnp.ones(2), {}, jax.random.key(0))
  describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), jax.eval_shape(lambda: tree))
  assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), after) == describe(state)
