"""Distances between hidden states of student and teacher.

`FEATURES` act on each token, fn(student_hidden [B, T, S], teacher_hidden [B, T, D], *, projector) -> [B, T].
`BATCH_FEATURES` couple all tokens, fn(student_hidden, teacher_hidden, mask [B, T]) -> scalar: a batch that is cut into
microbatches gives them another value, so a recipe must refuse more than one microbatch.
Products accumulate in float32. The teacher receives no gradient.
"""

import chex
import jax
import jax.numpy as jnp

# Floor under squared norms: a padded position is often all zeros, and its cosine must have a finite gradient.
_SMALLEST_SQUARED_NORM = 1e-12
# Of states whose largest entry is 1: what differs by less than this is equal.
_ROUNDING = 1e-6


def fitnets(student_hidden, teacher_hidden, *, projector=None):
  """Mean squared distance to the teacher's hidden state after a learned projection.

  || h_s W - h_t ||^2 / D

  Args:
    student_hidden: [B, T, S].
    teacher_hidden: [B, T, D].
    projector: W [S, D], trained beside the student and dropped after; None is the identity and needs S = D.

  Returns:
    [B, T] distance per token, float32.

  Raises:
    AssertionError: if the shapes do not fit.

  Reference: Romero et al., FitNets: Hints for Thin Deep Nets, arXiv 1412.6550.
  """
  projected, target = _projected_and_target(student_hidden, teacher_hidden, projector)
  return jnp.mean(jnp.square(projected - target), axis=-1)


def cosine(student_hidden, teacher_hidden, *, projector=None):
  """Cosine distance to the teacher's hidden state after a learned projection; a zero vector is at distance 1.

  1 - <h_s W, h_t> / (|h_s W| |h_t|)

  Args:
    student_hidden: [B, T, S].
    teacher_hidden: [B, T, D].
    projector: W [S, D], trained beside the student and dropped after; None is the identity and needs S = D.

  Returns:
    [B, T] distance per token, float32.

  Raises:
    AssertionError: if the shapes do not fit.

  Reference: Sanh, Debut, Chaumond, Wolf, DistilBERT, a distilled version of BERT, arXiv 1910.01108.
  """
  projected, target = _projected_and_target(student_hidden, teacher_hidden, projector)
  return 1 - jnp.sum(_normalized(projected) * _normalized(target), axis=-1)


def patient(student_hidden, teacher_hidden, *, projector=None):
  """Squared distance between the directions of the hidden states after a learned projection.

  | h_s W / |h_s W| - h_t / |h_t| |^2

  A sum over the width, as in the paper, so of the same size at every width: in [0, 4], and twice `cosine` wherever
  neither vector is 0.

  Args:
    student_hidden: [B, T, S].
    teacher_hidden: [B, T, D].
    projector: W [S, D], trained beside the student and dropped after; None is the identity and needs S = D.

  Returns:
    [B, T] distance per token, float32.

  Raises:
    AssertionError: if the shapes do not fit.

  Reference: Sun, Cheng, Gan, Liu, Patient Knowledge Distillation for BERT Model Compression, arXiv 1908.09355.
  """
  projected, target = _projected_and_target(student_hidden, teacher_hidden, projector)
  return jnp.sum(jnp.square(_normalized(projected) - _normalized(target)), axis=-1)


def linear_cka(student_hidden, teacher_hidden, mask):
  """One minus linear centred kernel alignment over the tokens of the batch; needs no projector.

  1 - ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F),  X, Y the hidden states of all unmasked tokens, centred over tokens

  Invariant to rotations and to the scale of either side.

  Args:
    student_hidden: [B, T, S].
    teacher_hidden: [B, T, D].
    mask: [B, T], 1 on tokens that count.

  Returns:
    Scalar in [0, 1] to rounding, float32; 1 where either side does not vary.

  Raises:
    AssertionError: if the shapes do not fit.

  Reference: Kornblith, Norouzi, Lee, Hinton, Similarity of Neural Network Representations Revisited, arXiv 1905.00414.
  """
  chex.assert_rank([student_hidden, teacher_hidden, mask], [3, 3, 2])
  chex.assert_equal_shape_prefix([student_hidden, teacher_hidden, mask], 2)
  x = _centred(student_hidden, mask)
  y = _centred(jax.lax.stop_gradient(teacher_hidden), mask)
  cross = jnp.sum(jnp.square(_gram(y, x)))
  return 1 - cross * _inverse_norm(_gram(x, x)) * _inverse_norm(_gram(y, y))


def _projected_and_target(student_hidden, teacher_hidden, projector):
  """Float32 [B, T, D] each: the student's state in the teacher's space, and the teacher's state as a constant."""
  chex.assert_rank([student_hidden, teacher_hidden], 3)
  projected = student_hidden
  if projector is not None:
    chex.assert_shape(projector, (student_hidden.shape[-1], teacher_hidden.shape[-1]))
    projected = jnp.einsum(
        'btd,de->bte',
        student_hidden,
        projector.astype(student_hidden.dtype),
        preferred_element_type=jnp.float32,
    )
  chex.assert_equal_shape([projected, teacher_hidden])
  return projected.astype(jnp.float32), jax.lax.stop_gradient(teacher_hidden).astype(jnp.float32)


def _normalized(vectors):
  squared = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
  return vectors * jax.lax.rsqrt(jnp.maximum(squared, _SMALLEST_SQUARED_NORM))


def _centred(hidden, mask):
  """Hidden states minus their mean over unmasked tokens, 0 on masked ones: [B, T, D] -> float32 [B * T, D].

  They are scaled to unit size, before and after: alignment does not see a constant factor, the floats of its fourth
  powers do, and a large common mean leaves little of it. What is left of equal states is rounding, and stays small.
  """
  keep = mask.reshape(-1, 1) > 0
  hidden = jnp.where(keep, hidden.reshape(-1, hidden.shape[-1]).astype(jnp.float32), 0.0)
  largest = jnp.max(jnp.abs(jax.lax.stop_gradient(hidden)))
  hidden = hidden / jnp.where(largest > 0, largest, 1.0)
  mean = jnp.sum(hidden, axis=0, keepdims=True) / jnp.maximum(jnp.sum(keep), 1)
  centred = jnp.where(keep, hidden - mean, 0.0)
  spread = jnp.max(jnp.abs(jax.lax.stop_gradient(centred)))
  return centred / jnp.where(spread > _ROUNDING, spread, 1.0)


def _gram(a, b):
  return jnp.einsum('nd,ne->de', a, b, preferred_element_type=jnp.float32)


def _inverse_norm(matrix):
  """1 / Frobenius norm."""
  return jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(matrix)), _SMALLEST_SQUARED_NORM))


FEATURES = {'fitnets': fitnets, 'cosine': cosine, 'patient': patient}

BATCH_FEATURES = {'linear_cka': linear_cka}
