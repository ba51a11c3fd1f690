import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec as P
from jax.test_util import check_grads

from srm_jax.losses import distillation
from srm_jax.losses.distillation import DIVERGENCES, WHOLE_VOCABULARY

STUDENT = jnp.array([2.0, 1.0, 0.0, -1.0])
TEACHER = jnp.array([1.0, 2.0, 0.5, -0.5])
FORWARD_GRADIENT = np.array([0.424035, -0.360812, -0.046219, -0.017003])
REVERSE_GRADIENT = np.array([0.420199, -0.319183, -0.073849, -0.027167])

GOLDEN = [
    ('forward_kl', {}, 0.3945426878),
    ('reverse_kl', {}, 0.4219152477),
    ('jensen_shannon', {'beta': 0.1}, 0.0352434973),
    ('jensen_shannon', {'beta': 0.5}, 0.0980126077),
    ('jensen_shannon', {'beta': 0.9}, 0.0371203895),
    ('jensen_shannon', {'beta': 0}, 0.3945426878),
    ('jensen_shannon', {'beta': 1}, 0.4219152477),
    ('skew_kl', {'alpha': 0.1}, 0.3153557051),
    ('skew_kl', {'alpha': 0.5}, 0.1010248936),
    ('skew_kl', {'alpha': 0}, 0.3945426878),
    ('skew_reverse_kl', {'alpha': 0.1}, 0.3273189817),
    ('skew_reverse_kl', {'alpha': 0.5}, 0.0950003218),
    ('skew_reverse_kl', {'alpha': 0}, 0.4219152477),
    ('total_variation', {}, 0.4240346182),
    ('adaptive_kl', {'mu': 0.5}, 0.4102695611),
]


def random_logits(shape=(2, 3, 8)):
  student, teacher = jax.random.normal(jax.random.key(0), (2, *shape)) * 2
  return student, teacher


@pytest.mark.parametrize('name, options, value', GOLDEN)
def test_golden_values(name, options, value):
  np.testing.assert_allclose(DIVERGENCES[name](STUDENT, TEACHER, **options), value, atol=1e-6)


def test_every_divergence_has_a_golden_value():
  assert {name for name, _, _ in GOLDEN} == set(DIVERGENCES)


def test_golden_gradients():
  weight = 0.4254511317
  expected = {
      'forward_kl': FORWARD_GRADIENT,
      'reverse_kl': REVERSE_GRADIENT,
      'adaptive_kl': weight * FORWARD_GRADIENT + (1 - weight) * REVERSE_GRADIENT,
  }
  for name, gradient in expected.items():
    np.testing.assert_allclose(jax.grad(DIVERGENCES[name])(STUDENT, TEACHER), gradient, atol=1e-6)


# The weight of adaptive_kl is detached, so differences are not its gradient; its golden gradient is above.
@pytest.mark.parametrize('name', sorted(DIVERGENCES.keys() - {'adaptive_kl'}))
def test_gradient_matches_finite_differences(name):
  divergence = functools.partial(DIVERGENCES[name], teacher_logits=TEACHER)
  check_grads(divergence, (STUDENT,), order=1, modes=['rev'], atol=2e-3, rtol=2e-3, eps=1e-2)


@pytest.mark.parametrize('name', DIVERGENCES)
def test_contract(name):
  student, teacher = random_logits()
  divergence = DIVERGENCES[name]
  values = divergence(student, teacher)
  assert values.shape == (2, 3) and np.all(values > 0)
  np.testing.assert_allclose(divergence(student, student), jnp.zeros((2, 3)), atol=1e-6)
  np.testing.assert_allclose(divergence(student + 7, teacher - 3), values, rtol=1e-4)
  assert divergence(student.astype(jnp.bfloat16), teacher.astype(jnp.bfloat16)).dtype == jnp.float32
  gradient = jax.grad(lambda x: divergence(x, x).sum())(student)
  np.testing.assert_allclose(gradient, jnp.zeros_like(student), atol=1e-5)


@pytest.mark.parametrize('name', DIVERGENCES)
def test_teacher_receives_no_gradient(name):
  gradient = jax.grad(DIVERGENCES[name], argnums=1)(STUDENT, TEACHER)
  np.testing.assert_array_equal(gradient, jnp.zeros(4))


@pytest.mark.parametrize('name', DIVERGENCES)
def test_temperature_divides_both_logits_and_scales_nothing(name):
  divergence = DIVERGENCES[name]
  value, gradient = jax.value_and_grad(divergence)(STUDENT, TEACHER, temperature=2.0)
  halved_value, halved_gradient = jax.value_and_grad(divergence)(STUDENT / 2, TEACHER / 2)
  np.testing.assert_allclose(value, halved_value, rtol=1e-6)
  np.testing.assert_allclose(gradient, halved_gradient / 2, atol=1e-6)


@pytest.mark.parametrize('name', DIVERGENCES)
def test_certain_and_contradicting_distributions_stay_finite(name):
  student, teacher = jnp.array([300.0, 0.0, -300.0]), jnp.array([-300.0, 0.0, 300.0])
  value, gradient = jax.value_and_grad(DIVERGENCES[name])(student, teacher)
  assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_jensen_shannon_approaches_scaled_kls_and_is_symmetric():
  small = 1e-3
  jensen_shannon = distillation.jensen_shannon
  np.testing.assert_allclose(jensen_shannon(STUDENT, TEACHER, beta=small) / small, 0.3945426878, rtol=5e-3)
  np.testing.assert_allclose(jensen_shannon(STUDENT, TEACHER, beta=1 - small) / small, 0.4219152477, rtol=5e-3)
  np.testing.assert_allclose(
      jensen_shannon(STUDENT, TEACHER, beta=0.2), jensen_shannon(TEACHER, STUDENT, beta=0.8), rtol=1e-6
  )


def test_total_variation_is_one_on_disjoint_supports():
  value = distillation.total_variation(jnp.array([50.0, 0.0]), jnp.array([0.0, 50.0]))
  np.testing.assert_allclose(value, 1.0, atol=1e-6)


def test_adaptive_head_follows_the_teachers_mass():
  # p sorted: .598, .220, .133, .049. With mu .85 the first two are the head; with mu 1 all but rounding are.
  p, q = jax.nn.softmax(TEACHER), jax.nn.softmax(STUDENT)
  gaps = np.abs(p - q)
  forward, reverse = distillation.forward_kl(STUDENT, TEACHER), distillation.reverse_kl(STUDENT, TEACHER)
  weight = (gaps[0] + gaps[1]) / gaps.sum()
  value = distillation.adaptive_kl(STUDENT, TEACHER, mu=0.85)
  np.testing.assert_allclose(value, weight * forward + (1 - weight) * reverse, atol=1e-6)
  order = jnp.array([2, 0, 3, 1])
  np.testing.assert_allclose(distillation.adaptive_kl(STUDENT[order], TEACHER[order], mu=0.85), value, atol=1e-6)


def test_split_vocabulary_equals_whole_one():
  student, teacher = random_logits()
  names = sorted(DIVERGENCES.keys() - WHOLE_VOCABULARY)

  def values_and_gradients(student, teacher, axis_name):
    losses = {name: functools.partial(DIVERGENCES[name], axis_name=axis_name, temperature=1.5) for name in names}
    values = {name: loss(student, teacher) for name, loss in losses.items()}
    return values, {name: jax.grad(lambda x: loss(x, teacher).sum())(student) for name, loss in losses.items()}

  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ('data', 'tensor'))
  logits, tokens = P('data', None, 'tensor'), P('data')
  split = jax.jit(
      jax.shard_map(
          functools.partial(values_and_gradients, axis_name='tensor'),
          mesh=mesh,
          in_specs=(logits, logits),
          out_specs=(tokens, logits),
      )
  )
  jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=2e-6),
      split(student, teacher),
      values_and_gradients(student, teacher, None),
  )


@pytest.mark.parametrize('name', sorted(WHOLE_VOCABULARY))
def test_whole_vocabulary_divergences_refuse_a_split_one(name):
  with pytest.raises(ValueError, match="'tensor'.*forward_kl"):
    DIVERGENCES[name](STUDENT, TEACHER, axis_name='tensor')


@pytest.mark.parametrize('name', DIVERGENCES)
def test_wrong_shapes_and_temperatures_raise(name):
  with pytest.raises(AssertionError):
    DIVERGENCES[name](STUDENT, TEACHER[:3])
  with pytest.raises(AssertionError):
    DIVERGENCES[name](STUDENT[None], TEACHER)
  with pytest.raises(ValueError, match='temperature 0'):
    DIVERGENCES[name](STUDENT, TEACHER, temperature=0)


@pytest.mark.parametrize(
    'name, option',
    [('jensen_shannon', 'beta'), ('skew_kl', 'alpha'), ('skew_reverse_kl', 'alpha'), ('adaptive_kl', 'mu')],
)
def test_options_outside_the_unit_interval_raise(name, option):
  with pytest.raises(ValueError, match=f'{option} 1.5 of {name}'):
    DIVERGENCES[name](STUDENT, TEACHER, **{option: 1.5})
