import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec as P
from jax.test_util import check_grads

from srm_jax.losses import lm_head, top_k
from srm_jax.losses.distillation import DIVERGENCES
from srm_jax.losses.top_k import POLICIES, TOP_K, TopK

# 'zero' gives the teacher no mass outside, where KL(student || teacher) is infinite.
PAIRS = [(name, policy) for name in TOP_K for policy in POLICIES if (name, policy) != ('reverse_kl', 'zero')]
each_pair = pytest.mark.parametrize('name, policy', PAIRS)


def random_logits(shape=(2, 3, 8)):
  student, teacher = jax.random.normal(jax.random.key(0), (2, *shape)) * 2
  return student, teacher


def by_hand(name, policy, student, teacher, k):
  """float64 value for one token: logits [V] each."""
  p, q = (np.exp(np.float64(x)) / np.exp(np.float64(x)).sum() for x in (teacher, student))
  order = np.argsort(-p)
  kept, rest = order[:k], order[k:]
  if policy == 'renormalise':
    p, q = p[kept] / p[kept].sum(), q[kept] / q[kept].sum()
  elif policy == 'zero':
    p = np.where(np.isin(np.arange(len(p)), kept), p, 0) / p[kept].sum()
  else:
    p, q = (np.append(x[kept], x[rest].sum()) for x in (p, q))
  kl = lambda a, b: np.sum(a[a > 0] * np.log(a[a > 0] / b[a > 0]))
  return {
      'forward_kl': lambda: kl(p, q),
      'reverse_kl': lambda: kl(q, p),
      'jensen_shannon': lambda: 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2),
      'skew_kl': lambda: kl(p, 0.1 * p + 0.9 * q),
      'skew_reverse_kl': lambda: kl(q, 0.9 * p + 0.1 * q),
      'total_variation': lambda: np.abs(p - q).sum() / 2,
  }[name]()


@each_pair
def test_values_by_hand(name, policy):
  student, teacher = random_logits()
  for k in (1, 3, 7):
    values = TOP_K[name](student, top_k.truncate(teacher, k=k), policy=policy)
    assert values.shape == (2, 3) and values.dtype == jnp.float32
    expected = [by_hand(name, policy, s, t, k) for s, t in zip(student.reshape(-1, 8), teacher.reshape(-1, 8))]
    np.testing.assert_allclose(values.reshape(-1), expected, rtol=1e-4, atol=1e-6)


@each_pair
@pytest.mark.parametrize('temperature', [1.0, 1.7])
def test_all_tokens_are_the_full_divergence(name, policy, temperature):
  student, teacher = random_logits()
  loss = functools.partial(TOP_K[name], teacher=top_k.truncate(teacher, k=8), policy=policy, temperature=temperature)
  full = functools.partial(DIVERGENCES[name], teacher_logits=teacher, temperature=temperature)
  np.testing.assert_allclose(loss(student), full(student), rtol=1e-5, atol=1e-6)
  gradients = (jax.grad(lambda x: f(x).sum())(student) for f in (loss, full))
  np.testing.assert_allclose(*gradients, atol=2e-6)


def test_all_tokens_allow_zero_and_reverse_kl():
  student, teacher = random_logits()
  value = top_k.reverse_kl(student, top_k.truncate(teacher, k=8), policy='zero')
  np.testing.assert_allclose(value, DIVERGENCES['reverse_kl'](student, teacher), rtol=1e-5)


@pytest.mark.parametrize('name', TOP_K)
def test_a_tail_bounds_the_full_divergence_from_below_and_more_tokens_tighten_it(name):
  student, teacher = random_logits((500, 20))
  full = DIVERGENCES[name](student, teacher)
  values = [TOP_K[name](student, top_k.truncate(teacher, k=k)) for k in (1, 2, 5, 12, 19, 20)]
  for less, more in zip(values, values[1:] + [full]):
    assert np.all(less <= more + 1e-5)
  assert np.all(values[0] >= 0) and np.mean(values[0] < 0.9 * full) > 0.5
  same = TOP_K[name](teacher, top_k.truncate(teacher, k=5))
  np.testing.assert_allclose(same, jnp.zeros(500), atol=1e-6)


@pytest.mark.parametrize('policy', ['renormalise', 'zero'])
def test_conditioned_teachers_take_any_temperature_exactly(policy):
  student, teacher = random_logits()
  cold = TOP_K['forward_kl'](student, top_k.truncate(teacher, k=3), policy=policy, temperature=2.0)
  warm = TOP_K['forward_kl'](
      student, top_k.truncate(teacher, k=3, temperature=2.0), policy=policy, temperature=2.0, teacher_temperature=2.0
  )
  np.testing.assert_allclose(cold, warm, rtol=1e-5)
  scheduled = jax.jit(lambda t: top_k.forward_kl(student, top_k.truncate(teacher, k=3), policy=policy, temperature=t))
  np.testing.assert_allclose(scheduled(2.0), cold, rtol=1e-5)


def test_a_tail_keeps_the_temperature_that_it_was_made_at():
  student, teacher = random_logits()
  made = top_k.truncate(teacher, k=3, temperature=2.0)
  value = top_k.forward_kl(student, made, temperature=2.0, teacher_temperature=2.0)
  np.testing.assert_allclose(value, top_k.forward_kl(student / 2, top_k.truncate(teacher / 2, k=3)), rtol=1e-5)
  with pytest.raises(ValueError, match=r"'tail' .* temperature 1.0 to 2.0.*cache them"):
    top_k.forward_kl(student, made, temperature=2.0)
  with pytest.raises(ValueError, match="'tail'"):
    jax.jit(lambda t: top_k.forward_kl(student, made, temperature=t))(1.0)


@each_pair
def test_gradient_matches_finite_differences(name, policy):
  student, teacher = random_logits((8,))
  loss = functools.partial(TOP_K[name], teacher=top_k.truncate(teacher, k=3), policy=policy)
  check_grads(loss, (student,), order=1, modes=['rev'], atol=3e-3, rtol=3e-3, eps=1e-2)


@each_pair
def test_teacher_receives_no_gradient(name, policy):
  student, teacher = random_logits()
  ids, *known = top_k.truncate(teacher, k=3)
  gradients = jax.grad(lambda known: TOP_K[name](student, TopK(ids, *known), policy=policy).sum())(known)
  for gradient in gradients:
    np.testing.assert_array_equal(gradient, jnp.zeros_like(gradient))
  assert not np.any(jax.grad(lambda x: top_k.truncate(x, k=3).logprobs.sum())(teacher))


@each_pair
def test_order_and_filling_of_a_row_do_not_matter(name, policy):
  student, teacher = random_logits()
  known = top_k.truncate(teacher, k=3)
  value = TOP_K[name](student, known, policy=policy)
  order = jnp.array([2, 0, 1])
  turned = TopK(known.ids[..., order], known.logprobs[..., order], known.tail)
  np.testing.assert_allclose(TOP_K[name](student, turned, policy=policy), value, rtol=1e-5, atol=1e-6)
  # A fourth entry that is none: outside the vocabulary, or without mass.
  for extra_id, extra in ((-1, -jnp.inf), (5000, -jnp.inf), (0, -jnp.inf)):
    filled = TopK(
        jnp.pad(known.ids, [(0, 0), (0, 0), (0, 1)], constant_values=extra_id),
        jnp.pad(known.logprobs, [(0, 0), (0, 0), (0, 1)], constant_values=extra), known.tail,
    )
    np.testing.assert_allclose(TOP_K[name](student, filled, policy=policy), value, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda x: TOP_K[name](x, filled, policy=policy).sum())(student)
    assert np.all(np.isfinite(gradient)) and np.any(gradient)


def test_mass_on_tokens_that_the_student_does_not_have_is_tail():
  student, teacher = random_logits()
  known = top_k.truncate(teacher, k=3)
  lost = known._replace(ids=known.ids.at[..., 2].set(8))
  kept = TopK(known.ids[..., :2], known.logprobs[..., :2], known.tail + jnp.exp(known.logprobs[..., 2]))
  np.testing.assert_allclose(top_k.forward_kl(student, lost), top_k.forward_kl(student, kept), rtol=1e-5)
  unmeasured = top_k.forward_kl(student, lost._replace(tail=None))
  np.testing.assert_allclose(unmeasured, top_k.forward_kl(student, kept), rtol=1e-4)


def test_records_with_these_fields_and_narrow_types_will_do():
  student, teacher = random_logits()
  known = top_k.truncate(teacher, k=3)
  narrow = TopK(np.asarray(known.ids, np.uint16), np.asarray(known.logprobs, np.float16), None)
  value = top_k.forward_kl(student.astype(jnp.bfloat16), narrow)
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, top_k.forward_kl(student, known), rtol=2e-2, atol=1e-2)


def test_truncate_keeps_the_likeliest_and_measures_a_small_tail():
  logits = jnp.array([20.0, 1.0, 25.0, 0.0])
  known = top_k.truncate(logits, k=2)
  np.testing.assert_array_equal(known.ids, [2, 0])
  exact = np.exp(np.float64(logits)) / np.exp(np.float64(logits)).sum()
  np.testing.assert_allclose(known.logprobs, np.log(exact[[2, 0]]), rtol=1e-5)
  np.testing.assert_allclose(known.tail, exact[[1, 3]].sum(), rtol=1e-5)  # 5e-11: 1 - sum p would be 0
  for k in (0, 5):
    with pytest.raises(ValueError, match=f'k {k} of truncate'):
      top_k.truncate(logits, k=k)


def test_a_student_who_is_sure_still_learns_of_a_tail():
  # The student leaves 1e-12 outside of two tokens, the teacher 0.2: 1 - sum q would round to 0, its gradient with it.
  student = jnp.array([30.0, 29.0, 1.5, 0.0])
  known = TopK(jnp.array([0, 1]), jnp.log(jnp.array([0.5, 0.3])), jnp.float32(0.2))
  value, gradient = jax.value_and_grad(top_k.forward_kl)(student, known)
  q = np.exp(np.float64(student)) / np.exp(np.float64(student)).sum()
  p = np.array([0.5, 0.3, 0.2])
  np.testing.assert_allclose(value, np.sum(p * np.log(p / [q[0], q[1], q[2] + q[3]])), rtol=1e-6)
  outside = q[2:] - 0.2 * q[2:] / q[2:].sum()
  np.testing.assert_allclose(gradient, [q[0] - 0.5, q[1] - 0.3, *outside], atol=1e-6)


@each_pair
def test_extreme_and_empty_rows_stay_finite(name, policy):
  student = jnp.array([300.0, 0.0, -300.0, 1.0])
  rows = [
      top_k.truncate(-student, k=2),
      TopK(jnp.zeros(2, int), jnp.zeros(2), jnp.float32(0)),  # what fills up a chunk of tokens
      TopK(jnp.full(2, -1), jnp.full(2, -jnp.inf), jnp.float32(0)),
  ]
  for row in rows:
    value, gradient = jax.value_and_grad(TOP_K[name])(student, row, policy=policy)
    assert np.isfinite(value) and np.all(np.isfinite(gradient)), row


def test_split_vocabulary_equals_whole_one():
  student, teacher = random_logits()
  known = top_k.truncate(teacher, k=3)
  pairs = [pair for pair in PAIRS if 'tail' in pair or 'skew_kl' in pair]

  def values_and_gradients(student, known, axis_name):
    losses = [functools.partial(TOP_K[name], policy=policy, axis_name=axis_name) for name, policy in pairs]
    values = [loss(student, known) for loss in losses]
    return values, [jax.grad(lambda x: loss(x, known).sum())(student) for loss in losses]

  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ('data', 'tensor'))
  logits, tokens = P('data', None, 'tensor'), P('data')
  split = jax.jit(
      jax.shard_map(
          functools.partial(values_and_gradients, axis_name='tensor'),
          mesh=mesh,
          in_specs=(logits, tokens),
          out_specs=(tokens, logits),
      )
  )
  jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=2e-6),
      split(student, known),
      jax.jit(functools.partial(values_and_gradients, axis_name=None))(student, known),
  )
  with pytest.raises(ValueError, match='lists 9 tokens of a vocabulary of 8'):
    split(student, TopK(*(jnp.concatenate([x] * 3, axis=-1) for x in known[:2])))


@pytest.mark.parametrize('devices', [1, 4])
def test_a_teacher_without_logits_goes_through_the_lm_head_as_a_target(devices):
  hidden, kernel = jax.random.normal(jax.random.key(1), (4, 6, 5)), jax.random.normal(jax.random.key(2), (5, 8))
  known = top_k.truncate(jax.random.normal(jax.random.key(3), (4, 6, 8)), k=3)
  weights = jnp.ones((4, 6)).at[1:, 3:].set(0)
  mesh = None
  if devices > 1:
    axes = ('data', 'fsdp', 'tensor')
    mesh = jax.make_mesh((2, 1, 2), axes, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:devices])

  def loss(kernel, share, chunk, mesh):
    fn = lambda logits, _, known, axis_name: (top_k.skew_kl(logits, known, alpha=share, axis_name=axis_name), {})
    return lm_head.reduced(fn, lm_head.Head(hidden, kernel), known, weights, chunk=chunk, mesh=mesh)[0]

  run = jax.jit(jax.value_and_grad(loss), static_argnums=(2, 3))
  value, gradient = run(kernel, 0.2, 5, mesh)
  expected = jnp.sum(top_k.skew_kl(hidden @ kernel, known, alpha=0.2) * weights)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(gradient, run(kernel, 0.2, 0, None)[1], atol=1e-5)


def sizes(jaxpr):
  for equation in jaxpr.eqns:
    yield from (variable.aval.size for variable in equation.outvars if hasattr(variable.aval, 'size'))
    for value in equation.params.values():
      if hasattr(value, 'jaxpr'):
        yield from sizes(value.jaxpr)


@each_pair
def test_nothing_larger_than_the_logits_is_formed(name, policy):
  student, teacher = random_logits((4, 100))
  known = top_k.truncate(teacher, k=16)
  gradient = jax.grad(lambda x: TOP_K[name](x, known, policy=policy).sum())
  assert max(sizes(jax.make_jaxpr(gradient)(student).jaxpr)) == 4 * 100


@pytest.mark.parametrize('name', TOP_K)
def test_wrong_arguments_raise(name):
  student, teacher = random_logits()
  known = top_k.truncate(teacher, k=3)
  with pytest.raises(ValueError, match="policy 'drop' unknown; choose from .*'tail'"):
    TOP_K[name](student, known, policy='drop')
  with pytest.raises(ValueError, match='lists 3 tokens of a vocabulary of 2'):
    TOP_K[name](student[..., :2], known)
  with pytest.raises(ValueError, match='temperature 0'):
    TOP_K[name](student, known, temperature=0)
  for wrong in (
      known._replace(logprobs=known.logprobs[..., :2]),
      known._replace(tail=known.tail[..., None]),
      TopK(known.ids[:1], known.logprobs[:1]),
      TopK(known.ids[0], known.logprobs[0]),
  ):
    with pytest.raises(AssertionError):
      TOP_K[name](student, wrong)


@pytest.mark.parametrize(
    'name, options', [('reverse_kl', {}), ('jensen_shannon', {'beta': 1}), ('skew_reverse_kl', {'alpha': 0})]
)
def test_infinite_divergences_are_refused(name, options):
  student, teacher = random_logits()
  with pytest.raises(ValueError, match=f"{name}.* is infinite under the policy 'zero'"):
    TOP_K[name](student, top_k.truncate(teacher, k=7), policy='zero', **options)


@pytest.mark.parametrize(
    'name, option', [('jensen_shannon', 'beta'), ('skew_kl', 'alpha'), ('skew_reverse_kl', 'alpha')]
)
def test_options_outside_the_unit_interval_raise(name, option):
  student, teacher = random_logits()
  with pytest.raises(ValueError, match=f'{option} 1.5 of {name}'):
    TOP_K[name](student, top_k.truncate(teacher, k=3), **{option: 1.5})


@each_pair
def test_a_token_that_the_student_rules_out_makes_no_nan(name, policy):
  student, teacher = random_logits((8,))
  for token in np.argsort(-teacher)[jnp.array([0, 7])]:  # one that the teacher lists, and one that it does not
    loss = lambda logits: TOP_K[name](logits, top_k.truncate(teacher, k=3), policy=policy)
    value, slope = jax.value_and_grad(loss)(student.at[token].set(-jnp.inf))
    assert np.isfinite(value) and np.all(np.isfinite(slope))


@each_pair
def test_a_row_that_lists_nothing_costs_nothing(name, policy):
  student, _ = random_logits((8,))
  nothing = TopK(jnp.full((3,), -1), jnp.full((3,), -jnp.inf), jnp.ones(()))
  value, slope = jax.value_and_grad(lambda logits: TOP_K[name](logits, nothing, policy=policy))(student)
  np.testing.assert_allclose(value, 0, atol=1e-6)
  np.testing.assert_allclose(slope, 0, atol=1e-6)


def test_a_teacher_that_rules_tokens_out_is_truncated_exactly():
  student, teacher = random_logits((8,))
  teacher = teacher.at[2].set(-jnp.inf)
  for policy in ('tail', 'renormalise'):
    found = top_k.forward_kl(student, top_k.truncate(teacher, k=8), policy=policy)
    if policy == 'tail':
      np.testing.assert_allclose(found, DIVERGENCES['forward_kl'](student, teacher), rtol=1e-5)
    assert np.isfinite(found)
