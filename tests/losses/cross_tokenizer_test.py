import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax import sharding
from srm_jax.losses import cross_entropy, cross_tokenizer, distillation, lm_head, reductions, token_groups
from srm_jax.losses.distillation import DIVERGENCES


def normal(*shape, seed=0, scale=2.0):
  return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def sorted_distance(student, teacher):
  """Independent: Python lists, one group at a time."""
  def one(ours, theirs):
    ours, theirs = sorted(ours, reverse=True), sorted(theirs, reverse=True)
    return sum(abs(x - y) for x, y in itertools.zip_longest(ours, theirs, fillvalue=0.0))

  return [one(np.asarray(x, np.float64).tolist(), np.asarray(y, np.float64).tolist()) for x, y in zip(student, teacher)]


def test_uld_by_hand():
  student, teacher = jnp.log(jnp.array([[0.2, 0.5, 0.3]])), jnp.log(jnp.array([[0.1, 0.6, 0.05, 0.25]]))
  np.testing.assert_allclose(cross_tokenizer.uld(student, teacher), [0.1 + 0.05 + 0.1 + 0.05], rtol=1e-5)
  found = cross_tokenizer.uld(student, teacher, student_later=jnp.log(jnp.array([0.5])))
  np.testing.assert_allclose(found, [0.35 + 0.1 + 0.0 + 0.05], rtol=1e-5)


@pytest.mark.parametrize('sizes', [(7, 7), (5, 9), (9, 5)])
@pytest.mark.parametrize('temperature', [1.0, 2.5])
def test_uld_against_lists(sizes, temperature):
  student, teacher = (normal(6, size, seed=size + i) for i, size in enumerate(sizes))
  later = -jnp.abs(normal(2, 6, seed=3))
  ours, theirs = (jax.nn.softmax(logits / temperature) for logits in (student, teacher))
  found = cross_tokenizer.uld(student, teacher, temperature=temperature)
  np.testing.assert_allclose(found, sorted_distance(ours, theirs), rtol=1e-5)
  found = cross_tokenizer.uld(
      student, teacher, student_later=later[0], teacher_later=later[1], temperature=temperature
  )
  merged = (np.exp(later)[..., None] * values for later, values in zip(later, (ours, theirs)))
  np.testing.assert_allclose(found, sorted_distance(*merged), rtol=1e-5)


def test_uld_against_torch():
  torch = pytest.importorskip('torch')
  student, teacher = np.array(normal(6, 11)), np.array(normal(6, 8, seed=1))
  ours = torch.tensor(student, requires_grad=True)
  p = torch.nn.functional.pad(torch.softmax(torch.tensor(teacher), -1), (0, 3)).sort(-1, descending=True).values
  torch.nn.functional.l1_loss(torch.softmax(ours, -1).sort(-1, descending=True).values, p, reduction='sum').backward()
  gradient = jax.grad(lambda x: cross_tokenizer.uld(x, teacher).sum())(jnp.asarray(student))
  np.testing.assert_allclose(gradient, ours.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_uld_is_twice_the_least_total_variation_over_all_pairings():
  student, teacher = normal(5, scale=1.0), normal(5, seed=1, scale=1.0)
  pairings = jnp.stack([teacher[jnp.array(order)] for order in itertools.permutations(range(5))])
  distances = distillation.total_variation(jnp.broadcast_to(student, pairings.shape), pairings)
  np.testing.assert_allclose(cross_tokenizer.uld(student, teacher), 2 * distances.min(), rtol=1e-5)


def test_uld_does_not_see_the_order_of_a_vocabulary_nor_impossible_tokens():
  student, teacher = normal(4, 9), normal(4, 6, seed=1)
  expected = cross_tokenizer.uld(student, teacher)
  order = np.random.default_rng(0).permutation(9)
  np.testing.assert_allclose(cross_tokenizer.uld(student[:, order], teacher), expected, rtol=1e-6)
  np.testing.assert_allclose(cross_tokenizer.uld(student, teacher[:, ::-1]), expected, rtol=1e-6)
  padded = jnp.pad(teacher, ((0, 0), (0, 20)), constant_values=-1e9)
  np.testing.assert_allclose(cross_tokenizer.uld(student, padded), expected, rtol=1e-6)
  np.testing.assert_allclose(cross_tokenizer.uld(student, student[:, order]), jnp.zeros(4), atol=1e-6)
  gradient = jax.grad(lambda x: cross_tokenizer.uld(x, student).sum())(student)
  np.testing.assert_array_equal(gradient, jnp.zeros_like(student))


def test_uld_gradient_against_differences():
  student, teacher = normal(4, 7, scale=1.0), normal(4, 5, seed=1, scale=1.0)
  later, fixed = -jnp.array([0.0, 0.4, 1.0, 2.0]), -jnp.array([0.3, 0.0, 0.9, 2.5])
  loss = jax.jit(lambda *x: cross_tokenizer.uld(x[0], x[1], student_later=x[2], teacher_later=x[3]).sum())
  ours, theirs, by_later, by_fixed = jax.grad(loss, argnums=(0, 1, 2, 3))(student, teacher, later, fixed)
  np.testing.assert_array_equal(theirs, jnp.zeros_like(teacher))
  np.testing.assert_array_equal(by_fixed, jnp.zeros_like(fixed))
  assert jnp.abs(ours).min() > 1e-4
  for seed in range(3):
    step, later_step = 2e-4 * normal(4, 7, seed=seed + 5), 2e-4 * normal(4, seed=seed + 9)
    difference = loss(student + step, teacher, later, fixed) - loss(student - step, teacher, later, fixed)
    np.testing.assert_allclose(2 * jnp.sum(ours * step), difference, rtol=2e-2, atol=2e-6)
    difference = loss(student, teacher, later + later_step, fixed) - loss(student, teacher, later - later_step, fixed)
    np.testing.assert_allclose(2 * jnp.sum(by_later * later_step), difference, rtol=2e-2, atol=2e-6)


def test_uld_is_float32_inside():
  student, teacher = normal(3, 50).astype(jnp.bfloat16), normal(3, 40, seed=1).astype(jnp.bfloat16)
  expected = cross_tokenizer.uld(student.astype(jnp.float32), teacher.astype(jnp.float32))
  found = cross_tokenizer.uld(student, teacher)
  np.testing.assert_array_equal(found, expected)
  assert found.dtype == jnp.float32


# --- shared vocabularies


@pytest.mark.parametrize('name', DIVERGENCES)
def test_equal_vocabularies_give_the_plain_divergence(name):
  student, teacher, ids = normal(5, 9), normal(5, 9, seed=1), np.arange(9)
  order = np.random.default_rng(0).permutation(9)
  for temperature in (1.0, 2.0):
    expected = DIVERGENCES[name](student, teacher, temperature=temperature)
    options = dict(divergence=DIVERGENCES[name], temperature=temperature)
    found = cross_tokenizer.shared_divergence(student, teacher, student_ids=ids, teacher_ids=ids, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    renamed = teacher[:, np.argsort(order)]  # the teacher calls token i order[i]
    found = cross_tokenizer.shared_divergence(student, renamed, student_ids=ids, teacher_ids=order, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', DIVERGENCES)
def test_a_bucket_for_what_is_not_shared(name):
  student, teacher = normal(4, 6), normal(4, 8, seed=1)
  student_ids, teacher_ids = np.array([0, 2, 5]), np.array([7, 1, 3])
  found = cross_tokenizer.shared_divergence(
      student, teacher, student_ids=student_ids, teacher_ids=teacher_ids, divergence=DIVERGENCES[name]
  )
  q, p = (np.asarray(jax.nn.softmax(x))[:, ids] for x, ids in ((student, student_ids), (teacher, teacher_ids)))
  q, p = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], axis=-1) for x in (q, p))
  np.testing.assert_allclose(found, DIVERGENCES[name](np.log(q), np.log(p)), rtol=1e-4, atol=1e-6)


def test_no_bucket_where_one_side_could_put_nothing_there():
  student, teacher = normal(4, 3), normal(4, 8, seed=1)
  ids = dict(student_ids=np.array([0, 1, 2]), teacher_ids=np.array([7, 1, 3]))
  value, gradient = jax.value_and_grad(
      lambda x: cross_tokenizer.shared_divergence(x, teacher, **ids).sum()
  )(student)
  expected = distillation.forward_kl(student, teacher[:, np.array([7, 1, 3])]).sum()
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(gradient.sum(-1), jnp.zeros(4), atol=1e-6)


def test_pairs_of_ids_that_are_no_pairs():
  with pytest.raises(AssertionError):
    cross_tokenizer.shared_divergence(normal(2, 5), normal(2, 5), student_ids=np.arange(2), teacher_ids=np.arange(3))


def test_shared_divergence_gradients():
  student, teacher = normal(4, 6), normal(4, 8, seed=1)
  loss = lambda *x: cross_tokenizer.shared_divergence(
      *x, student_ids=np.array([0, 2, 5]), teacher_ids=np.array([7, 1, 3])
  ).sum()
  ours, theirs = jax.grad(loss, argnums=(0, 1))(student, teacher)
  np.testing.assert_array_equal(theirs, jnp.zeros_like(teacher))
  step = 1e-2 * normal(4, 6, seed=2)
  difference = (loss(student + step, teacher) - loss(student - step, teacher)) / 2
  np.testing.assert_allclose(jnp.sum(ours * step), difference, rtol=2e-3)


@pytest.mark.parametrize('loss', [
    cross_tokenizer.uld,
    functools.partial(cross_tokenizer.shared_divergence, student_ids=np.array([0]), teacher_ids=np.array([1])),
])  # fmt: skip
def test_argument_errors(loss):
  with pytest.raises(AssertionError):
    loss(normal(2, 5), normal(3, 5))
  with pytest.raises(ValueError, match='temperature 0 of .* must be positive'):
    loss(normal(2, 3), normal(2, 3), temperature=0)
  split = jax.shard_map(
      functools.partial(loss, axis_name='tensor'), mesh=sharding.make_mesh((1, 1, 2), devices=jax.devices()[:2]),
      in_specs=jax.sharding.PartitionSpec(None, 'tensor'), out_specs=jax.sharding.PartitionSpec(),
  )
  with pytest.raises(ValueError, match="split over mesh axis 'tensor'; .* or match likelihoods: .*binary_kl"):
    split(normal(2, 4), normal(2, 4))


# --- both, in a sweep

B, T, TEACHER_T, G, D, V, TEACHER_D, TEACHER_V = 3, 10, 12, 8, 6, 11, 5, 9
IDS = dict(student_ids=np.array([0, 3, 4, 8]), teacher_ids=np.array([8, 2, 0, 1]))


def random_groups(seed=0):
  """Groups as alignment makes them: consecutive tokens, some rows shorter; (student, teacher, valid, exact)."""
  generator = np.random.default_rng(seed)
  sides = -np.ones((B, T), np.int32), -np.ones((B, TEACHER_T), np.int32)
  valid, exact = np.zeros((2, B, G), bool)
  for row in range(B):
    sizes = generator.integers(1, 4, size=(4 - row, 2)) if row else np.array([[1, 1], [1, 1], [2, 1], [1, 3]])
    for side, groups in enumerate(sides):
      numbers = np.repeat(np.arange(len(sizes)), sizes[:, side])
      groups[row, 1 : 1 + len(numbers)] = numbers[: groups.shape[1] - 1]
    valid[row, : len(sizes)], exact[row, : len(sizes)] = True, (sizes == 1).all(axis=1)
  return *sides, valid, exact


@functools.lru_cache
def problem():
  heads = lm_head.Head(normal(B, T, D, scale=1.0), normal(D, V, seed=1, scale=1.0)), lm_head.Head(
      normal(B, TEACHER_T, TEACHER_D, seed=2, scale=1.0), normal(TEACHER_D, TEACHER_V, seed=3, scale=1.0)
  )
  generator = np.random.default_rng(4)
  targets = generator.integers(0, V, (B, T)), generator.integers(0, TEACHER_V, (B, TEACHER_T))
  return heads, targets, random_groups()


def token_logprobs(student_logits, teacher_logits, targets, *, axis_name):
  del teacher_logits
  return {'logprobs': cross_entropy.token_logprobs(student_logits, targets, axis_name=axis_name)}


def swept(student, teacher, *, chunk, mesh=None):
  """As a recipe does it: token log-probs of both sides, then one sweep over the first positions of the groups."""
  _, targets, (*groups, valid, exact) = problem()
  sides = list(zip((student, teacher), targets, groups))
  chunks = [
      token_groups.chunk_logprobs(
          lm_head.per_token(token_logprobs, head, ids, chunk=chunk, mesh=mesh)['logprobs'], group, num_groups=G
      )
      for head, ids, group in sides
  ]
  heads = [
      head._replace(hidden=token_groups.at_first_positions(head.hidden, group, num_groups=G))
      for head, _, group in sides
  ]
  found = lm_head.per_token(
      functools.partial(cross_tokenizer.hybrid, **IDS), heads[0],
      cross_tokenizer.GroupTargets(valid, exact, *(part.later for part in chunks)),
      teacher=heads[1], chunk=chunk, mesh=mesh,
  )
  uld = cross_tokenizer.with_later(found['uld'], found['slope'], chunks[0].later)
  shared = reductions.token_mean(found['shared'], exact)
  others = reductions.token_mean(uld, valid & ~exact)
  likelihood = reductions.token_mean(token_groups.binary_kl(chunks[0].whole, chunks[1].whole), valid)
  return {'shared': shared.total, 'uld': others.total, 'likelihood': likelihood.total}


def plain(student, teacher):
  """The same from whole logits with loops over rows and groups and plain automatic differentiation."""
  _, targets, (*groups, valid, exact) = problem()
  logits = [head.hidden @ head.kernel for head in (student, teacher)]
  logits[1] = jax.lax.stop_gradient(logits[1])
  total = {'shared': 0.0, 'uld': 0.0, 'likelihood': 0.0}
  for row, group in zip(*np.nonzero(valid)):
    tokens = [np.flatnonzero(side[row] == group) for side in groups]
    log_p = [jax.nn.log_softmax(x[row]) for x in logits]
    actual = [p[t, ids[row][t]] for p, t, ids in zip(log_p, tokens, targets)]
    first = [p[t[0]] for p, t in zip(log_p, tokens)]
    q, p = (jnp.exp(x + a[1:].sum()) for x, a in zip(first, actual))
    if exact[row, group]:
      q, p = (jnp.append(x[ids], 1 - x[ids].sum()) for x, ids in ((q, IDS['student_ids']), (p, IDS['teacher_ids'])))
      total['shared'] += jnp.sum(p * jnp.log(p / q))
    else:
      q, p = (jnp.sort(jnp.append(x, jnp.zeros(V - len(x)))) for x in (q, p))
      total['uld'] += jnp.abs(p - q).sum()
    q, p = (jnp.exp(a.sum() - 1e-6) for a in actual)
    total['likelihood'] += p * jnp.log(p / q) + (1 - p) * jnp.log((1 - p) / (1 - q))
  return total


def gradients(fn):
  """(values of the terms, gradients of their weighted sum on the student's head)."""
  def loss(student, teacher):
    found = fn(student, teacher)
    return found['shared'] + 2 * found['uld'] + 3 * found['likelihood'], found

  (_, values), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(*problem()[0])
  return values, gradient


@pytest.fixture(scope='module')
def expected():
  return gradients(plain)


def assert_same(found, expected):
  for term, value in expected[0].items():
    np.testing.assert_allclose(found[0][term], value, rtol=1e-4, atol=1e-5, err_msg=term)
  for ours, wanted in zip(found[1], expected[1]):
    np.testing.assert_allclose(ours, wanted, rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize('chunk', [0, 5, 100])
def test_a_chunked_sweep_is_the_plain_computation(chunk, expected):
  assert min(expected[0].values()) > 0.1 and np.abs(expected[1].hidden).max() > 0.1
  assert_same(gradients(functools.partial(swept, chunk=chunk)), expected)


def test_a_sweep_over_a_mesh(expected):
  mesh = sharding.make_mesh((1, 3, 1), devices=jax.devices()[:3])
  assert_same(gradients(functools.partial(swept, chunk=4, mesh=mesh)), expected)


def test_the_teacher_receives_no_gradient_from_a_sweep():
  (student, teacher), *_ = problem()
  for chunk in (0, 5):
    gradient = jax.jit(jax.grad(lambda head: sum(swept(student, head, chunk=chunk).values())))(teacher)
    assert not np.any(gradient.hidden) and not np.any(gradient.kernel)


def test_groups_that_do_not_exist_add_nothing():
  logits, targets = (normal(4, V), normal(4, TEACHER_V, seed=1)), (-normal(4) ** 2, -normal(4, seed=1) ** 2)

  @jax.jit
  def total(student, valid, exact):
    return cross_tokenizer.hybrid(student, logits[1], cross_tokenizer.GroupTargets(valid, exact, *targets), **IDS)

  nothing, ones = jnp.zeros(4), jnp.ones(4)
  for exact in (nothing, ones):
    assert not any(np.any(x) for x in total(logits[0], nothing, exact).values())
    gradient = jax.jit(jax.grad(lambda x: sum(v.sum() for v in total(x, nothing, exact).values())))(logits[0])
    np.testing.assert_array_equal(gradient, jnp.zeros_like(gradient))
  constant = jax.jit(jax.grad(lambda x: total(x, ones, nothing)['slope'].sum()))(logits[0])
  np.testing.assert_array_equal(constant, jnp.zeros_like(constant))
  found, half = total(logits[0], ones, nothing), jnp.array([1.0, 0.0, 1.0, 1.0])
  assert not np.any(found['shared']) and np.all(found['uld'] > 0) and np.all(found['slope'] != 0)
  mixed = total(logits[0], ones, half)
  np.testing.assert_array_equal(mixed['uld'], jnp.where(half > 0, 0.0, found['uld']))
  np.testing.assert_array_equal(mixed['shared'] > 0, half > 0)


def test_only_chunks_with_inexact_groups_are_sorted(monkeypatch):
  calls, original = [], cross_tokenizer._uld_and_slope

  def counted(*args, **options):
    jax.debug.callback(lambda: calls.append(1))
    return original(*args, **options)

  monkeypatch.setattr(cross_tokenizer, '_uld_and_slope', counted)
  for valid, exact, expected in (([1, 1], [1, 1], 0), ([1, 0], [1, 0], 0), ([1, 1], [1, 0], 1)):
    targets = cross_tokenizer.GroupTargets(jnp.array(valid), jnp.array(exact), jnp.zeros(2), jnp.zeros(2))
    cross_tokenizer.hybrid(normal(2, V), normal(2, TEACHER_V), targets, **IDS)
    jax.effects_barrier()
    assert len(calls) == expected


def test_hybrid_passes_its_options_on():
  student, teacher, later = normal(2, V), normal(2, TEACHER_V, seed=1), -jnp.array([[0.0, 0.5], [0.0, 1.5]])
  options = dict(divergence=distillation.reverse_kl, temperature=2.0, **IDS)
  targets = cross_tokenizer.GroupTargets(jnp.ones(2), jnp.array([1, 0]), *later)
  found = cross_tokenizer.hybrid(student, teacher, targets, **options)
  shared = cross_tokenizer.shared_divergence(student, teacher, **options)
  distance = cross_tokenizer.uld(student, teacher, student_later=later[0], teacher_later=later[1], temperature=2.0)
  np.testing.assert_allclose(found['shared'], jnp.array([shared[0], 0.0]), rtol=1e-5)
  np.testing.assert_allclose(found['uld'], jnp.array([0.0, distance[1]]), rtol=1e-5)
