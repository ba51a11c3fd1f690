"""Divergences between models that cut text differently, on groups of tokens that spell the same bytes.

A group holds some consecutive tokens of the student and some of the teacher (`losses.token_groups`). The distribution
at its first position, times the probability of its later tokens, is one vector for each side.

  uld                compares the two vectors sorted, which needs no common vocabulary
  shared_divergence  pairs the ids of equal bytes, where a group is one token on each side and both are the same
  hybrid             the latter where it applies, the former elsewhere

All need the whole vocabulary at the first position of every group: gather the hidden states there
(`token_groups.at_first_positions`) and run `hybrid`, a per-token function of `lm_head.per_token`, over them; then
`with_later` adds what the sweep cannot differentiate. Everything is float32; the teacher receives no gradient.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from srm_jax.losses import vocabulary
from srm_jax.losses.distillation import forward_kl
from srm_jax.losses.token_groups import CHUNK_LOSSES


class GroupTargets(NamedTuple):
  """What `hybrid` needs per group, [n] each: masks of groups that exist and of exact ones, `ChunkLogprobs.later`."""

  valid: jax.Array
  exact: jax.Array
  student_later: jax.Array
  teacher_later: jax.Array


def uld(
    student_logits, teacher_logits, *, student_later=None, teacher_later=None, temperature=1.0, axis_name=None
):
  """Universal logit distillation: distance of the sorted probabilities, which need not be of the same tokens.

  sum_r |q_(r) b_q - p_(r) b_p|,  q_(1) >= q_(2) >= ..., the shorter vector padded with zeros; b = exp(later)

  It is twice the least total variation over all pairings of the two vocabularies (for b = 1), so it is 0 for
  distributions that are permutations of each other. b makes the probabilities of groups of different lengths
  comparable: the group's first token is any, its later tokens are the actual ones.

  Args:
    student_logits: [..., Vs] where the first token of the group is predicted.
    teacher_logits: [..., Vt].
    student_later, teacher_later: [...] log-probabilities of the later tokens of the group; None for 0.
    temperature: positive number that divides both logits.
    axis_name: mesh axis over which V is split; of one device, or None: sorting needs the whole vocabulary.

  Returns:
    [...] distance per group, float32, in [0, 2].

  Raises:
    AssertionError: if the shapes do not fit.
    ValueError: if the temperature is not positive, or V is split.

  Reference: Boizard et al., Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs,
  arXiv 2402.12030; groups of several tokens: Patiño et al., Unlocking On-Policy Distillation for Any Model Family
  (GOLD), 2025.
  """
  student_logits, teacher_logits = (_whole('uld', logits, axis_name) for logits in (student_logits, teacher_logits))
  student, teacher = _sorted_probabilities(student_logits, teacher_logits, student_later, teacher_later, temperature)
  return _distance(student, teacher)


def _sorted_probabilities(student_logits, teacher_logits, student_later, teacher_later, temperature):
  """Increasing float32 [..., max(Vs, Vt)] each, times the probability of the later tokens."""
  chex.assert_equal_shape_prefix([student_logits, teacher_logits], student_logits.ndim - 1)
  _assert_positive('uld', temperature)
  student = _merged(student_logits, student_later, temperature)
  teacher = _merged(jax.lax.stop_gradient(teacher_logits), jax.lax.stop_gradient(teacher_later), temperature)
  size = max(student.shape[-1], teacher.shape[-1])
  return _padded(_increasing(student), size), _padded(_from_bits(jax.lax.sort(_bits(teacher), is_stable=False)), size)


def _distance(student, teacher):
  """sum |q - p| with derivative 0 where q = p: that of jnp.abs is 1 there."""
  gap = student - teacher
  return jnp.sum(gap * jax.lax.stop_gradient(jnp.sign(gap)), axis=-1)


def _merged(logits, later, temperature):
  log_probs = vocabulary.log_softmax(logits.astype(jnp.float32) / temperature)
  return jnp.exp(log_probs if later is None else log_probs + later.astype(jnp.float32)[..., None])


def _increasing(values):
  """Sorted non-negative floats; the gradient goes back to where each came from."""
  return jax.lax.sort((_bits(jax.lax.stop_gradient(values)), values), num_keys=1, is_stable=False)[1]


def _bits(values):
  """Non-negative floats as integers of the same order: they sort 8 x as fast on the CPU."""
  return jax.lax.bitcast_convert_type(values, jnp.int32)


def _from_bits(values):
  return jax.lax.bitcast_convert_type(values, jnp.float32)


def _padded(values, size):
  return jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(size - values.shape[-1], 0)])


def shared_divergence(
    student_logits, teacher_logits, *, student_ids, teacher_ids, divergence=forward_kl, temperature=1.0, axis_name=None
):
  """A divergence over the tokens that both vocabularies have, and one bucket for all that only one of them has.

  D(p', q'),  p'_m = p(teacher_ids_m), p'_rest = 1 - sum_m p'_m, q' alike

  There is no bucket where one vocabulary is shared entirely, since it could put nothing there: then p' and q' are the
  distributions given that the token is shared. With equal vocabularies it is the plain divergence.

  Args:
    student_logits: [..., Vs].
    teacher_logits: [..., Vt].
    student_ids, teacher_ids: int [M], ids that spell the same bytes, none twice (`data.alignment.shared_ids`).
    divergence: fn(student_logits, teacher_logits) -> [...], one of `distillation.DIVERGENCES` with its options bound.
    temperature: positive number that divides both logits.
    axis_name: as in `uld`; the ids of a pair would lie on different devices.

  Returns:
    [...] divergence per token, float32.

  Raises:
    AssertionError: if the shapes do not fit.
    ValueError: if the temperature is not positive, or V is split.
  """
  chex.assert_equal_shape_prefix([student_logits, teacher_logits], student_logits.ndim - 1)
  chex.assert_equal_shape([student_ids, teacher_ids])
  _assert_positive('shared_divergence', temperature)
  sides = [
      (_whole('shared_divergence', logits, axis_name), ids)
      for logits, ids in ((student_logits, student_ids), (teacher_logits, teacher_ids))
  ]
  has_rest = all(len(ids) < logits.shape[-1] for logits, ids in sides)
  return divergence(*(_bucketed(logits.astype(jnp.float32) / temperature, ids, has_rest) for logits, ids in sides))


def _bucketed(logits, ids, has_rest):
  """Logits of the shared ids and, last, of all others together: [..., V] -> [..., M (+ 1)]."""
  ids = jnp.asarray(ids)
  shared = logits[..., ids]
  if not has_rest:
    return shared
  is_shared = jnp.zeros(logits.shape[-1], bool).at[ids].set(True)
  others = jnp.where(jnp.broadcast_to(is_shared, logits.shape), -jnp.inf, logits)
  return jnp.concatenate([shared, vocabulary.log_normalizer(others)[..., None]], axis=-1)


def hybrid(
    student_logits, teacher_logits, targets, *, student_ids, teacher_ids, divergence=forward_kl, temperature=1.0,
    axis_name=None,
):
  """`shared_divergence` on exact groups and `uld` on the others, as a per-token function of `lm_head.per_token`.

  Args:
    student_logits: [n, Vs] where the first tokens of the groups are predicted.
    teacher_logits: [n, Vt].
    targets: GroupTargets of [n].
    student_ids, teacher_ids, divergence, temperature, axis_name: as in `shared_divergence`.

  Returns:
    {'shared': [n], 0 but on exact groups; 'uld': [n], 0 but on the other valid ones; 'slope': [n], derivative of 'uld'
    by targets.student_later, a constant, for `with_later`}.

  Raises:
    AssertionError, ValueError: as in `uld` and `shared_divergence`.

  Reference: Patiño et al., Unlocking On-Policy Distillation for Any Model Family (GOLD), 2025, where a single token is
  split: a divergence on its shared part of the vocabulary, `uld` on the rest.
  """
  student_logits, teacher_logits = (_whole('hybrid', logits, axis_name) for logits in (student_logits, teacher_logits))
  targets = jax.lax.stop_gradient(targets)  # as sweeps have it; `with_later` puts back what that leaves out
  exact = targets.valid.astype(bool) & targets.exact.astype(bool)
  inexact = targets.valid.astype(bool) & ~exact
  shared = shared_divergence(
      student_logits, teacher_logits, student_ids=student_ids, teacher_ids=teacher_ids, divergence=divergence,
      temperature=temperature,
  )
  # Sorting costs more than everything else: a chunk without inexact groups goes without.
  distance, slope = jax.lax.cond(
      jnp.any(inexact), lambda *args: _uld_and_slope(*args, temperature=temperature), _no_distance,
      student_logits, teacher_logits, targets,
  )
  return {
      'shared': jnp.where(exact, shared, 0.0),
      'uld': jnp.where(inexact, distance, 0.0),
      'slope': jnp.where(inexact, slope, 0.0),
  }


def with_later(values, slope, later):
  """Values of 'uld' from a sweep, with the gradient on the log-probabilities of the later tokens that it left out.

  The sweep holds its targets for constants, but uld depends on b_q = exp(student_later): slope is the derivative.

  Args:
    values, slope: [B, G], results of `hybrid`.
    later: [B, G], the student's later log-probabilities that the sweep was given, before any stop_gradient.

  Returns:
    values, float32 [B, G].
  """
  chex.assert_equal_shape([values, slope, later])
  later = later.astype(jnp.float32)
  return values + jax.lax.stop_gradient(slope) * (later - jax.lax.stop_gradient(later))


def _uld_and_slope(student_logits, teacher_logits, targets, *, temperature):
  student, teacher = _sorted_probabilities(
      student_logits, teacher_logits, targets.student_later, targets.teacher_later, temperature
  )
  # d/d(later) of sum |q b - p|, with b = exp(later): every q b has itself for its derivative.
  slope = jax.lax.stop_gradient(jnp.sum(jnp.sign(student - teacher) * student, axis=-1))
  return _distance(student, teacher), slope


def _no_distance(student_logits, teacher_logits, targets):
  del teacher_logits, targets
  nothing = jnp.sum(student_logits[..., :0].astype(jnp.float32), axis=-1)  # zeros that vary over the mesh as logits do
  return nothing, nothing


def _assert_positive(loss, temperature):
  if temperature <= 0:
    raise ValueError(f'temperature {temperature} of {loss} must be positive; 1 leaves the distributions as they are')


def _whole(loss, logits, axis_name):
  """Logits that hold the whole vocabulary; an axis of one device splits nothing."""
  if axis_name is None:
    return logits
  if jax.lax.axis_size(axis_name) > 1:
    raise ValueError(
        f'{loss} needs the whole vocabulary and cannot run with it split over mesh axis {axis_name!r}; gather the '
        f'logits first, or match likelihoods: {sorted(CHUNK_LOSSES)}'
    )
  return jax.lax.psum(logits, axis_name)
