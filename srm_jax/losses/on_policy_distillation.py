"""Reverse KL from sampled tokens: the teacher's opinion of what the student wrote, as advantages for `policy_gradient`.

With r_t = log p(y_t) - log q(y_t) at a token y_t that the student q sampled, -r_t is an unbiased estimate of
KL(q || p) in that state (k1 of `kl_penalty`), and the score function times r_t one of minus its gradient. So r_t is an
advantage, and every surrogate makes a loss of it: `importance_sampling` is the usual one, `clipped` bounds it. Only the
sampled token's log-probability is asked of the teacher; the price is variance, which `distillation.reverse_kl` over the
whole vocabulary does not have.

`TEACHER_ADVANTAGES` are fn(teacher_logprobs, student_logprobs, mask, *, ...) -> [B, T], 0 outside the mask, one
completion a row, both log-probabilities at the temperature of sampling. No gradient flows into either, and what stands
outside the mask, NaN included, reaches nothing.
"""

import chex
import jax
import jax.numpy as jnp

from srm_jax.losses import advantages, divergences


def reverse_kl(teacher_logprobs, student_logprobs, mask, *, discount=0.0):
  """Log-ratio of teacher and student, with what later tokens of the completion earn.

  A_t = sum_{k >= 0} discount^k r_{t + k},  r_t = sg(log p(y_t) - log q_old(y_t))

  discount 0 descends KL(q || p) in each visited state and ignores to which states a token leads; 1 descends the KL of
  whole completions, at a much higher variance. t + k steps over masked tokens.

  Args:
    teacher_logprobs: [B, T] teacher's log-probabilities of the sampled tokens.
    student_logprobs: [B, T] of the policy that sampled them, as recorded then.
    mask: [B, T], 1 on sampled tokens.
    discount: number in [0, 1].

  Returns:
    [B, T] advantages, float32.

  Raises:
    AssertionError: if the shapes are not equal [B, T].
    ValueError: if discount is outside [0, 1].

  Reference: Lu et al., On-Policy Distillation, 2025, thinkingmachines.ai/blog/on-policy-distillation; with discount 1
  the policy gradient of Gu et al., MiniLLM, arXiv 2306.08543.
  """
  discount = divergences.unit_interval('reverse_kl', 'discount', discount)
  rewards = _log_ratio(teacher_logprobs, student_logprobs, mask)
  returns, _ = advantages.gae(rewards, jnp.zeros_like(rewards), mask, discount=discount, trace_decay=1.0)
  return returns


def minillm(teacher_logprobs, student_logprobs, mask, *, discount=1.0, offset=1):
  """Mean of the log-ratios that are still to come: the long-term part of MiniLLM's gradient.

  A_t = (1 / N_t) sum_{k >= offset} discount^k r_{t + k},  N_t the number of these tokens;  0 where N_t is 0

  The division keeps the first tokens of long completions from outweighing all others. r_t itself is left to the
  single-step term, which sums it over the vocabulary: add `distillation.reverse_kl` to the surrogate's loss. With
  offset 0 r_t is here as well, as in the released code, which thereby counts it twice; that code whitens the result
  over the batch (`policy_terms`: whiten) and clips the ratio (surrogate `clipped`).

  Where the teacher took part in sampling, give `mixture` to the surrogate as sampler_logprobs, and the student's
  own log-probabilities here: the ratio is then the paper's importance weight q / (a p + (1 - a) q_old).

  Args:
    teacher_logprobs: [B, T] teacher's log-probabilities of the sampled tokens.
    student_logprobs: [B, T] of the student when they were sampled.
    mask: [B, T], 1 on sampled tokens.
    discount: number in [0, 1].
    offset: the first reward that counts, relative to the token: 1 for the paper's, 0 for its code's.

  Returns:
    [B, T] advantages, float32.

  Raises:
    AssertionError: if the shapes are not equal [B, T].
    ValueError: if discount is outside [0, 1], or offset is neither 0 nor 1.

  Reference: Gu, Dong, Wei, Huang, MiniLLM: Knowledge Distillation of Large Language Models, arXiv 2306.08543.
  """
  if offset not in (0, 1):
    raise ValueError(f'offset {offset} of minillm must be 1 (the rewards after the token) or 0 (its own as well)')
  discount = divergences.unit_interval('minillm', 'discount', discount)
  own = _log_ratio(teacher_logprobs, student_logprobs, mask)
  returns = reverse_kl(teacher_logprobs, student_logprobs, mask, discount=discount)
  count = jnp.cumsum((mask > 0)[:, ::-1], axis=-1)[:, ::-1]
  if offset == 1:
    returns, count = returns - own, count - 1
  return jnp.where(mask > 0, returns / jnp.maximum(count, 1), 0.0)


def mixture(teacher_logprobs, student_logprobs, *, teacher_share):
  """Log-probabilities of the sampled tokens under the mixture that sampled them.

  log(a p(y_t) + (1 - a) q_old(y_t))

  As sampler_logprobs of a surrogate it makes the ratio q / (a p + (1 - a) q_old), at most 1 / (1 - a) while q is
  q_old. The exact weight of a token is the product over the completion so far; the paper keeps the token's own factor,
  for its variance.

  Args:
    teacher_logprobs: [B, T] teacher's log-probabilities of the sampled tokens.
    student_logprobs: [B, T] of the student when they were sampled.
    teacher_share: number a in [0, 1]; the paper samples with 0.2.

  Returns:
    [B, T] log-probabilities, float32, without gradient.

  Raises:
    AssertionError: if the shapes are not equal [B, T].
    ValueError: if teacher_share is outside [0, 1].

  Reference: Gu, Dong, Wei, Huang, MiniLLM: Knowledge Distillation of Large Language Models, arXiv 2306.08543.
  """
  teacher_share = divergences.unit_interval('mixture', 'teacher_share', teacher_share)
  chex.assert_rank([teacher_logprobs, student_logprobs], 2)
  chex.assert_equal_shape([teacher_logprobs, student_logprobs])
  log_p, log_q = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (teacher_logprobs, student_logprobs))
  return divergences.log_mixture(log_p, log_q, teacher_share)


def _log_ratio(teacher_logprobs, student_logprobs, mask):
  """Constant float32 [B, T] log p - log q, anything outside the mask."""
  arrays = [teacher_logprobs, student_logprobs, mask]
  chex.assert_rank(arrays, 2)
  chex.assert_equal_shape(arrays)
  log_p, log_q = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in arrays[:2])
  return log_p - log_q


TEACHER_ADVANTAGES = {'reverse_kl': reverse_kl, 'minillm': minillm}
