"""Divergences between the student's and the teacher's next-token distributions.

Every divergence maps student and teacher logits [..., V] to one value per token [...]. p is the teacher, q the student,
both softmax(logits / temperature), in float32. The teacher receives no gradient.

No divergence carries the factor T^2 that keeps gradients of equal size over temperatures T (Hinton et al. 2015): a
caller whose config asks for it multiplies the reduced loss by `temperature**2`, so that no loss is rescaled in silence.

temperature, beta, alpha, tau and their like are numbers, or traced scalars where a schedule changes them from step to
step: a number out of range raises, a traced one is clipped (a traced temperature is taken as it is).

`axis_name` names the mesh axis that splits V inside `shard_map`; only per-token scalars cross it. Gradients are right
outside and, with shard_map's default `check_vma=True`, inside; with `check_vma=False` JAX transposes a psum to a psum,
and a gradient taken inside comes out times the size of the axis. What needs the whole vocabulary on one device is
listed in `WHOLE_VOCABULARY`.
"""

import chex
import jax
import jax.numpy as jnp

from srm_jax.losses import divergences, vocabulary


def forward_kl(student_logits, teacher_logits, *, temperature=1.0, axis_name=None):
  """Forward KL: mode-covering; with temperature 1 its gradient on the student logits is q - p.

  KL(p || q) = sum_v p_v log(p_v / q_v)

  Args:
    student_logits: [..., V].
    teacher_logits: [..., V].
    temperature: positive number that divides both logits.
    axis_name: mesh axis over which V is split, or None.

  Returns:
    [...] divergence per token, float32.

  Raises:
    AssertionError: if the shapes differ.
    ValueError: if the temperature is not positive.

  Reference: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, arXiv 1503.02531.
  """
  log_q, log_p = _log_probs(student_logits, teacher_logits, temperature, axis_name)
  return divergences.kl(log_p, log_q, axis_name=axis_name)


def reverse_kl(student_logits, teacher_logits, *, temperature=1.0, axis_name=None):
  """Reverse KL: mode-seeking; with temperature 1 its gradient is q_v (log(q_v / p_v) - KL(q || p)).

  KL(q || p) = sum_v q_v log(q_v / p_v)

  Args:
    student_logits: [..., V].
    teacher_logits: [..., V].
    temperature: positive number that divides both logits.
    axis_name: mesh axis over which V is split, or None.

  Returns:
    [...] divergence per token, float32.

  Raises:
    AssertionError: if the shapes differ.
    ValueError: if the temperature is not positive.

  Reference: Gu, Dong, Wei, Huang, MiniLLM: Knowledge Distillation of Large Language Models, arXiv 2306.08543.
  """
  log_q, log_p = _log_probs(student_logits, teacher_logits, temperature, axis_name)
  return divergences.kl(log_q, log_p, axis_name=axis_name)


def jensen_shannon(student_logits, teacher_logits, *, beta=0.5, temperature=1.0, axis_name=None):
  """Generalised Jensen-Shannon divergence, with the KLs as its end points.

  D_b = b KL(p || m) + (1 - b) KL(q || m),  m = b p + (1 - b) q;  D_0 = KL(p || q),  D_1 = KL(q || p)

  The end points are a convention (TRL's): the formula itself vanishes there, D_b / b -> KL(p || q) as b -> 0 and
  D_b / (1 - b) -> KL(q || p) as b -> 1. The scale jumps, so a learning rate tuned at b = 0.1 does not fit b = 0;
  `scaled_jensen_shannon` is free of that.

  Args:
    student_logits: [..., V].
    teacher_logits: [..., V].
    beta: number in [0, 1], the weight of the teacher.
    temperature: positive number that divides both logits.
    axis_name: mesh axis over which V is split, or None.

  Returns:
    [...] divergence per token, float32.

  Raises:
    AssertionError: if the shapes differ.
    ValueError: if beta is outside [0, 1] or the temperature is not positive.

  Reference: Agarwal et al., On-Policy Distillation of Language Models, arXiv 2306.13649.
  """
  beta = divergences.unit_interval('jensen_shannon', 'beta', beta)
  log_q, log_p = _log_probs(student_logits, teacher_logits, temperature, axis_name)
  return divergences.jensen_shannon(log_p, log_q, beta=beta, axis_name=axis_name)


def scaled_jensen_shannon(student_logits, teacher_logits, *, beta=0.5, temperature=1.0, axis_name=None):
  """Generalised Jensen-Shannon divergence of one scale: forward KL becomes reverse KL as beta goes from 0 to 1.

  D_b / (b (1 - b)) = KL(p || m) / (1 - b) + KL(q || m) / b,  m = b p + (1 - b) q

  The end points are the limits, so beta may follow a schedule through all of [0, 1] at one learning rate. At b = 0.5
  it is 4 times `jensen_shannon`.

  Args:
    student_logits: [..., V].
    teacher_logits: [..., V].
    beta: number in [0, 1], the weight of the teacher in the mixture.
    temperature: positive number that divides both logits.
    axis_name: mesh axis over which V is split, or None.

  Returns:
    [...] divergence per token, float32.

  Raises:
    AssertionError: if the shapes differ.
    ValueError: if beta is outside [0, 1] or the temperature is not positive.

  Reference: Agarwal et al., On-Policy Distillation of Language Models, arXiv 2306.13649, for D_b and its limits.
  """
  beta = divergences.unit_interval('scaled_jensen_shannon', 'beta', beta)
  log_q, log_p = _log_probs(student_logits, teacher_logits, temperature, axis_name)
  return divergences.scaled_jensen_shannon(log_p, log_q, beta=beta, axis_name=axis_name)


def symmetric_kl(student_logits, teacher_logits, *, reverse_share=0.5, temperature=1.0, axis_name=None):
  """Forward and reverse KL, mixed with one weight for all tokens; at 0.5 half of Jeffreys' divergence.

  (1 - r) KL(p || q) + r KL(q || p)

  Args:
    student_logits: [..., V].
    teacher_logits: [..., V].
    reverse_share: number r in [0, 1], the share of the reverse KL.
    temperature: positive number that divides both logits.
    axis_name: mesh axis over which V is split, or None.

  Returns:
    [...] divergence per token, float32.

  Raises:
    AssertionError: if the shapes differ.
    ValueError: if reverse_share is outside [0, 1] or the temperature is not positive.

  Reference: Jeffreys, An Invariant Form for the Prior Probability in Estimation Problems, 1946.
  """
  reverse_share = divergences.unit_interval('symmetric_kl', 'reverse_share', reverse_share)
  log_q, log_p = _log_probs(student_logits, teacher_logits, temperature, axis_name)
  forward = divergences.kl(log_p, log_q, axis_name=axis_name)
  return (1 - reverse_share) * forward + reverse_share * divergences.kl(log_q, log_p, axis_name=axis_name)


def taid(student_logits, teacher_logits, *, tau=0.4, temperature=1.0, axis_name=None):
  """Forward KL to a target between student and teacher (TAID); tau 1 is forward KL, tau 0 has nothing to teach.

  KL(p_tau || q),  p_tau = softmax((1 - tau) sg(z_q) + tau z_p);  gradient on the student logits q - p_tau

  Logits are mixed, not probabilities. The paper raises tau from 0.4 to 1 over the run: give it by a schedule.

  Args:
    student_logits: [..., V].
    teacher_logits: [..., V].
    tau: number in [0, 1], the teacher's share of the target's logits.
    temperature: positive number that divides both logits.
    axis_name: mesh axis over which V is split, or None.

  Returns:
    [...] divergence per token, float32.

  Raises:
    AssertionError: if the shapes differ.
    ValueError: if tau is outside [0, 1] or the temperature is not positive.

  Reference: Shing et al., TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in
  Language Models, arXiv 2501.16937.
  """
  tau = divergences.unit_interval('taid', 'tau', tau)
  log_q, log_p = _log_probs(student_logits, teacher_logits, temperature, axis_name)
  # Log-probabilities differ from logits by a number per token, which the softmax does not see.
  target = (1 - tau) * jax.lax.stop_gradient(log_q) + tau * log_p
  log_target = vocabulary.log_softmax(target, axis_name=axis_name)
  return divergences.kl(log_target, log_q, axis_name=axis_name)


def skew_kl(student_logits, teacher_logits, *, alpha=0.1, temperature=1.0, axis_name=None):
  """Skew forward KL: bounded, because the second argument holds some of the first; alpha 0 is forward KL.

  KL(p || a p + (1 - a) q)

  Args:
    student_logits: [..., V].
    teacher_logits: [..., V].
    alpha: number in [0, 1], the share of the teacher in the mixture.
    temperature: positive number that divides both logits.
    axis_name: mesh axis over which V is split, or None.

  Returns:
    [...] divergence per token, float32.

  Raises:
    AssertionError: if the shapes differ.
    ValueError: if alpha is outside [0, 1] or the temperature is not positive.

  Reference: Ko, Kim, Chen, Yun, DistiLLM: Towards Streamlined Distillation for Large Language Models, arXiv 2402.03898.
  """
  alpha = divergences.unit_interval('skew_kl', 'alpha', alpha)
  log_q, log_p = _log_probs(student_logits, teacher_logits, temperature, axis_name)
  return divergences.kl(log_p, divergences.log_mixture(log_p, log_q, alpha), axis_name=axis_name)


def skew_reverse_kl(student_logits, teacher_logits, *, alpha=0.1, temperature=1.0, axis_name=None):
  """Skew reverse KL; alpha 0 is reverse KL.

  KL(q || (1 - a) p + a q)

  Args:
    student_logits: [..., V].
    teacher_logits: [..., V].
    alpha: number in [0, 1], the share of the student in the mixture.
    temperature: positive number that divides both logits.
    axis_name: mesh axis over which V is split, or None.

  Returns:
    [...] divergence per token, float32.

  Raises:
    AssertionError: if the shapes differ.
    ValueError: if alpha is outside [0, 1] or the temperature is not positive.

  Reference: Ko, Kim, Chen, Yun, DistiLLM: Towards Streamlined Distillation for Large Language Models, arXiv 2402.03898.
  """
  alpha = divergences.unit_interval('skew_reverse_kl', 'alpha', alpha)
  log_q, log_p = _log_probs(student_logits, teacher_logits, temperature, axis_name)
  return divergences.kl(log_q, divergences.log_mixture(log_q, log_p, alpha), axis_name=axis_name)


def total_variation(student_logits, teacher_logits, *, temperature=1.0, axis_name=None):
  """Total variation distance: symmetric and in [0, 1].

  1/2 sum_v |p_v - q_v|

  Args:
    student_logits: [..., V].
    teacher_logits: [..., V].
    temperature: positive number that divides both logits.
    axis_name: mesh axis over which V is split, or None.

  Returns:
    [...] distance per token, float32.

  Raises:
    AssertionError: if the shapes differ.
    ValueError: if the temperature is not positive.

  Reference: Wen, Li, Du, Mou, f-Divergence Minimization for Sequence-Level Knowledge Distillation, arXiv 2307.15190.
  """
  log_q, log_p = _log_probs(student_logits, teacher_logits, temperature, axis_name)
  return divergences.total_variation(log_p, log_q, axis_name=axis_name)


def adaptive_kl(student_logits, teacher_logits, *, mu=0.5, temperature=1.0, axis_name=None):
  """Forward and reverse KL, weighted per token by where student and teacher disagree: the head or the tail.

  w KL(p || q) + (1 - w) KL(q || p),  w = sg(sum_head |p - q| / sum_v |p - q|)
  head = the tokens of largest p whose cumulative mass stays within mu, and always the largest

  Args:
    student_logits: [..., V].
    teacher_logits: [..., V].
    mu: number in [0, 1], the teacher's mass that bounds the head.
    temperature: positive number that divides both logits.
    axis_name: must be None; the head is found by sorting the whole vocabulary.

  Returns:
    [...] divergence per token, float32.

  Raises:
    AssertionError: if the shapes differ.
    ValueError: if mu is outside [0, 1], the temperature is not positive, or axis_name is given.

  Reference: Wu et al., Rethinking Kullback-Leibler Divergence in Knowledge Distillation for LLMs, arXiv 2404.02657.
  """
  mu = divergences.unit_interval('adaptive_kl', 'mu', mu)
  if axis_name is not None:
    raise ValueError(
        f'adaptive_kl sorts the whole vocabulary and cannot run with it split over mesh axis {axis_name!r}; '
        f'gather the logits first, or choose from {sorted(DIVERGENCES.keys() - WHOLE_VOCABULARY)}'
    )
  log_q, log_p = _log_probs(student_logits, teacher_logits, temperature, axis_name)
  weight = _head_share(jnp.exp(log_p), jnp.exp(jax.lax.stop_gradient(log_q)), mu)
  return weight * divergences.kl(log_p, log_q) + (1 - weight) * divergences.kl(log_q, log_p)


def _head_share(p, q, mu):
  """Share of the head in sum_v |p_v - q_v|: [..., V] -> [...]."""
  falling, gaps = jax.lax.sort((-p, jnp.abs(p - q)), dimension=-1, num_keys=1)
  is_first = jnp.arange(p.shape[-1]) == 0
  head = (jnp.cumsum(-falling, axis=-1) <= mu) | jnp.broadcast_to(is_first, p.shape)
  # Where p equals q both divergences are 0 and any weight does; the floor only keeps 0 / 0 out.
  total = jnp.maximum(jnp.sum(gaps, axis=-1), jnp.finfo(gaps.dtype).tiny)
  return jnp.sum(jnp.where(head, gaps, 0.0), axis=-1) / total


def _log_probs(student_logits, teacher_logits, temperature, axis_name):
  """Student's and teacher's log-probabilities at the temperature, float32 [..., V] each."""
  chex.assert_equal_shape([student_logits, teacher_logits])
  divergences.assert_positive_temperature(temperature)
  teacher_logits = jax.lax.stop_gradient(teacher_logits)
  return tuple(
      vocabulary.log_softmax(divergences.finite(logits, temperature), axis_name=axis_name)
      for logits in (student_logits, teacher_logits)
  )


DIVERGENCES = {
    'forward_kl': forward_kl,
    'reverse_kl': reverse_kl,
    'jensen_shannon': jensen_shannon,
    'scaled_jensen_shannon': scaled_jensen_shannon,
    'symmetric_kl': symmetric_kl,
    'taid': taid,
    'skew_kl': skew_kl,
    'skew_reverse_kl': skew_reverse_kl,
    'total_variation': total_variation,
    'adaptive_kl': adaptive_kl,
}

# Divergences that need every logit of a token on one device.
WHOLE_VOCABULARY = frozenset({'adaptive_kl'})
