"""The chunked lm head against plain whole logits: values, gradients, masks, meshes, memory and collectives."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax import sharding
from srm_jax.losses import cross_entropy, lm_head, vocabulary

Head = lm_head.Head
B, T, D, V, TEACHER_D = 4, 7, 8, 16, 12
TOLERANCE = dict(rtol=2e-5, atol=2e-5)


def nll(student, teacher, targets, *, axis_name):
  del teacher
  loss = cross_entropy.cross_entropy(student, targets, axis_name=axis_name)
  return loss, {'entropy': cross_entropy.entropy(student, axis_name=axis_name)}


def forward_kl(student, teacher, targets, *, axis_name):
  log_p = vocabulary.log_softmax(teacher, axis_name=axis_name)
  log_q = vocabulary.log_softmax(student, axis_name=axis_name)
  divergence = vocabulary.vocab_sum(jnp.exp(log_p) * (log_p - log_q), axis_name=axis_name)
  return divergence, {'nll': cross_entropy.cross_entropy(student, targets, axis_name=axis_name)}


def plain_nll(student, teacher, targets):
  logprobs = jax.nn.log_softmax(student)
  loss = -jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
  return loss, {'entropy': -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)}


def plain_forward_kl(student, teacher, targets):
  p = jax.nn.softmax(teacher)
  loss = jnp.sum(p * (jnp.log(p) - jax.nn.log_softmax(student)), axis=-1)
  return loss, {'nll': plain_nll(student, None, targets)[0]}


PLAIN = {nll: plain_nll, forward_kl: plain_forward_kl}


def as_dict(fn):
  def outputs(*args, axis_name):
    loss, aux = fn(*args, axis_name=axis_name)
    return {'loss': loss, **aux}

  return outputs


@functools.lru_cache
def problem(rows=B, time=T, features=D, entries=V):
  rng = np.random.default_rng(0)  # numpy: nothing to compile
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  student = Head(normal(rows, time, features), normal(features, entries))
  teacher = Head(normal(rows, time, TEACHER_D), normal(TEACHER_D, entries))
  targets = rng.integers(0, entries, (rows, time), dtype=np.int32)
  weights = np.where(rng.random((rows, time)) > 0.4, rng.random((rows, time)), 0.0).astype(np.float32)
  return student, teacher, targets, weights


def run_reduced(fn, data, **options):
  student, teacher, targets, weights = data
  loss = lambda s, w: lm_head.reduced(fn, s, targets, w, teacher=teacher, **options)
  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(student, weights)


def run_per_token(fn, data, **options):
  student, teacher, targets, weights = data

  def loss(s):
    outputs = lm_head.per_token(as_dict(fn), s, targets, teacher=teacher, **options)
    return later(outputs, weights), outputs

  return jax.jit(jax.value_and_grad(loss, has_aux=True))(student)


def later(outputs, weights):
  """A loss whose cotangents are known only after the forward."""
  return sum(jnp.sum(weights * jnp.sin(x)) for x in outputs.values())


def plain_reduced(fn, data):
  student, teacher, targets, weights = data

  def loss(s, w):
    values, aux = PLAIN[fn](s.hidden @ s.kernel, teacher.hidden @ teacher.kernel, targets)
    return jnp.sum(w * values), {name: jnp.sum(w * x) for name, x in aux.items()}

  value, (head, per_weight) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(student, weights)
  return value, (head, np.where(weights == 0, 0.0, per_weight))


def plain_per_token(fn, data):
  student, teacher, targets, weights = data

  def loss(s):
    values, aux = PLAIN[fn](s.hidden @ s.kernel, teacher.hidden @ teacher.kernel, targets)
    outputs = {'loss': values, **aux}
    return later(outputs, weights), outputs

  return jax.jit(jax.value_and_grad(loss, has_aux=True))(student)


def assert_close(actual, expected, **tolerance):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or TOLERANCE)), actual, expected)


# 28 tokens: 0 whole logits, 5 leaves a ragged last chunk, 28 one chunk, None the default.
@pytest.mark.parametrize('fn, chunk', [(nll, 5), (nll, None), (forward_kl, 0), (forward_kl, 5), (forward_kl, 28)])
def test_reduced_equals_plain_code(fn, chunk):
  assert_close(run_reduced(fn, problem(), chunk=chunk), plain_reduced(fn, problem()))


@pytest.mark.parametrize('fn, chunk', [(nll, 5), (forward_kl, 0), (forward_kl, None)])
def test_per_token_equals_plain_code(fn, chunk):
  assert_close(run_per_token(fn, problem(), chunk=chunk), plain_per_token(fn, problem()))


def poisoned(head, weights):
  return head._replace(hidden=np.where(weights[..., None] == 0, np.float32(np.nan), head.hidden))


def test_tokens_without_weight_add_exactly_nothing():
  student, teacher, targets, _ = problem()
  weights = np.zeros((B, T), np.float32)
  weights[0, :2] = 0.5  # With 4 a chunk, six of seven chunks are empty.
  result = run_reduced(forward_kl, (poisoned(student, weights), poisoned(teacher, weights), targets, weights), chunk=4)
  assert_close(result, plain_reduced(forward_kl, (student, teacher, targets, weights)))


def test_tokens_without_cotangent_add_exactly_nothing():
  student, teacher, targets, _ = problem()
  mask = np.zeros((B, T), np.float32)
  mask[0, :2] = 1

  def loss(s):
    outputs = lm_head.per_token(as_dict(nll), s, targets, chunk=4)
    return jnp.sum(jnp.where(mask == 0, 0.0, outputs['loss']))

  gradient = jax.jit(jax.grad(loss))(poisoned(student, mask))
  assert_close(gradient, plain_reduced(nll, (student, teacher, targets, mask))[1][0])


def test_a_batch_without_weights_is_zero_and_so_is_its_gradient():
  student, teacher, targets, weights = problem()
  result = run_reduced(forward_kl, (student, teacher, targets, 0 * weights), chunk=5)
  assert all(not np.any(x) for x in jax.tree.leaves(result))


@pytest.mark.parametrize('chunk', [5, 28])
def test_infinite_derivatives_of_unweighted_tokens_do_not_spread(chunk):
  # At equal logits, such as the zeros of the padding, the derivative of the root is infinite.
  root = lambda s, t, y, *, axis_name: (jnp.sqrt(vocabulary.vocab_sum(jnp.square(s), axis_name=axis_name)), {})
  student, _, targets, _ = problem()
  weights = np.ones((B, T), np.float32)
  weights[1] = 0
  loss = lambda s: lm_head.reduced(root, s, targets, weights, chunk=chunk)[0]
  value, gradient = jax.jit(jax.value_and_grad(loss))(student)
  expected = np.sum(weights * np.linalg.norm(student.hidden @ student.kernel, axis=-1))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))
  assert not np.any(gradient.hidden[1])


def test_teacher_and_auxiliaries_carry_no_gradient():
  student, teacher, targets, weights = problem()
  total = lambda t, chunk: lm_head.reduced(forward_kl, student, targets, weights, teacher=t, chunk=chunk)[0]
  metric = lambda s, chunk: lm_head.reduced(nll, s, targets, weights, chunk=chunk)[1]['entropy']
  both = jax.jit(lambda t, s, chunk: (jax.grad(total)(t, chunk), jax.grad(metric)(s, chunk)), static_argnums=2)
  for chunk in (0, 5):
    gradients = both(teacher, student, chunk)
    assert all(not np.any(x) for x in jax.tree.leaves(gradients))


def test_total_scales_its_gradient():
  student, _, targets, weights = problem()
  loss = lambda s: lm_head.reduced(nll, s, targets, weights, chunk=5)[0]
  once, squared = jax.jit(lambda s: (jax.value_and_grad(loss)(s), jax.grad(lambda s: loss(s) ** 2)(s)))(student)
  assert_close(squared, jax.tree.map(lambda x: 2 * once[0] * x, once[1]), rtol=1e-4, atol=1e-4)


def test_targets_may_be_any_tree_of_per_token_arrays():
  student, _, targets, weights = problem()
  ids = np.stack([targets, (targets + 1) % V], axis=-1)

  def two_targets(logits, teacher, targets, *, axis_name):
    both = [cross_entropy.cross_entropy(logits, targets['ids'][:, i], axis_name=axis_name) for i in range(2)]
    return targets['share'] * both[0] + (1 - targets['share']) * both[1], {}

  tree = {'ids': ids, 'share': np.linspace(0, 1, B * T, dtype=np.float32).reshape(B, T)}
  run = lambda chunk: jax.grad(lambda s: lm_head.reduced(two_targets, s, tree, weights, chunk=chunk)[0])(student)
  chunked, whole = jax.jit(lambda: (run(5), run(0)))()
  assert_close(chunked, whole)


def test_bfloat16_inputs():
  student, teacher, targets, weights = problem()
  half = lambda head: Head(*(x.astype(jnp.bfloat16) for x in head))
  full = lambda head: Head(*(x.astype(np.float32) for x in half(head)))
  (total, aux), (gradient, _) = run_reduced(forward_kl, (half(student), half(teacher), targets, weights), chunk=5)
  (expected, expected_aux), (expected_gradient, _) = plain_reduced(
    forward_kl, (full(student), full(teacher), targets, weights)
  )
  assert total.dtype == jnp.float32 and gradient.kernel.dtype == gradient.hidden.dtype == jnp.bfloat16
  # Logits are accumulated in float32 from the same numbers; only the gradients are rounded to bfloat16.
  assert_close((total, aux), (expected, expected_aux), rtol=1e-4)
  assert_close(jax.tree.map(lambda x: np.asarray(x, np.float32), gradient), expected_gradient, rtol=0.02, atol=0.02)


def test_kernel_gradient_is_accumulated_in_float32():
  tokens = 512
  student = Head(jnp.ones((1, tokens, 2), jnp.bfloat16), jnp.zeros((2, 2), jnp.bfloat16))
  first = lambda s, t, y, *, axis_name: (s[:, 0], {})
  targets = jnp.zeros((1, tokens), jnp.int32)
  loss = lambda s: lm_head.reduced(first, s, targets, jnp.ones((1, tokens)), chunk=1)[0]
  # 512 additions of 1 stop at 256 in bfloat16.
  np.testing.assert_array_equal(jax.jit(jax.grad(loss))(student).kernel[:, 0].astype(np.float32), tokens)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_product_added_in_blocks_is_the_product(dtype):
  rng = np.random.default_rng(0)
  left, right = (jnp.asarray(rng.normal(size=(7, size)), dtype) for size in (5, 24))
  total = jnp.asarray(rng.normal(size=(5, 24)), jnp.float32)
  parts = jax.jit(lm_head._add_product, static_argnames='blocks')(total, left, right, blocks=4)
  expected = total + left.astype(jnp.float32).T @ right.astype(jnp.float32)
  np.testing.assert_allclose(parts, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('vocabulary, blocks', [
    (151_936, 16), (152_064, 16), (8192, 2), (8191, 1), (2048, 1), (4097, 1),
])
def test_vocabularies_fall_into_equal_blocks(vocabulary, blocks):
  assert lm_head._blocks(vocabulary) == blocks and vocabulary % blocks == 0


def test_a_sweep_on_a_cpu_holds_no_second_gradient_of_the_kernel():
  tokens, features, entries = 64, 512, 16_384
  student = Head(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, tokens, features), (features, entries))))
  targets = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
  loss = lambda s, y: lm_head.reduced(nll, s, y, jnp.ones(y.shape), chunk=8)[0]
  memory = jax.jit(jax.grad(loss)).lower(student, targets).compile().memory_analysis()
  assert memory.temp_size_in_bytes < features * entries * 4 / 2, memory.temp_size_in_bytes


@pytest.mark.parametrize(
  'run, fn, shape, chunk',
  [
    (run_reduced, nll, (4, 7, 8, 16), 3),  # 7 tokens a device
    (run_reduced, forward_kl, (8, 3, 8, 16), 4),  # 6 tokens a device
    (run_reduced, forward_kl, (3, 7, 9, 16), 5),  # neither rows nor D divide
    (run_reduced, forward_kl, (4, 7, 8, 15), 3),  # the vocabulary does not divide
    (run_per_token, nll, (4, 7, 8, 16), 3),
    (run_per_token, forward_kl, (8, 3, 8, 16), 4),
  ],
)
def test_mesh_equals_one_device(run, fn, shape, chunk):
  mesh = sharding.make_mesh((2, 2, 2))
  plain = plain_reduced if run is run_reduced else plain_per_token
  assert_close(run(fn, problem(*shape), chunk=chunk, mesh=mesh), plain(fn, problem(*shape)))


@pytest.mark.parametrize('run', [run_reduced, run_per_token])
@pytest.mark.parametrize(
  'mesh, shape, chunk, axes',
  [
    ((2, 2, 2), (4, 7, 8, 32), 3, ('fsdp', 'tensor')),
    ((1, 8, 1), (8, 3, 8, 32), 16, 'fsdp'),  # two tokens a device and chunk
    ((1, 8, 1), (8, 3, 8, 32), None, 'fsdp'),
    ((1, 8, 1), (8, 3, 8, 8), 16, None),  # three times as many tokens as entries
  ],
)
def test_tokens_may_travel_instead_of_the_unembedding(run, mesh, shape, chunk, axes):
  """Values and gradients stay, with a teacher of another width, and numbers of tokens enter through the targets."""
  seen, (student, teacher, targets, weights) = set(), problem(*shape)
  share = np.linspace(0, 1, targets.size, dtype=np.float32).reshape(targets.shape)

  def shared(student_logits, teacher_logits, given, *, axis_name):
    seen.add(axis_name)
    loss, aux = forward_kl(student_logits, teacher_logits, given['id'], axis_name=axis_name)
    return given['share'] * loss, aux

  data = student, teacher, dict(id=targets, share=share), weights
  found = run(shared, data, chunk=chunk, mesh=sharding.make_mesh(mesh), split=True)
  assert seen == {axes}
  assert_close(found, run(shared, data, chunk=0))


def test_a_mesh_that_does_not_split_the_vocabulary_does_not_name_its_axis():
  seen = []

  def loss(student_logits, teacher_logits, targets, *, axis_name):
    seen.append(axis_name)  # what needs whole rows refuses any name
    return nll(student_logits, teacher_logits, targets, axis_name=axis_name)

  run_reduced(loss, problem(4, 7, 8, 16), chunk=3, mesh=sharding.make_mesh((1, 8, 1)))
  assert seen and not any(seen)
  run_reduced(loss, problem(4, 7, 8, 16), chunk=3, mesh=sharding.make_mesh((1, 4, 2)))
  assert seen[-1] == 'tensor'


def test_kernel_is_gathered_in_the_compute_dtype():
  student, _, targets, weights = problem()
  student = student._replace(hidden=student.hidden.astype(jnp.bfloat16))
  loss = lambda s: lm_head.reduced(nll, s, targets, weights, chunk=3, mesh=sharding.make_mesh((2, 2, 2)))[0]
  gathers = re.findall(r'all_gather.*?->\s*tensor<(\S+?)>', jax.jit(jax.grad(loss)).lower(student).as_text())
  assert gathers == [f'{D}x{V // 2}xbf16']


def test_chunks_need_a_quarter_of_the_memory():
  def temporary_bytes(chunk):
    shape = lambda size, dtype=jnp.float32: jax.ShapeDtypeStruct(size, dtype)
    student = Head(shape((4, 1024, 256)), shape((256, 32768)))
    loss = lambda s, y, w: lm_head.reduced(nll, s, y, w, chunk=chunk)
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    compiled = gradient.lower(student, shape((4, 1024), jnp.int32), shape((4, 1024))).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary_bytes(None) * 4 <= temporary_bytes(0)


@pytest.mark.parametrize(
  'tokens, entries, platform, expected',
  [
    (8192, 2048, 'cpu', 512),
    (8192, 512, 'cpu', 2048),
    (4096, 32768, 'cpu', 256),  # never below 256
    (100, 32768, 'cpu', 100),  # one chunk holds all
    (600, 32768, 'cpu', 200),  # evened out: three of 200 rather than 256 + 256 + 88
    (4096, 32768, 'tpu', 2048),
    (4096, 152064, 'tpu', 416),
  ],
)
def test_default_chunk(tokens, entries, platform, expected):
  assert lm_head.default_chunk(tokens, entries, platform=platform) == expected


def test_bad_arguments_are_refused():
  student, teacher, targets, weights = problem()
  with pytest.raises(ValueError, match='chunk -1'):
    lm_head.reduced(nll, student, targets, weights, chunk=-1)
  with pytest.raises(AssertionError):
    lm_head.per_token(as_dict(nll), student, targets[:, :3])
  with pytest.raises(AssertionError):
    lm_head.reduced(nll, Head(student.hidden, teacher.kernel), targets, weights)
  summed = lambda *args, axis_name: (jnp.sum(nll(*args, axis_name=axis_name)[0]), {})
  with pytest.raises(AssertionError):
    lm_head.reduced(summed, student, targets, weights, chunk=5)
