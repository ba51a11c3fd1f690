import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.losses import features
from srm_jax.losses.features import BATCH_FEATURES, FEATURES

STUDENT = jnp.array([[[1.0, 2.0], [0.0, 1.0]]])
TEACHER = jnp.array([[[1.0, 0.0, 1.0], [2.0, 0.0, 0.0]]])
PROJECTOR = jnp.array([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])  # projected: [3, 2, 1], [1, 1, 0]

linear_cka = jax.jit(features.linear_cka)


def random_hidden(width, seed=0):
  return jax.random.normal(jax.random.key(seed), (2, 8, width))


def test_fitnets_by_hand():
  distance = features.fitnets(STUDENT, TEACHER, projector=PROJECTOR)
  np.testing.assert_allclose(distance, [[8 / 3, 2 / 3]], rtol=1e-6)


def test_cosine_by_hand():
  distance = features.cosine(STUDENT, TEACHER, projector=PROJECTOR)
  np.testing.assert_allclose(distance, [[1 - 4 / np.sqrt(28), 1 - 2 / np.sqrt(8)]], rtol=1e-6)


def test_cosine_ignores_scale_and_knows_opposites():
  np.testing.assert_allclose(features.cosine(STUDENT, 5 * STUDENT), [[0.0, 0.0]], atol=1e-6)
  np.testing.assert_allclose(features.cosine(STUDENT, -STUDENT), [[2.0, 2.0]], atol=1e-6)


def test_patient_by_hand_and_as_twice_the_cosine_distance():
  distance = features.patient(STUDENT, TEACHER, projector=PROJECTOR)
  np.testing.assert_allclose(distance, [[2 - 8 / np.sqrt(28), 2 - 4 / np.sqrt(8)]], rtol=1e-6)
  x, y = random_hidden(5), random_hidden(5, seed=1)
  np.testing.assert_allclose(features.patient(x, y), 2 * features.cosine(x, y), rtol=1e-5)
  np.testing.assert_allclose(features.patient(x, -3 * x), jnp.full((2, 8), 4.0), rtol=1e-5)


@pytest.mark.parametrize('name', FEATURES)
def test_contract(name):
  distance = FEATURES[name](STUDENT.astype(jnp.bfloat16), TEACHER.astype(jnp.bfloat16), projector=PROJECTOR)
  assert distance.shape == (1, 2) and distance.dtype == jnp.float32
  np.testing.assert_allclose(FEATURES[name](STUDENT, STUDENT), jnp.zeros((1, 2)), atol=1e-6)
  identity = FEATURES[name](TEACHER, 2 * TEACHER + 1, projector=jnp.eye(3))
  np.testing.assert_allclose(FEATURES[name](TEACHER, 2 * TEACHER + 1), identity, rtol=1e-6)


@pytest.mark.parametrize('name', FEATURES)
def test_gradient_reaches_student_and_projector_but_not_the_teacher(name):
  def loss(student, teacher, projector):
    return FEATURES[name](student, teacher, projector=projector).sum()

  student, teacher, projector = jax.grad(loss, argnums=(0, 1, 2))(STUDENT, TEACHER, PROJECTOR)
  assert np.any(student) and np.any(projector)
  np.testing.assert_array_equal(teacher, jnp.zeros_like(TEACHER))
  step = 1e-2 * jnp.ones_like(PROJECTOR)
  difference = loss(STUDENT, TEACHER, PROJECTOR + step) - loss(STUDENT, TEACHER, PROJECTOR - step)
  np.testing.assert_allclose(jnp.sum(projector * step), difference / 2, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('name', FEATURES)
def test_zero_vectors_have_finite_values_and_gradients(name):
  zeros = jnp.zeros((1, 2, 3))
  for teacher in (zeros, TEACHER):
    value, gradient = jax.value_and_grad(lambda x: FEATURES[name](x, teacher).sum())(zeros)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


@pytest.mark.parametrize('name', FEATURES)
def test_wrong_shapes_raise(name):
  with pytest.raises(AssertionError):
    FEATURES[name](STUDENT, TEACHER)
  with pytest.raises(AssertionError):
    FEATURES[name](STUDENT, TEACHER, projector=PROJECTOR.T)
  with pytest.raises(AssertionError):
    FEATURES[name](STUDENT[0], TEACHER[0], projector=PROJECTOR)
  with pytest.raises(AssertionError):
    FEATURES[name](STUDENT[:, :1], TEACHER, projector=PROJECTOR)


def cka_reference(x, y):
  x, y = x - x.mean(0), y - y.mean(0)
  return 1 - np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


@pytest.mark.parametrize('name', BATCH_FEATURES)
def test_batch_features_are_scalars_that_a_split_changes(name):
  x, y, mask = random_hidden(3), random_hidden(5, seed=1), jnp.ones((2, 8))
  loss = jax.jit(BATCH_FEATURES[name])
  whole = loss(x, y, mask)
  assert whole.shape == () and whole.dtype == jnp.float32
  parts = [loss(x[i : i + 1], y[i : i + 1], mask[i : i + 1]) for i in range(2)]
  assert abs(whole - sum(parts) / 2) > 1e-2
  with pytest.raises(AssertionError):
    BATCH_FEATURES[name](x, y, mask[:, :4])
  with pytest.raises(AssertionError):
    BATCH_FEATURES[name](x[0], y[0], mask[0])


def test_linear_cka_matches_the_formula_on_unmasked_tokens():
  x, y = random_hidden(3), random_hidden(5, seed=1)
  mask = jnp.ones((2, 8)).at[1, 4:].set(0)
  garbage = jnp.where(mask[..., None] > 0, x, jnp.nan)
  kept = np.asarray(mask).reshape(-1) > 0
  expected = cka_reference(np.asarray(x).reshape(-1, 3)[kept], np.asarray(y).reshape(-1, 5)[kept])
  np.testing.assert_allclose(linear_cka(garbage, y, mask), expected, atol=1e-6)


def test_linear_cka_is_invariant_to_rotation_scale_and_shift():
  x, mask = random_hidden(4), jnp.ones((2, 8))
  rotation, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(2), (4, 4)))
  for scale in (1e-6, 3.0, 1e6):
    np.testing.assert_allclose(linear_cka(scale * (x @ rotation + 1), x, mask), 0.0, atol=1e-5)
  y = random_hidden(5, seed=1)
  np.testing.assert_allclose(linear_cka(1e6 * x, y, mask), linear_cka(x, y, mask), atol=1e-5)
  assert linear_cka(x, y, mask) > 0.1


@pytest.mark.parametrize('offset', [0.0, 10.0, 1e3, 1e4])
def test_linear_cka_sees_through_a_large_mean(offset):
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(2, 1, 8, 4)).astype(np.float32)
  expected = features.linear_cka(x, y, jnp.ones((1, 8)))
  along_all = features.linear_cka(x + np.float32(offset), y, jnp.ones((1, 8)))
  one_dimension = np.concatenate([x, np.full((1, 8, 1), offset, np.float32)], axis=-1)
  for found in (along_all, features.linear_cka(one_dimension, y, jnp.ones((1, 8)))):
    np.testing.assert_allclose(found, expected, atol=2e-3)  # of 1e4 a float32 keeps three digits behind the point


def test_linear_cka_gradient_matches_finite_differences_and_spares_the_teacher():
  x, y, mask = random_hidden(3), random_hidden(5, seed=1), jnp.ones((2, 8))
  student, teacher = jax.grad(linear_cka, argnums=(0, 1))(x, y, mask)
  np.testing.assert_array_equal(teacher, jnp.zeros_like(y))
  step = 1e-2 * random_hidden(3, seed=3)
  difference = linear_cka(x + step, y, mask) - linear_cka(x - step, y, mask)
  np.testing.assert_allclose(jnp.sum(student * step), difference / 2, rtol=1e-2)


def test_linear_cka_of_constant_features_is_one_with_finite_gradient():
  x, mask = jnp.full((2, 8, 3), 0.1), jnp.ones((2, 8))
  for keep in (mask, 0 * mask):
    value, gradient = jax.value_and_grad(linear_cka)(x, random_hidden(5), keep)
    np.testing.assert_allclose(value, 1.0, atol=1e-6)
    assert np.all(np.isfinite(gradient))
