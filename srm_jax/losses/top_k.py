"""Divergences to a teacher of whom only the k likeliest tokens are known: cached, served, or cut to save memory.

The student's logits [..., V] stay whole; the teacher is a `TopK`, or any record with its fields, of k ids and
log-probabilities a token. p is the teacher, q the student, M the mass of p outside the k. A policy says what becomes
of M:

  renormalise  both are conditioned on the k tokens. What the student puts elsewhere costs nothing.
  zero         the teacher is conditioned on its k tokens, the student is not: what it puts elsewhere is wrong. What
               asks for KL(q || p) is infinite, and refused; where k = V and ids are passed over, it is some 1e30.
  tail         the tokens elsewhere become one more token, of mass M for the teacher. Never above the full divergence,
               since merging outcomes only loses information, and 0 where the student equals the teacher.

With k = V all of them are the full divergence of `distillation`. Peers differ: Tunix and MaxText renormalise, EasyDeL
zeroes, TRL keeps a tail. A teacher that is neither conditioned nor has a tail sums to 1 - M: its KL(p || q) can be
negative and has the gradient of `zero` times 1 - M, so it is not offered.

The k tokens that are likeliest at one temperature are so at every other, and on them p^(1 / T) only needs a new
normaliser: `renormalise` and `zero` are exact at every temperature. How much the tokens elsewhere weigh at another
temperature is not in the cache, so `tail` takes none but the cache's own, `teacher_temperature`.

Everything is [..., k] but two passes over the student's row; no [..., V, k] is formed. `axis_name` names the mesh axis
that splits V inside `shard_map`: every device looks up what it holds, and k numbers a token cross the axis. The teacher
receives no gradient.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from srm_jax.losses import divergences, vocabulary

# Least mass of the teacher's tail: 1 - sum p is exact to 6e-8, and a tail of 0 would make KL(q || p) infinite.
_SMALLEST_TAIL = 1e-8


class TopK(NamedTuple):
  """What is known of the teacher's distributions, a row a token.

  ids: int [..., k] global vocabulary ids, different within a row; ids outside the vocabulary (-1 where there are fewer
    than k tokens) are passed over, and their mass goes to the tail.
  logprobs: [..., k], of the whole distribution, not of the k: exp sums to 1 - tail; -inf is passed over too.
  tail: [...] the mass of all other tokens; None for 1 - sum exp(logprobs), which rounds at 1e-7.
  """

  ids: Any
  logprobs: Any
  tail: Any = None


def truncate(teacher_logits, *, k, temperature=1.0):
  """The k likeliest tokens of a teacher that is at hand.

  Args:
    teacher_logits: [..., V], the whole vocabulary.
    k: how many tokens to keep, at most V.
    temperature: positive number that divides the logits; the `teacher_temperature` of what uses the result.

  Returns:
    TopK of [..., k], likeliest first, float32, without gradient.

  Raises:
    ValueError: if k is not in [1, V] or the temperature is not positive.
  """
  size = teacher_logits.shape[-1]
  if not 1 <= k <= size:
    raise ValueError(f'k {k} of truncate is not between 1 and the {size} tokens of the vocabulary')
  divergences.assert_positive_temperature(temperature)
  logits = divergences.finite(jax.lax.stop_gradient(teacher_logits), temperature)
  values, ids = jax.lax.top_k(logits, k)
  elsewhere, total, largest = _masses(logits, ids, None)
  return TopK(ids, _normalized(values, total, largest), elsewhere / total)


def forward_kl(
    student_logits, teacher, *, policy='tail', temperature=1.0, teacher_temperature=1.0, axis_name=None
):
  """Forward KL to a truncated teacher.

  KL(p || q) over the k tokens and what the policy adds

  Args:
    student_logits: [..., V].
    teacher: TopK of [..., k].
    policy: name in POLICIES.
    temperature: positive number at which the two are compared.
    teacher_temperature: the temperature of the teacher's log-probabilities.
    axis_name: mesh axis over which V is split, or None.

  Returns:
    [...] divergence per token, float32.

  Raises:
    AssertionError: if the shapes do not fit.
    ValueError: if the policy is unknown, k exceeds V, a temperature is not positive, or 'tail' is asked to change it.

  Reference: Anshumann et al., Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs, arXiv 2503.16870, on
  what truncation does to forward KL.
  """
  log_q, log_p = _log_probs(student_logits, teacher, policy, temperature, teacher_temperature, axis_name)
  return divergences.kl(log_p, log_q)


def reverse_kl(
    student_logits, teacher, *, policy='tail', temperature=1.0, teacher_temperature=1.0, axis_name=None
):
  """Reverse KL to a truncated teacher; not under 'zero', where it is infinite.

  KL(q || p) over the k tokens and what the policy adds

  Args:
    student_logits: [..., V].
    teacher: TopK of [..., k].
    policy: name in POLICIES.
    temperature: positive number at which the two are compared.
    teacher_temperature: the temperature of the teacher's log-probabilities.
    axis_name: mesh axis over which V is split, or None.

  Returns:
    [...] divergence per token, float32.

  Raises:
    AssertionError: if the shapes do not fit.
    ValueError: as `forward_kl`, and if the policy is 'zero' while k is below V.
  """
  _refuse_zero('reverse_kl', student_logits, teacher, policy, axis_name)
  log_q, log_p = _log_probs(student_logits, teacher, policy, temperature, teacher_temperature, axis_name)
  return divergences.kl(log_q, log_p)


def jensen_shannon(
    student_logits, teacher, *, beta=0.5, policy='tail', temperature=1.0, teacher_temperature=1.0, axis_name=None
):
  """Generalised Jensen-Shannon divergence to a truncated teacher, end points as in `distillation.jensen_shannon`.

  D_b = b KL(p || m) + (1 - b) KL(q || m),  m = b p + (1 - b) q,  over the k tokens and what the policy adds

  Args:
    student_logits: [..., V].
    teacher: TopK of [..., k].
    beta: number in [0, 1], the weight of the teacher.
    policy: name in POLICIES.
    temperature: positive number at which the two are compared.
    teacher_temperature: the temperature of the teacher's log-probabilities.
    axis_name: mesh axis over which V is split, or None.

  Returns:
    [...] divergence per token, float32.

  Raises:
    AssertionError: if the shapes do not fit.
    ValueError: as `forward_kl`, if beta is outside [0, 1], and if it is 1 under 'zero' while k is below V.

  Reference: Agarwal et al., On-Policy Distillation of Language Models, arXiv 2306.13649.
  """
  beta = divergences.unit_interval('jensen_shannon', 'beta', beta)
  if divergences.concrete(beta) == 1:
    _refuse_zero('jensen_shannon with beta 1', student_logits, teacher, policy, axis_name)
  log_q, log_p = _log_probs(student_logits, teacher, policy, temperature, teacher_temperature, axis_name)
  return divergences.jensen_shannon(log_p, log_q, beta=beta)


def skew_kl(
    student_logits, teacher, *, alpha=0.1, policy='tail', temperature=1.0, teacher_temperature=1.0, axis_name=None
):
  """Skew forward KL to a truncated teacher.

  KL(p || a p + (1 - a) q) over the k tokens and what the policy adds

  Args:
    student_logits: [..., V].
    teacher: TopK of [..., k].
    alpha: number in [0, 1], the share of the teacher in the mixture.
    policy: name in POLICIES.
    temperature: positive number at which the two are compared.
    teacher_temperature: the temperature of the teacher's log-probabilities.
    axis_name: mesh axis over which V is split, or None.

  Returns:
    [...] divergence per token, float32.

  Raises:
    AssertionError: if the shapes do not fit.
    ValueError: as `forward_kl`, and if alpha is outside [0, 1].

  Reference: Ko, Kim, Chen, Yun, DistiLLM: Towards Streamlined Distillation for Large Language Models, arXiv 2402.03898.
  """
  alpha = divergences.unit_interval('skew_kl', 'alpha', alpha)
  log_q, log_p = _log_probs(student_logits, teacher, policy, temperature, teacher_temperature, axis_name)
  return divergences.kl(log_p, divergences.log_mixture(log_p, log_q, alpha))


def skew_reverse_kl(
    student_logits, teacher, *, alpha=0.1, policy='tail', temperature=1.0, teacher_temperature=1.0, axis_name=None
):
  """Skew reverse KL to a truncated teacher.

  KL(q || (1 - a) p + a q) over the k tokens and what the policy adds

  Args:
    student_logits: [..., V].
    teacher: TopK of [..., k].
    alpha: number in [0, 1], the share of the student in the mixture.
    policy: name in POLICIES.
    temperature: positive number at which the two are compared.
    teacher_temperature: the temperature of the teacher's log-probabilities.
    axis_name: mesh axis over which V is split, or None.

  Returns:
    [...] divergence per token, float32.

  Raises:
    AssertionError: if the shapes do not fit.
    ValueError: as `forward_kl`, if alpha is outside [0, 1], and if it is 0 under 'zero' while k is below V.

  Reference: Ko, Kim, Chen, Yun, DistiLLM: Towards Streamlined Distillation for Large Language Models, arXiv 2402.03898.
  """
  alpha = divergences.unit_interval('skew_reverse_kl', 'alpha', alpha)
  if divergences.concrete(alpha) == 0:
    _refuse_zero('skew_reverse_kl with alpha 0', student_logits, teacher, policy, axis_name)
  log_q, log_p = _log_probs(student_logits, teacher, policy, temperature, teacher_temperature, axis_name)
  return divergences.kl(log_q, divergences.log_mixture(log_q, log_p, alpha))


def total_variation(
    student_logits, teacher, *, policy='tail', temperature=1.0, teacher_temperature=1.0, axis_name=None
):
  """Total variation distance to a truncated teacher, in [0, 1].

  1/2 sum |p - q| over the k tokens and what the policy adds

  Args:
    student_logits: [..., V].
    teacher: TopK of [..., k].
    policy: name in POLICIES.
    temperature: positive number at which the two are compared.
    teacher_temperature: the temperature of the teacher's log-probabilities.
    axis_name: mesh axis over which V is split, or None.

  Returns:
    [...] distance per token, float32.

  Raises:
    AssertionError: if the shapes do not fit.
    ValueError: as `forward_kl`.

  Reference: Wen, Li, Du, Mou, f-Divergence Minimization for Sequence-Level Knowledge Distillation, arXiv 2307.15190.
  """
  log_q, log_p = _log_probs(student_logits, teacher, policy, temperature, teacher_temperature, axis_name)
  return divergences.total_variation(log_p, log_q)


def _log_probs(student_logits, teacher, policy, temperature, teacher_temperature, axis_name):
  """Student's and teacher's log-probabilities of the k tokens, or of these and the rest: float32 [..., k (+ 1)]."""
  _check(student_logits, teacher, policy, axis_name)
  for value in (temperature, teacher_temperature):
    divergences.assert_positive_temperature(value)
  is_truncated = teacher.ids.shape[-1] < _vocabulary_size(student_logits, axis_name)
  numbers = {divergences.concrete(temperature), divergences.concrete(teacher_temperature)}
  if policy == 'tail' and is_truncated and (len(numbers) > 1 or None in numbers):
    raise ValueError(
        f"policy 'tail' cannot take log-probabilities of temperature {teacher_temperature} to {temperature}: the mass "
        f"of the other tokens there is not known; cache them at that temperature, or choose 'renormalise' or 'zero'"
    )
  logprobs = jax.lax.stop_gradient(teacher.logprobs).astype(jnp.float32)
  teacher = TopK(teacher.ids.astype(jnp.int32), logprobs, teacher.tail)
  logits = divergences.finite(student_logits, temperature)
  return POLICIES[policy](logits, teacher, teacher_temperature / temperature, axis_name)


def _renormalise(logits, teacher, power, axis_name):
  values, listed = _look_up(logits, teacher.ids, axis_name)
  listed &= teacher.logprobs > divergences.ABSENT
  return (
      jax.nn.log_softmax(jnp.where(listed, values, divergences.ABSENT)),
      jax.nn.log_softmax(jnp.where(listed, power * teacher.logprobs, divergences.ABSENT)),
  )


def _zero(logits, teacher, power, axis_name):
  log_q, listed, _ = _student(logits, teacher, axis_name)
  log_p = jax.nn.log_softmax(jnp.where(listed, power * teacher.logprobs, divergences.ABSENT))
  log_p = _append(log_p, jnp.full(log_p.shape[:-1], divergences.ABSENT))
  # Of a teacher that lists nothing nothing is known: the student is right.
  return log_q, jnp.where(jnp.any(listed, axis=-1, keepdims=True), log_p, jax.lax.stop_gradient(log_q))


def _tail(logits, teacher, power, axis_name):
  log_q, listed, is_whole = _student(logits, teacher, axis_name)
  p = jnp.exp(teacher.logprobs)
  mass = jnp.maximum(1 - jnp.sum(p, axis=-1), 0.0) if teacher.tail is None else teacher.tail
  mass = jax.lax.stop_gradient(mass).astype(jnp.float32) + jnp.sum(jnp.where(listed, 0.0, p), axis=-1)
  tail = jnp.where(is_whole, divergences.ABSENT, jnp.log(jnp.maximum(mass, _SMALLEST_TAIL)))
  log_p = _append(jnp.where(listed, power * teacher.logprobs, divergences.ABSENT), tail)
  # What was rounded when it was cached sums to 1 again.
  return log_q, jax.nn.log_softmax(log_p)


def _student(logits, teacher, axis_name):
  """Log-probabilities of the k tokens and of all others together [..., k + 1], which are listed, and if all are."""
  values, listed = _look_up(logits, teacher.ids, axis_name)
  listed &= teacher.logprobs > divergences.ABSENT
  elsewhere, total, largest = _masses(logits, jnp.where(listed, teacher.ids, -1), axis_name)
  is_whole = jnp.sum(listed, axis=-1) == _vocabulary_size(logits, axis_name)
  # Summed over the others: 1 minus the sum over the k would be rounding where the student is sure.
  tail = jnp.log(jnp.maximum(elsewhere, jnp.finfo(jnp.float32).tiny)) - jnp.log(total)
  log_q = jnp.where(listed, _normalized(values, total, largest), divergences.ABSENT)
  return _append(log_q, tail), listed, is_whole


def _masses(logits, ids, axis_name):
  """sum exp(logits - largest) over the tokens not in ids and over all, and largest: [...] each."""
  local, inside = _local(logits, ids, axis_name)
  # Out of bounds is dropped.
  places = jnp.where(inside, local, logits.shape[-1])
  listed = jnp.put_along_axis(jnp.zeros(logits.shape, bool), places, True, axis=-1, inplace=False, mode='drop')
  largest = vocabulary.vocab_max(logits, axis_name=axis_name)
  masses = jnp.exp(logits - largest[..., None])
  elsewhere = vocabulary.vocab_sum(jnp.where(listed, 0.0, masses), axis_name=axis_name)
  return elsewhere, vocabulary.vocab_sum(masses, axis_name=axis_name), largest


def _normalized(values, total, largest):
  """Log-probabilities of values [..., k], from what `_masses` returns."""
  return values - largest[..., None] - jnp.log(total)[..., None]


def _look_up(logits, ids, axis_name):
  """logits[..., ids], 0 for ids that no device holds, and which ids some device holds: [..., k] each."""
  local, inside = _local(logits, ids, axis_name)
  # Local even where the vocabulary is split, unlike the same call under automatic sharding.
  values = jnp.take_along_axis(logits, jnp.where(inside, local, 0), axis=-1)
  values, held = jnp.where(inside, values, 0.0), inside.astype(jnp.int32)
  if axis_name is not None:
    values, held = jax.lax.psum((values, held), axis_name)
  return values, held > 0


def _local(logits, ids, axis_name):
  """ids relative to this device's slice of the vocabulary, and whether they lie in it."""
  size = logits.shape[-1]
  local = ids if axis_name is None else ids - jax.lax.axis_index(axis_name) * size
  return local, (local >= 0) & (local < size)


def _append(values, last):
  return jnp.concatenate([values, last[..., None]], axis=-1)


def _vocabulary_size(logits, axis_name):
  return logits.shape[-1] * (1 if axis_name is None else jax.lax.axis_size(axis_name))


def _refuse_zero(divergence, student_logits, teacher, policy, axis_name):
  if policy == 'zero' and teacher.ids.shape[-1] < _vocabulary_size(student_logits, axis_name):
    raise ValueError(
        f"{divergence} is infinite under the policy 'zero', which leaves the teacher without mass on most of the "
        f"vocabulary; choose 'tail' or 'renormalise'"
    )


def _check(student_logits, teacher, policy, axis_name):
  chex.assert_equal_shape([teacher.ids, teacher.logprobs])
  chex.assert_equal_rank([student_logits, teacher.ids])
  chex.assert_equal_shape_prefix([student_logits, teacher.ids], student_logits.ndim - 1)
  if teacher.tail is not None:
    chex.assert_shape(teacher.tail, student_logits.shape[:-1])
  if policy not in POLICIES:
    raise ValueError(f'policy {policy!r} unknown; choose from {sorted(POLICIES)}')
  size = _vocabulary_size(student_logits, axis_name)
  if teacher.ids.shape[-1] > size:
    raise ValueError(f'the teacher lists {teacher.ids.shape[-1]} tokens of a vocabulary of {size}')


POLICIES = {'renormalise': _renormalise, 'zero': _zero, 'tail': _tail}

TOP_K = {
    'forward_kl': forward_kl,
    'reverse_kl': reverse_kl,
    'jensen_shannon': jensen_shannon,
    'skew_kl': skew_kl,
    'skew_reverse_kl': skew_reverse_kl,
    'total_variation': total_variation,
}
