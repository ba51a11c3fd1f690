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
from srm_jax.losses.distillation import WHOLE_VOCABULARY
from srm_jax.models import heads, transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import distill, policy_gradient, sft
from srm_jax.train_step import build_train_step, combine, init_state, split_microbatches, value_and_grad
from srm_jax.types import Max, Mean, Objective
from tests import tiny
from tests.recipes import every_term

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


def packed_and_padded():
  """Six examples in two or three rows, and one a row; both in eight rows, so that one program does."""
  rng = np.random.default_rng(4)
  examples = [
      packing.from_prompt_completion(str(i), rng.integers(1, 64, 2), rng.integers(1, 64, 1 + i), 0) for i in range(6)
  ]
  bins = packing.plan([len(example.tokens) for example in examples], 16)
  packed, padded = packing.pack(examples, bins, 16), packing.pad_batch(examples, 16)
  assert len(packed.inputs) < len(padded.inputs)
  return [jax.tree.map(lambda x: np.pad(x, ((0, 8 - len(x)), (0, 0))), batch) for batch in (packed, padded)]


def test_packing_changes_nothing(setting):
  params, _, frozen = setting['sft']
  packed, padded = (program('sft', 1)(params, batch, frozen, jax.random.key(0)) for batch in packed_and_padded())
  assert_same(packed, padded, 1e-6)


# Every term of a distillation loss, alone and in their sum: rows and masks are ragged, chunks do not divide.

TERMS = list(every_term.TERMS)
SPLIT = [name for name in TERMS if name not in every_term.of_kinds('alignment')]  # the others see the whole batch


@pytest.fixture(scope='module')
def every():
  return every_term.setting()


def assert_each_same(names, actual, expected):
  """Two functions of a selector agree in every one of these terms, and in their sum."""
  for chosen in [*((name,) for name in names), names]:
    selector = every_term.selected(TERMS, *chosen)
    found, (loss, grads, metrics) = actual(selector), expected(selector)
    assert_same(found, (loss, grads, {name: value for name, value in metrics.items() if name in found[2]}), 1e-5)


@pytest.fixture(scope='module')
def whole(every):
  """selector -> what one device finds in one part, from all logits at once."""
  run = every_term.program(TERMS, chunk=0)
  return lambda selector: run(selector, every[0], every[2], every[1])


@pytest.mark.parametrize('microbatches', [2, 4])
def test_microbatches_change_no_term(every, whole, microbatches):
  params, teacher, record = every
  parts = split_microbatches(record, microbatches)
  tokens = np.asarray(parts.batch.loss_mask.sum(2))
  for rows in (np.ones_like(parts.sampled), parts.sampled, 1 - parts.sampled):
    assert len(set((tokens * np.asarray(rows)).sum(1))) > 1  # or counts of a microbatch, averaged, would pass as well
  run = every_term.program(SPLIT, microbatches=microbatches, chunk=24)
  assert_each_same(SPLIT, lambda selector: run(selector, params, record, teacher), whole)


def place(params, teacher, record, mesh):
  """Parameters, teacher's and rows on a mesh."""
  projectors = jax.tree.map(lambda _: jax.sharding.PartitionSpec(), params['projectors'])
  names = {'model': transformer.param_names(every_term.STUDENT), 'projectors': projectors}
  put = lambda names, tree: jax.device_put(tree, sharding.shardings(names, tree, mesh))
  return (
      put(names, params), put(transformer.param_names(every_term.TEACHER), teacher), sharding.shard_rows(record, mesh),
  )


def test_eight_devices_change_no_term(every, whole):
  names, mesh = [name for name in TERMS if name not in WHOLE_VOCABULARY], sharding.make_mesh((2, 2, 2))
  with jax.set_mesh(mesh):
    placed, frozen, rows = place(*every, mesh)
    assert not placed['model']['layers']['mlp']['up']['kernel'].sharding.is_fully_replicated
    run = every_term.program(names, chunk=24)
    assert_each_same(names, lambda selector: run(selector, placed, rows, frozen), whole)


def test_divergences_of_the_whole_vocabulary_need_it_on_one_device(every, whole):
  mesh, names = sharding.make_mesh((2, 4, 1)), ['cross_entropy', *sorted(WHOLE_VOCABULARY)]
  with jax.set_mesh(mesh):
    placed, frozen, rows = place(*every, mesh)
    run = every_term.program(names, chunk=24)
    assert_each_same(names, lambda selector: run(selector, placed, rows, frozen), whole)
  with jax.set_mesh(sharding.make_mesh((2, 2, 2))):
    with pytest.raises(ValueError, match="adaptive_kl sorts the whole vocabulary and cannot run with it split"):
      every_term.program(names)(every_term.selected(names), placed, rows, frozen)


def test_packing_changes_no_term(every):
  params, teacher, _ = every
  packed, padded = packed_and_padded()
  names = [name for name in TERMS if name not in every_term.of_kinds('policy')]
  run = every_term.program(names, rows='data')
  on = lambda batch: lambda selector: run(selector, params, batch, teacher)
  assert_each_same(names, on(packed), on(padded))


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


def test_microbatches_keep_groups_side_by_side_where_they_can():
  parts = split_microbatches(np.arange(12), 3, group=2)
  np.testing.assert_array_equal(parts, [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]])
  np.testing.assert_array_equal(split_microbatches(np.arange(8), 4, group=4), [[0, 1], [2, 3], [4, 5], [6, 7]])
  np.testing.assert_array_equal(split_microbatches(np.arange(6), 2, group=2), [[0, 2, 4], [1, 3, 5]])


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
