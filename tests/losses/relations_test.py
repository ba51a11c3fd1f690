import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.losses import relations
from srm_jax.losses.relations import QKV, RELATIONS
from srm_jax.models.attention import Visibility, attention_weights

# Rows of ten: two segments and padding; one segment that fills the row.
SEGMENTS = jnp.array([[1] * 4 + [2] * 3 + [0] * 3, [1] * 10])
LENGTH = SEGMENTS.shape[1]
OPTIONS = {'minilm': {}, 'minilm_v2': {'relation_heads': 2}}
each_relation = pytest.mark.parametrize('name', RELATIONS)


def taps(seed, heads, key_heads, size, length=LENGTH):
  keys = jax.random.split(jax.random.key(seed), 3)
  shapes = [(2, length, n, size) for n in (heads, key_heads, key_heads)]
  return QKV(*(1.5 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes)))


STUDENT, TEACHER = taps(0, 4, 2, 6), taps(1, 4, 1, 10)


@functools.partial(jax.jit, static_argnames=('name', 'block', 'relation_heads'))
def run(name, student=STUDENT, teacher=TEACHER, segments=SEGMENTS, weights=None, *, block=4, **options):
  """Values [B, T], and the gradients of their weighted sum on both models."""

  def total(student, teacher):
    values = RELATIONS[name](student, teacher, segments, block=block, **{**OPTIONS[name], **options})
    return jnp.sum(values if weights is None else weights * values), values

  gradients, values = jax.grad(total, argnums=(0, 1), has_aux=True)(student, teacher)
  return values, *gradients


def distance(*args, **options):
  return run(*args, **options)[0]


def reference_relation(a, b, segments):
  """float64 [B, H, T, T] relation of [B, T, H, D], row by row."""
  a, b, out = np.float64(a), np.float64(b), np.zeros((2, a.shape[2], LENGTH, LENGTH))
  for i, h, t in np.ndindex(2, a.shape[2], LENGTH):
    seen = [s for s in range(t + 1) if segments[i, s] == segments[i, t]]
    scores = np.array([a[i, t, h] @ b[i, s, h] for s in seen]) / np.sqrt(a.shape[3])
    out[i, h, t, seen] = np.exp(scores) / np.exp(scores).sum()
  return out


def reference(name, segments=np.asarray(SEGMENTS)):
  if name == 'minilm':
    grouped = lambda x: np.stack([x[:, :, h * x.shape[2] // 4] for h in range(4)], axis=2)
    pairs = [[(m.q, grouped(m.k)), (grouped(m.v), grouped(m.v))] for m in map(QKV._make, (STUDENT, TEACHER))]
  else:
    pairs = [[(x, x) for x in (np.asarray(x).reshape(2, LENGTH, 2, -1) for x in m)] for m in (STUDENT, TEACHER)]
  total = 0
  for (a, b), (c, d) in zip(*pairs):
    q, p = reference_relation(a, b, segments), reference_relation(c, d, segments)
    total += np.sum(p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1)), axis=-1).mean(1)
  return np.where(segments > 0, total, 0)


@each_relation
def test_values_by_a_dense_reference_whatever_the_block(name):
  values, gradient, _ = run(name, block=4)
  assert values.shape == SEGMENTS.shape and values.dtype == jnp.float32
  np.testing.assert_allclose(values, reference(name), rtol=1e-5, atol=1e-6)
  for block in (1, 64):
    other_values, other_gradient, _ = run(name, block=block)
    np.testing.assert_allclose(other_values, values, rtol=1e-5, atol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), other_gradient, gradient)


@each_relation
def test_gradient_matches_finite_differences(name):
  weights = jnp.cos(jnp.arange(SEGMENTS.size, dtype=jnp.float32)).reshape(SEGMENTS.shape)
  _, gradient, _ = run(name, weights=weights)
  for tap in range(3):
    step = 5e-3 * jax.random.normal(jax.random.key(7), STUDENT[tap].shape)
    moved = [STUDENT._replace(**{STUDENT._fields[tap]: STUDENT[tap] + sign * step}) for sign in (1, -1)]
    up, down = (jnp.sum(weights * run(name, student, weights=weights)[0]) for student in moved)
    np.testing.assert_allclose(jnp.sum(gradient[tap] * step), (up - down) / 2, rtol=1e-2, atol=1e-4)


@each_relation
def test_only_the_student_learns_and_nothing_from_itself(name):
  values, student, teacher = run(name)
  assert all(np.any(x) for x in student) and not any(np.any(x) for x in teacher)
  assert np.all(values[1, 1:] > 0.01)
  values, student, _ = run(name, STUDENT, STUDENT)
  np.testing.assert_allclose(values, jnp.zeros_like(values), atol=1e-5)
  jax.tree.map(lambda x: np.testing.assert_allclose(x, jnp.zeros_like(x), atol=1e-5), student)


@each_relation
def test_a_first_token_sees_itself_alone(name):
  values = distance(name)
  np.testing.assert_allclose(values[0, [0, 4]], 0.0, atol=1e-6)
  np.testing.assert_allclose(values[1, 0], 0.0, atol=1e-6)


@each_relation
def test_a_token_learns_from_its_own_segment_up_to_itself(name):
  _, gradient, _ = run(name, weights=jnp.zeros_like(SEGMENTS, jnp.float32).at[0, 5].set(1))
  touched = np.any([np.any(np.asarray(x) != 0, axis=(2, 3)) for x in gradient], axis=0)
  np.testing.assert_array_equal(np.nonzero(touched[0])[0], [4, 5])
  assert not np.any(touched[1])


@each_relation
def test_packed_segments_are_worth_what_they_are_alone(name):
  alone = [jax.tree.map(lambda x: x[:1, 4:7], tap) for tap in (STUDENT, TEACHER)]
  values = distance(name, *alone, segments=jnp.ones((1, 3), int))
  np.testing.assert_allclose(values[0], distance(name)[0, 4:7], rtol=1e-5, atol=1e-6)


@each_relation
def test_padding_may_hold_anything(name):
  dirty = lambda model: QKV(*(jnp.where((SEGMENTS > 0)[..., None, None], x, jnp.nan) for x in model))
  values, gradient, _ = run(name, dirty(STUDENT), dirty(TEACHER))
  clean_values, clean_gradient, _ = run(name)
  np.testing.assert_array_equal(values, clean_values)
  jax.tree.map(np.testing.assert_array_equal, gradient, clean_gradient)
  assert not np.any(values[0, 7:])
  _, gradient, _ = run(name, dirty(STUDENT), TEACHER, 0 * SEGMENTS)
  assert not any(np.any(x) for x in gradient)


def test_minilm_compares_the_attention_of_the_models():
  """Values of zero resemble each other alike in both, which leaves the attention that the model itself reports."""
  student, teacher = (
      attention_weights(m.q, jnp.swapaxes(m.k, 1, 2), Visibility(SEGMENTS, SEGMENTS, 0)) for m in (STUDENT, TEACHER)
  )
  terms = teacher * (jnp.log(jnp.maximum(teacher, 1e-30)) - jnp.log(jnp.maximum(student, 1e-30)))
  values = distance('minilm', *(m._replace(v=0 * m.v) for m in (STUDENT, TEACHER)))
  expected = jnp.where(SEGMENTS > 0, jnp.sum(terms, axis=-1).mean(axis=1), 0.0)
  np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)


def test_minilm_v2_sees_relation_heads_and_not_how_attention_cut_them():
  recut = lambda model: QKV(*(x.reshape(2, LENGTH, -1, 2) for x in model))
  np.testing.assert_allclose(distance('minilm_v2', recut(STUDENT), recut(TEACHER)), distance('minilm_v2'), rtol=1e-5)
  rotation, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(9), (6, 6)))
  turned = STUDENT._replace(k=STUDENT.k @ rotation)  # two relation heads of width 6: within each, products stay
  np.testing.assert_allclose(distance('minilm_v2', turned), distance('minilm_v2'), rtol=1e-4, atol=1e-5)
  assert not np.allclose(distance('minilm_v2', turned, relation_heads=1), distance('minilm_v2'), rtol=1e-2)


def sizes(jaxpr):
  for equation in jaxpr.eqns:
    yield from (variable.aval.size for variable in equation.outvars if hasattr(variable.aval, 'size'))
    for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from sizes(inner)


@each_relation
def test_scores_of_all_queries_never_live_at_once(name):
  length, heads = 256, 4
  student, teacher = taps(0, heads, 2, 4, length), taps(1, heads, 2, 4, length)
  segments = jnp.ones((2, length), int)
  gradient = functools.partial(run, name, teacher=teacher, segments=segments)
  largest = lambda block: max(sizes(jax.make_jaxpr(functools.partial(gradient, block=block))(student).jaxpr))
  relation_heads = {'minilm': heads, 'minilm_v2': 2}[name]
  assert largest(length) >= 2 * relation_heads * length**2
  assert largest(16) <= 2 * relation_heads * 16 * length


def test_wrong_arguments_raise():
  with pytest.raises(ValueError, match='student has 4 heads and the teacher 2; choose minilm_v2'):
    distance('minilm', teacher=taps(1, 2, 2, 6))
  with pytest.raises(ValueError, match='relation_heads 5 .* width 24 of a tap with 4 heads of size 6'):
    distance('minilm_v2', relation_heads=5)
  for name in RELATIONS:
    with pytest.raises(ValueError, match='block 0'):
      distance(name, block=0)
    with pytest.raises(AssertionError):
      distance(name, segments=SEGMENTS[:, :4])
    with pytest.raises(AssertionError):
      distance(name, student=taps(0, 4, 3, 6))
    with pytest.raises(AssertionError):
      distance(name, student=STUDENT._replace(v=STUDENT.v[..., :2]))
