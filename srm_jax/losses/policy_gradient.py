"""Surrogates: losses whose gradient is a policy gradient.

Every surrogate is fn(logprobs, sampler_logprobs, advantages, mask, *, old_logprobs=None, ...) -> [B, T] values to be
minimised, 0 outside the mask; one completion a row. rho = pi / pi_old is the likelihood ratio of a token. pi_old is the
policy that the trust region is drawn around: `old_logprobs`, or the sampler where that is None. Advantages,
sampler_logprobs and old_logprobs receive no gradient, and what stands outside the mask, NaN included, reaches nothing.
"""

import chex
import jax
import jax.numpy as jnp

# exp of a float32 overflows at 88; a ratio of e^20 is already past every use, and beyond it the gradient is 0.
_MAX_LOG_RATIO = 20.0


def reinforce(logprobs, sampler_logprobs, advantages, mask, *, old_logprobs=None):
  """Score-function surrogate, for tokens that the current policy sampled: nothing corrects for another sampler.

  -A log pi

  Args:
    logprobs: [B, T] log-probabilities of the sampled tokens under the policy that is trained.
    sampler_logprobs: [B, T], unused.
    advantages: [B, T].
    mask: [B, T], 1 on sampled tokens.
    old_logprobs: unused.

  Returns:
    [B, T] values, float32.

  Raises:
    AssertionError: if the shapes are not equal [B, T].

  Reference: Williams, Simple Statistical Gradient-Following Algorithms, 1992.
  """
  _assert_shapes(logprobs, sampler_logprobs, advantages, mask, old_logprobs)
  return -_constant(advantages, mask) * _masked(logprobs, mask)


def importance_sampling(logprobs, sampler_logprobs, advantages, mask, *, old_logprobs=None):
  """Ratio times advantage, without a trust region; the usual choice for on-policy distillation.

  -rho A

  Args:
    logprobs: [B, T] log-probabilities of the sampled tokens under the policy that is trained.
    sampler_logprobs: [B, T] as recorded while sampling.
    advantages: [B, T].
    mask: [B, T], 1 on sampled tokens.
    old_logprobs: [B, T] of pi_old; None takes sampler_logprobs.

  Returns:
    [B, T] values, float32.

  Raises:
    AssertionError: if the shapes are not equal [B, T].

  Reference: Degris, White, Sutton, Off-Policy Actor-Critic, arXiv 1205.4839.
  """
  _assert_shapes(logprobs, sampler_logprobs, advantages, mask, old_logprobs)
  return -jnp.exp(_log_ratio(logprobs, sampler_logprobs, mask, old_logprobs)) * _constant(advantages, mask)


def clipped(
    logprobs,
    sampler_logprobs,
    advantages,
    mask,
    *,
    old_logprobs=None,
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=None,
):
  """Clipped surrogate of PPO and GRPO; clip_high above clip_low is DAPO's clip-higher.

  l = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A);  with dual_clip c, where A < 0: min(l, -c A)

  Args:
    logprobs: [B, T] log-probabilities of the sampled tokens under the policy that is trained.
    sampler_logprobs: [B, T] as recorded while sampling.
    advantages: [B, T].
    mask: [B, T], 1 on sampled tokens.
    old_logprobs: [B, T] of pi_old; None takes sampler_logprobs.
    clip_low: how far the ratio may fall below 1.
    clip_high: how far it may rise above 1.
    dual_clip: bound c > 1 on the ratio where the advantage is negative, or None.

  Returns:
    [B, T] values, float32.

  Raises:
    AssertionError: if the shapes are not equal [B, T].
    ValueError: if a clip is negative, or dual_clip is not above 1.

  Reference: Schulman et al., Proximal Policy Optimization Algorithms, arXiv 1707.06347; dual_clip: Ye et al., Mastering
  Complex Control in MOBA Games, arXiv 1912.09729; clip-higher: Yu et al., DAPO, arXiv 2503.14476.
  """
  _assert_shapes(logprobs, sampler_logprobs, advantages, mask, old_logprobs)
  _assert_clips('clipped', clip_low, clip_high)
  if dual_clip is not None and dual_clip <= 1:
    raise ValueError(f'dual_clip {dual_clip} of clipped must be above 1 (3 is usual), or None for no dual clip')
  ratio = jnp.exp(_log_ratio(logprobs, sampler_logprobs, mask, old_logprobs))
  advantages = _constant(advantages, mask)
  loss = _pessimistic(ratio, advantages, clip_low, clip_high)
  if dual_clip is None:
    return loss
  return jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)


def cispo(logprobs, sampler_logprobs, advantages, mask, *, old_logprobs=None, max_ratio=5.0):
  """Score-function surrogate with a capped importance weight: no token loses its gradient.

  -sg(min(rho, max_ratio)) A log pi

  Args:
    logprobs: [B, T] log-probabilities of the sampled tokens under the policy that is trained.
    sampler_logprobs: [B, T] as recorded while sampling.
    advantages: [B, T].
    mask: [B, T], 1 on sampled tokens.
    old_logprobs: [B, T] of pi_old; None takes sampler_logprobs.
    max_ratio: the cap itself, not its distance from 1.

  Returns:
    [B, T] values, float32.

  Raises:
    AssertionError: if the shapes are not equal [B, T].
    ValueError: if max_ratio is not positive.

  Reference: MiniMax, MiniMax-M1, arXiv 2506.13585; the cap: Khatri et al., The Art of Scaling RL Compute, 2510.13786.
  """
  _assert_shapes(logprobs, sampler_logprobs, advantages, mask, old_logprobs)
  if max_ratio <= 0:
    raise ValueError(f'max_ratio {max_ratio} of cispo must be positive; 5 is usual')
  ratio = jnp.exp(_log_ratio(logprobs, sampler_logprobs, mask, old_logprobs))
  weight = jax.lax.stop_gradient(jnp.minimum(ratio, max_ratio))
  return -weight * _constant(advantages, mask) * _masked(logprobs, mask)


def gspo(
    logprobs,
    sampler_logprobs,
    advantages,
    mask,
    *,
    old_logprobs=None,
    clip_low=3e-4,
    clip_high=4e-4,
):
  """Clipped surrogate whose ratio is the length-normalised one of the whole completion, in its token form.

  s = exp(mean_t log rho_t),  s_t = sg(s) pi_t / sg(pi_t);  -min(s_t A, clip(s_t, 1 - clip_low, 1 + clip_high) A)

  The paper's objective is its `sequence_mean_token_mean`. Where a completion has one advantage, values and gradients
  are those of the sequence form -min(s A, clip(s) A); this one (GSPO-token) takes an advantage for every token as well.
  While the policy is its own sampler, s = 1 and this is `clipped` under that reduction.

  Args:
    logprobs: [B, T] log-probabilities of the sampled tokens under the policy that is trained; one completion a row.
    sampler_logprobs: [B, T] as recorded while sampling.
    advantages: [B, T].
    mask: [B, T], 1 on sampled tokens.
    old_logprobs: [B, T] of pi_old; None takes sampler_logprobs.
    clip_low: how far s may fall below 1.
    clip_high: how far s may rise above 1.

  Returns:
    [B, T] values, float32.

  Raises:
    AssertionError: if the shapes are not equal [B, T].
    ValueError: if a clip is negative.

  Reference: Zheng et al., Group Sequence Policy Optimization, arXiv 2507.18071.
  """
  _assert_shapes(logprobs, sampler_logprobs, advantages, mask, old_logprobs)
  _assert_clips('gspo', clip_low, clip_high)
  log_ratio = jax.lax.stop_gradient(_log_ratio(logprobs, sampler_logprobs, mask, old_logprobs))
  length = jnp.maximum(jnp.sum(mask > 0, axis=-1, keepdims=True), 1)
  sequence_ratio = jnp.exp(jnp.sum(log_ratio, axis=-1, keepdims=True) / length)
  logprobs = _masked(logprobs, mask)
  ratio = sequence_ratio * jnp.exp(logprobs - jax.lax.stop_gradient(logprobs))
  return _pessimistic(ratio, _constant(advantages, mask), clip_low, clip_high)


def sapo(logprobs, sampler_logprobs, advantages, mask, *, old_logprobs=None, positive=1.0, negative=1.05):
  """A soft gate in the place of the clip: the gradient fades as the ratio leaves 1, and fades faster where A < 0.

  -(4 / tau) sigmoid(tau (rho - 1)) A,  tau = positive where A > 0, else negative

  Args:
    logprobs: [B, T] log-probabilities of the sampled tokens under the policy that is trained.
    sampler_logprobs: [B, T] as recorded while sampling.
    advantages: [B, T].
    mask: [B, T], 1 on sampled tokens.
    old_logprobs: [B, T] of pi_old; None takes sampler_logprobs.
    positive: temperature of the gate where the advantage is positive.
    negative: where it is not.

  Returns:
    [B, T] values, float32.

  Raises:
    AssertionError: if the shapes are not equal [B, T].
    ValueError: if a temperature is not positive.

  Reference: Gao et al., Soft Adaptive Policy Optimization, arXiv 2511.20347.
  """
  _assert_shapes(logprobs, sampler_logprobs, advantages, mask, old_logprobs)
  if min(positive, negative) <= 0:
    raise ValueError(f'positive {positive} and negative {negative} of sapo are temperatures; they must be positive')
  ratio = jnp.exp(_log_ratio(logprobs, sampler_logprobs, mask, old_logprobs))
  advantages = _constant(advantages, mask)
  tau = jnp.where(advantages > 0, positive, negative)
  return -4 / tau * jax.nn.sigmoid(tau * (ratio - 1)) * advantages


def truncated_importance(old_logprobs, sampler_logprobs, mask, *, cap=2.0):
  """Weights that correct a surrogate around pi_old for tokens that another program (or precision) sampled.

  min(pi_old / pi_sampler, cap)

  Args:
    old_logprobs: [B, T] of the trainer, before the update.
    sampler_logprobs: [B, T] as recorded while sampling.
    mask: [B, T], 1 on sampled tokens.
    cap: bounds the variance, at the price of a bias.

  Returns:
    [B, T] weights, float32, without gradient, 1 outside the mask.

  Raises:
    AssertionError: if the shapes are not equal [B, T].
    ValueError: if cap is not positive.

  Reference: Yao et al., Your Efficient RL Framework Secretly Brings You Off-Policy RL Training, 2025; Espeholt et al.,
  IMPALA, arXiv 1802.01561.
  """
  _assert_shapes(old_logprobs, sampler_logprobs, mask, mask, None)
  if cap <= 0:
    raise ValueError(f'cap {cap} of the importance weights must be positive; 2 is usual')
  return jax.lax.stop_gradient(jnp.minimum(jnp.exp(_log_ratio(old_logprobs, sampler_logprobs, mask, None)), cap))


def clipped_value(values, old_values, returns, mask, *, clip=None):
  """Squared error of a critic; with a clip, of the worse of two values, so that none is pulled further than it.

  max((V - G)^2, (clip(V, V_old - clip, V_old + clip) - G)^2) / 2

  Args:
    values: [B, T] of the critic that is trained.
    old_values: [B, T] of the critic before the update.
    returns: [B, T], G.
    mask: [B, T], 1 on sampled tokens.
    clip: how far a value may move from the old one, or None.

  Returns:
    [B, T] values, float32, 0 outside the mask.

  Raises:
    AssertionError: if the shapes are not equal [B, T].
    ValueError: if clip is not positive.

  Reference: Schulman et al., Proximal Policy Optimization Algorithms, arXiv 1707.06347; the clip: Engstrom et al.,
  Implementation Matters in Deep Policy Gradients, arXiv 2005.12729.
  """
  _assert_shapes(values, old_values, returns, mask, None)
  values, old_values, returns = _masked(values, mask), _constant(old_values, mask), _constant(returns, mask)
  error = jnp.square(values - returns)
  if clip is None:
    return 0.5 * error
  if clip <= 0:
    raise ValueError(f'clip {clip} of clipped_value must be positive; 0.2 is usual, None is no clip')
  near = jnp.clip(values, old_values - clip, old_values + clip)
  return 0.5 * jnp.maximum(error, jnp.square(near - returns))


def _pessimistic(ratio, advantages, clip_low, clip_high):
  """-min(ratio A, clip(ratio) A), whatever the sign of A."""
  return jnp.maximum(-ratio * advantages, -jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages)


def _log_ratio(logprobs, sampler_logprobs, mask, old_logprobs):
  """log(pi / pi_old), bounded, 0 outside the mask."""
  old_logprobs = sampler_logprobs if old_logprobs is None else old_logprobs
  log_ratio = _masked(logprobs, mask) - _constant(old_logprobs, mask)
  return jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _masked(values, mask):
  """Float32 values, 0 outside the mask: selected, not multiplied, since 0 times NaN is NaN."""
  return jnp.where(mask > 0, values.astype(jnp.float32), 0.0)


def _constant(values, mask):
  return jax.lax.stop_gradient(_masked(values, mask))


def _assert_shapes(logprobs, sampler_logprobs, advantages, mask, old_logprobs):
  arrays = [logprobs, sampler_logprobs, advantages, mask] + ([] if old_logprobs is None else [old_logprobs])
  chex.assert_rank(arrays, 2)
  chex.assert_equal_shape(arrays)


def _assert_clips(surrogate, clip_low, clip_high):
  if clip_low < 0 or clip_high < 0:
    raise ValueError(f'clip_low {clip_low}, clip_high {clip_high} of {surrogate} are distances from 1, never negative')


SURROGATES = {
    'reinforce': reinforce,
    'importance_sampling': importance_sampling,
    'clipped': clipped,
    'cispo': cispo,
    'gspo': gspo,
    'sapo': sapo,
}
