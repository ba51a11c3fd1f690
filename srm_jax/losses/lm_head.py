"""Any per-token loss from hidden states and the unembedding, without the `[B, T, V]` logits.

One sweep over chunks of tokens forms the logits of a chunk, applies a dense per-token function to them and drops them.
With a mesh the sweep runs inside `shard_map`: under automatic sharding every chunk would carry an all-reduce of dW or a
gather of W. The vocabulary stays split over 'tensor', which only per-token scalars cross inside the loop. Over 'fsdp'
one of two things travels:
  the unembedding: each device takes its own tokens; W is gathered once before the loop, in the compute dtype; dW is
    accumulated in float32 and reduced once after it.
  the tokens, where they are not many more than the vocabulary's entries and the caller's function allows it (`split`):
    each device takes a part of the vocabulary and, chunk by chunk, the tokens of all; none holds W or dW whole.

Two entry points, by what happens to the numbers afterwards:
  reduced: summed with weights known beforehand. dlogits are formed in the forward chunk and nothing is recomputed.
  per_token: handed out per token and differentiated later (log-probs in RL). The backward recomputes the logits.

Both take chunk=None (from `default_chunk`), a number of tokens that a device handles at a time, or 0: the whole logits
at once under plain automatic differentiation, which is the reference for the rest.

Per-token function: fn(student_logits [n, V], teacher_logits [n, Vt], targets [n], *, axis_name) on float32 logits;
teacher_logits is None without a teacher, and a tuple where a tuple of teachers was given. reduced wants (loss [n],
{name: [n]}), per_token {name: [n]}, all float32. V is the local slice where axis_name is not None, so fn reduces over
the vocabulary with `losses.vocabulary`. Soft caps and temperatures belong into fn; fn may close over constants, but
asking for their gradient is an error.
"""

import functools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from srm_jax.losses import head_layout

_MIN_CHUNK = 256
_MIN_BLOCK = 4096  # entries of the vocabulary, of a product that is added in blocks
# For one float32 [chunk, V] array; a step holds two to four. On the CPU a chunk pays while it stays near the caches;
# on accelerators dW, read and written once a chunk, wants large ones.
_CPU_BUDGET_BYTES = 4 * 2**20
_ACCELERATOR_BUDGET_BYTES = 256 * 2**20


class Head(NamedTuple):
  """What logits are made of: hidden [B, T, D] in the compute dtype, kernel [D, V] in the parameter dtype."""

  hidden: Any
  kernel: Any


class _How(NamedTuple):
  """What callers choose."""

  chunk: int | None
  mesh: Any
  split: bool


def reduced(fn, student, targets, weights, *, teacher=None, chunk=None, mesh=None, split=False):
  """Weighted sums of a per-token loss and of its auxiliary numbers.

  total = sum_bt weights_bt loss_bt, and alike for every auxiliary.

  A token of weight exactly 0 adds exactly nothing, whatever its hidden state holds. Gradients flow to the student and
  to the weights; the teacher, the targets and the auxiliaries carry none.

  Args:
    fn: per-token function with result (loss [n], {name: [n]}).
    student: Head of [B, T, D] and [D, V].
    targets: [B, T], or a pytree of [B, T, ...] where fn needs more per token.
    weights: [B, T].
    teacher: Head of [B, T, Dt] and [Dt, Vt], a tuple of Heads, or None.
    chunk: tokens per step on each device; None from `default_chunk`, 0 all logits at once.
    mesh: device mesh with Auto axes, or None.
    split: fn also takes a vocabulary that is split over 'fsdp'; without it only 'tensor' splits one.

  Returns:
    (float32 scalar, {name: float32 scalar}).

  Raises:
    ValueError: chunk is negative.
    AssertionError: shapes disagree, or fn returns something else than one number per token.
  """
  fn, teacher = _as_tuple(fn, teacher)
  _check(student, teacher, targets, chunk)
  weights = weights.astype(jnp.float32)
  if chunk != 0:
    return _reduced(fn, _How(chunk, mesh, split), student, teacher, targets, weights)
  loss, aux = _dense(fn, student, teacher, targets, weights != 0)
  return _totals(loss, aux, weights)


def per_token(fn, student, targets, *, teacher=None, chunk=None, mesh=None, split=False):
  """Per-token numbers that may be differentiated later; the backward recomputes the logits chunk by chunk.

  Gradients flow to the student. A token whose cotangents are all 0 adds exactly nothing to them.

  Args:
    fn: per-token function with result {name: [n]}.
    student: Head of [B, T, D] and [D, V].
    targets: [B, T], or a pytree of [B, T, ...].
    teacher: as in `reduced`.
    chunk: as in `reduced`.
    mesh, split: as in `reduced`.

  Returns:
    {name: float32 [B, T]}.

  Raises:
    ValueError, AssertionError: as in `reduced`.
  """
  fn, teacher = _as_tuple(fn, teacher)
  _check(student, teacher, targets, chunk)
  if chunk != 0:
    return _per_token(fn, _How(chunk, mesh, split), student, teacher, targets)
  return _dense(fn, student, teacher, targets, None)


def default_chunk(tokens, vocabulary, *, platform):
  """Tokens per chunk: one float32 `[chunk, vocabulary]` array in a budget, at least 256, evened out over the chunks.

  The budget is 4 MiB on a CPU and 256 MiB on an accelerator. Chunks below 256 tokens starve the matrix products.

  Args:
    tokens: tokens of one device.
    vocabulary: vocabulary entries of one device, the larger of student and teacher.
    platform: name of a JAX backend, such as 'cpu' or 'tpu'.

  Returns:
    int >= 1; `tokens` where one chunk is enough.
  """
  budget = _CPU_BUDGET_BYTES if platform == 'cpu' else _ACCELERATOR_BUDGET_BYTES
  limit = max(_MIN_CHUNK, budget // (4 * vocabulary))
  chunks = math.ceil(tokens / limit)
  return max(1, tokens) if chunks <= 1 else 8 * math.ceil(tokens / (8 * chunks))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _reduced(fn, how, student, teacher, targets, weights):
  (loss, aux), _ = _sweep(fn, how, student, teacher, targets, None)
  return _totals(loss, aux, weights)


def _reduced_forward(fn, how, student, teacher, targets, weights):
  (loss, aux), gradient = _sweep(fn, how, student, teacher, targets, weights)
  return _totals(loss, aux, weights), (gradient, jnp.where(weights != 0, loss, 0.0))


def _reduced_backward(fn, how, residuals, cotangents):
  gradient, loss = residuals
  scale = cotangents[0]  # The auxiliaries' cotangents are dropped: they are metrics.
  return jax.tree.map(lambda x: (scale * x).astype(x.dtype), gradient), None, None, scale * loss


_reduced.defvjp(_reduced_forward, _reduced_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _per_token(fn, how, student, teacher, targets):
  (outputs, _), _ = _sweep(_without_aux(fn), how, student, teacher, targets, None)
  return outputs


def _per_token_forward(fn, how, student, teacher, targets):
  return _per_token(fn, how, student, teacher, targets), (student, teacher, targets)


def _per_token_backward(fn, how, residuals, cotangents):
  _, gradient = _sweep(_without_aux(fn), how, *residuals, cotangents)
  return gradient, None, None


_per_token.defvjp(_per_token_forward, _per_token_backward)


def _without_aux(fn):
  return lambda *args, axis_name: (fn(*args, axis_name=axis_name), {})


def _totals(loss, aux, weights):
  # where, not a product alone: the loss of an unweighted token need not be finite.
  total = lambda x: jnp.sum(jnp.where(weights != 0, weights * x, 0.0))
  return total(loss), jax.tree.map(lambda x: total(jax.lax.stop_gradient(x)), aux)


def _as_tuple(fn, teacher):
  """(fn of a tuple of logits, tuple of Heads), whatever the caller has."""
  if isinstance(teacher, tuple) and not isinstance(teacher, Head):
    return fn, teacher

  def of_one(student_logits, teacher_logits, targets, *, axis_name):
    return fn(student_logits, *(teacher_logits or (None,)), targets, axis_name=axis_name)

  return of_one, () if teacher is None else (teacher,)


def _check(student, teacher, targets, chunk):
  heads = [student, *teacher]
  for head in heads:
    chex.assert_rank([head.hidden, head.kernel], [3, 2])
    chex.assert_axis_dimension(head.kernel, 0, head.hidden.shape[-1])
  chex.assert_equal_shape_prefix([head.hidden for head in heads] + jax.tree.leaves(targets), 2)
  if chunk is not None and chunk < 0:
    raise ValueError(f'chunk {chunk} is negative; give tokens per step, 0 for all at once, None for the default')


def _dense(fn, student, teacher, targets, active):
  """fn on the logits of all tokens, as plain traced code; every leaf of the result is [B, T]."""
  # Flat first: a weight gradient that contracts two dimensions is markedly slower on the CPU.
  flat = functools.partial(jax.tree.map, _flat)
  logits = lambda head: _logits(_where_active(flat(active), flat(head.hidden)), head.kernel)
  theirs = tuple(jax.lax.stop_gradient(logits(head)) for head in teacher)
  result = _apply(fn, logits(student), theirs, flat(targets), None)
  return jax.tree.map(lambda x: x.reshape(student.hidden.shape[:2]), result)


def _sweep(fn, how, student, teacher, targets, cotangents):
  """((outputs, aux), student gradient or None): every leaf of outputs and aux is [B, T].

  cotangents matches fn's first result; None asks for values alone.
  """
  shapes = [kernel.shape for kernel in (student.kernel, *(head.kernel for head in teacher))]
  layout = head_layout.choose(how.mesh, student.hidden.shape[:2], *shapes, split=how.split)
  platform = jax.default_backend() if how.mesh is None else _platform(how.mesh)
  local = functools.partial(_local_sweep, fn, how.chunk, platform, layout)
  if not layout.rows and not layout.vocab:
    return local(student, teacher, targets, cotangents)
  rows = PartitionSpec(layout.rows)
  student_spec, *teacher_spec = (Head(rows, PartitionSpec(embed, layout.axis_name)) for embed in layout.embeds)
  return jax.shard_map(
    local,
    mesh=how.mesh,
    in_specs=(student_spec, tuple(teacher_spec), rows, rows),
    out_specs=(rows, None if cotangents is None else student_spec),
  )(student, teacher, targets, cotangents)


def _platform(mesh):
  device = mesh.abstract_mesh.abstract_device
  return jax.default_backend() if device is None else device.platform


def _local_sweep(fn, chunk, platform, layout, student, teacher, targets, cotangents):
  """The sweep over the tokens of one device."""
  shape = student.hidden.shape[:2]
  kernel, *teacher_kernels = map(_whole_kernel, (student, *teacher), layout.embeds)
  widest = max(k.shape[1] for k in (kernel, *teacher_kernels))
  parts = 1 if layout.tokens is None else jax.lax.axis_size(layout.tokens)
  chunk = chunk or default_chunk(parts * math.prod(shape), widest, platform=platform)
  step = functools.partial(_step, fn, layout.axis_name, kernel, tuple(teacher_kernels))
  if parts > 1:
    chunk, step = math.ceil(chunk / parts), functools.partial(_together, step, layout.tokens)
  add = functools.partial(_add_product, blocks=_blocks(kernel.shape[1]) if platform == 'cpu' else 1)
  streams = (student.hidden, tuple(head.hidden for head in teacher), targets, cotangents)
  start = None if cotangents is None else _zeros(kernel.shape, layout)
  (outputs, dhidden), dkernel = _over_chunks(step, add, start, streams, math.ceil(math.prod(shape) / chunk), chunk)
  outputs, dhidden = jax.tree.map(lambda x: x[: math.prod(shape)].reshape(shape + x.shape[1:]), (outputs, dhidden))
  return outputs, None if cotangents is None else _reduce_gradient(Head(dhidden, dkernel), layout, student)


def _over_chunks(step, add, dkernel, streams, count, chunk):
  """step on [b, t, ...] streams, chunk by chunk: ((outputs, dhidden) [>= b t, ...], summed dkernel)."""
  if count == 1:  # No loop, no padding, and no zeros to add to.
    outputs, dhidden, factors = step(*jax.tree.map(_flat, streams))
    return (outputs, dhidden), None if factors is None else _contract(*factors, 0, 0)

  def body(dkernel, piece):
    outputs, dhidden, factors = step(*piece)
    return (None if factors is None else add(dkernel, *factors)), (outputs, dhidden)

  dkernel, results = jax.lax.scan(body, dkernel, jax.tree.map(lambda x: _split(x, count, chunk), streams))
  return jax.tree.map(_flat, results), dkernel


def _step(fn, axis_name, kernel, teacher_kernels, hidden, teacher_hidden, targets, cotangents):
  """One chunk: ((outputs, aux), dhidden [n, D], (hidden [n, D], dlogits [n, V]) of dkernel); the gradients None
  without cotangents.
  """
  active = None if cotangents is None else _any_nonzero(cotangents)
  hidden = _where_active(active, hidden)
  logits = _logits(hidden, kernel)
  teacher_logits = tuple(map(_logits, teacher_hidden, teacher_kernels))
  apply = lambda x: _apply(fn, x, teacher_logits, targets, axis_name)
  if cotangents is None:
    return apply(logits), None, None
  outputs, pull, aux = jax.vjp(apply, logits, has_aux=True)
  # Masked again: the teacher need not be finite here, nor the derivative (a square root at 0).
  dlogits = _where_active(active, pull(cotangents)[0]).astype(hidden.dtype)
  dhidden = _contract(dlogits, kernel, 1, 1)
  if axis_name is None:
    dhidden = dhidden.astype(hidden.dtype)  # Otherwise a partial sum, rounded after the reduction.
  return (outputs, aux), dhidden, (hidden, dlogits)


def _together(step, axis_name, *streams):
  """step on the tokens of all devices along the axis; each keeps the results of its own."""
  whole = lambda x: jax.lax.all_gather(x, axis_name, tiled=True, to='invarying')
  outputs, dhidden, factors = step(*jax.tree.map(whole, streams))
  count = len(jax.tree.leaves(streams)[0])
  own = lambda x: jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis_name) * count, count)
  if dhidden is not None:
    dhidden = jax.lax.psum_scatter(dhidden, axis_name, tiled=True)
  return jax.tree.map(own, outputs), dhidden, factors


def _add_product(total, left, right, *, blocks):
  """total [D, V] + left^T right, for left [n, D] and right [n, V].

  A CPU forms the product before it adds, which takes as much memory as the total: in blocks of V it takes a part of it.
  Accelerators add while they multiply.
  """
  if blocks == 1:
    return total + _contract(left, right, 0, 0)
  width = right.shape[1] // blocks

  def step(index, total):
    part = jax.lax.dynamic_slice_in_dim(right, index * width, width, axis=1)
    before = jax.lax.dynamic_slice_in_dim(total, index * width, width, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(total, before + _contract(left, part, 0, 0), index * width, axis=1)

  return jax.lax.fori_loop(0, blocks, step, total)


def _blocks(vocabulary):
  """How many equal blocks a vocabulary falls into: at most 16, each wide enough for a product to be fast."""
  wide = (count for count in range(16, 1, -1) if vocabulary % count == 0 and vocabulary // count >= _MIN_BLOCK)
  return next(wide, 1)


def _apply(fn, logits, teacher_logits, targets, axis_name):
  result = fn(logits, teacher_logits, targets, axis_name=axis_name)
  chex.assert_shape(jax.tree.leaves(result), logits.shape[:1])
  return result


def _reduce_gradient(gradient, layout, student):
  """Sums the partial gradients of the devices, once, in float32."""
  dhidden, dkernel = gradient
  partial = tuple(axis for axis in layout.vocab if axis != layout.tokens)
  if partial:
    dhidden = jax.lax.psum(dhidden, partial)
  if layout.embeds[0]:
    dkernel = jax.lax.psum_scatter(dkernel, layout.embeds[0], scatter_dimension=0, tiled=True)
  rest = tuple(axis for axis in layout.rows if axis not in (layout.embeds[0], layout.tokens))
  if rest:
    dkernel = jax.lax.psum(dkernel, rest)
  return Head(dhidden.astype(student.hidden.dtype), dkernel.astype(student.kernel.dtype))


def _contract(left, right, left_axis, right_axis):
  dimensions = (((left_axis,), (right_axis,)), ((), ()))
  return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _logits(hidden, kernel):
  return _contract(hidden, kernel.astype(hidden.dtype), hidden.ndim - 1, 0)


def _whole_kernel(head, axis_name):
  """The kernel in the compute dtype, cast before it is gathered."""
  kernel = head.kernel.astype(head.hidden.dtype)
  return kernel if axis_name is None else jax.lax.all_gather(kernel, axis_name, axis=0, tiled=True)


def _zeros(shape, layout):
  """float32 zeros, marked as varying over the mesh axes over which the loop's partial sums vary."""
  axes = tuple(dict.fromkeys(layout.rows + layout.vocab))
  zeros = jnp.zeros(shape, jnp.float32)
  return jax.lax.pcast(zeros, axes, to='varying') if axes else zeros


def _any_nonzero(cotangents):
  return functools.reduce(jnp.logical_or, [x != 0 for x in jax.tree.leaves(cotangents)])


def _where_active(active, values):
  return values if active is None else jnp.where(active[..., None], values, jnp.zeros((), values.dtype))


def _flat(x):
  """[b, t, ...] -> [b t, ...]."""
  return x.reshape((-1,) + x.shape[2:])


def _split(x, count, chunk):
  """[b, t, ...] -> [count, chunk, ...], padded with zeros at the end."""
  flat = _flat(x)
  padding = [(0, count * chunk - flat.shape[0])] + [(0, 0)] * (flat.ndim - 1)
  return jnp.pad(flat, padding).reshape((count, chunk) + flat.shape[1:])
