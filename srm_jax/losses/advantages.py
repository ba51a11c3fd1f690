"""From rewards to advantages: how much better a completion did than its baseline.

`ADVANTAGES` are fn(rewards [P, G], *, valid=None, ...) -> [P, G], over the G completions of each of P prompts. A
completion that cannot be scored (valid 0; its reward may be NaN) is left out of the baseline and has advantage 0. A
group without two different valid rewards, so also one with a single valid member, has advantages of exactly 0;
`informative_groups` tells them apart.

`TOKEN_ADVANTAGES` are fn(rewards [B, T], mask, *, values=None, ...) -> (advantages, returns), of rewards that tokens
have: the grade at the last one, scores at the ends of steps, a penalty anywhere. `whiten` is for the tokens of a batch.
All is float32, and no gradient flows into rewards or values.
"""

import chex
import jax
import jax.numpy as jnp


SCALES = ('group', 'batch', 'none')


def group_relative(rewards, *, valid=None, ddof=1, eps=1e-6, scale='group'):
  """Rewards standardised within the group.

  (r_i - mean(r)) / (std + eps)

  std is of the group; with scale 'batch' of all valid rewards of the batch, whatever their group, so that a group of
  which nearly all are right or wrong weighs no more than others; with 'none' the difference stays as it is.

  Args:
    rewards: [P, G].
    valid: [P, G], 0 where a completion cannot be scored; None where all can.
    ddof: the variance divides by n - ddof, n the valid members: 1 in the published code, 0 is the population's.
    eps: added to the standard deviation.
    scale: 'group', 'batch' or 'none'.

  Returns:
    [P, G] advantages, float32.

  Raises:
    AssertionError: if the shapes are not equal [P, G].
    ValueError: scale is none of SCALES.

  Reference: Shao et al., DeepSeekMath, arXiv 2402.03300; 'batch': Liu et al., Tricks or Traps? A Deep Dive into RL for
  LLM Reasoning, arXiv 2508.08221.
  """
  if scale not in SCALES:
    raise ValueError(f'scale {scale!r} of group_relative unknown; choose from {SCALES}')
  centred, size = _centred(rewards, valid)
  if scale == 'none':
    return centred
  if scale == 'batch':
    rewards, keep = _scored(rewards, valid)
    size = jnp.sum(size)
    spread = jnp.where(keep, rewards - jnp.sum(rewards) / jnp.maximum(size, 1), 0.0)
    variance = jnp.sum(jnp.square(spread)) / jnp.maximum(size - ddof, 1)
  else:
    variance = jnp.sum(jnp.square(centred), axis=-1, keepdims=True) / jnp.maximum(size - ddof, 1)
  # The inner where keeps 0 / 0 out when eps is 0; the numerator is 0 there.
  return centred / jnp.where(variance > 0, jnp.sqrt(variance) + eps, 1.0)


def centered(rewards, *, valid=None):
  """Rewards minus the mean of the group: without the division, easy and hard prompts weigh alike (Dr. GRPO).

  r_i - mean(r)

  Args:
    rewards: [P, G].
    valid: [P, G], 0 where a completion cannot be scored; None where all can.

  Returns:
    [P, G] advantages, float32.

  Raises:
    AssertionError: if the shapes are not equal [P, G].

  Reference: Liu et al., Understanding R1-Zero-Like Training: A Critical Perspective, arXiv 2503.20783.
  """
  centred, _ = _centred(rewards, valid)
  return centred


def leave_one_out(rewards, *, valid=None):
  """Rewards minus the mean of the other members of the group: an unbiased baseline.

  r_i - mean_{j != i}(r_j) = n / (n - 1) (r_i - mean(r)),  n the valid members

  Args:
    rewards: [P, G].
    valid: [P, G], 0 where a completion cannot be scored; None where all can.

  Returns:
    [P, G] advantages, float32.

  Raises:
    AssertionError: if the shapes are not equal [P, G].

  Reference: Ahmadian et al., Back to Basics: Revisiting REINFORCE-Style Optimization, arXiv 2402.14740.
  """
  centred, size = _centred(rewards, valid)
  return centred * size / jnp.maximum(size - 1, 1)


def informative_groups(rewards, *, valid=None):
  """Which groups hold two different valid rewards; the others have no gradient to give.

  Args:
    rewards: [P, G].
    valid: [P, G], 0 where a completion cannot be scored; None where all can.

  Returns:
    bool [P].

  Raises:
    AssertionError: if the shapes are not equal [P, G].
  """
  rewards, keep = _scored(rewards, valid)
  largest = jnp.max(jnp.where(keep, rewards, -jnp.inf), axis=-1)
  smallest = jnp.min(jnp.where(keep, rewards, jnp.inf), axis=-1)
  return largest > smallest


def returns_to_go(rewards, mask, *, values=None, discount=1.0):
  """What is still to come from each token on, without a baseline: REINFORCE; whitened it is REINFORCE++.

  G_t = sum_{k >= 0} discount^k r_{t+k}, over the unmasked tokens

  With rewards of 0 and 1 this is fine-tuning on what is right: online rejection sampling, STaR's outer loop.

  Args:
    rewards: [B, T] per-token rewards; those outside the mask are not seen.
    mask: [B, T], 1 on sampled tokens.
    values: unused.
    discount: gamma.

  Returns:
    (G, G): [B, T], float32, 0 outside the mask.

  Raises:
    AssertionError: if the shapes are not equal [B, T].

  Reference: Williams, Simple Statistical Gradient-Following Algorithms, 1992; Hu et al., REINFORCE++, arXiv 2501.03262.
  """
  del values
  return gae(rewards, jnp.zeros_like(rewards), mask, discount=discount, trace_decay=1.0)


def process_relative(rewards, ends, *, valid=None, ddof=1, eps=1e-6):
  """Scores of steps, standardised over all steps of a group; a token is worth the steps that end at it or later.

  A_t = sum_{s: end(s) >= t} (r_s - mean(R)) / (std(R) + eps),  R all steps of the group

  Args:
    rewards: [P, G, T], the score of a step at its last token.
    ends: [P, G, T], 1 on the last tokens of steps.
    valid: [P, G], 0 where a completion cannot be scored; None where all can.
    ddof: as in `group_relative`.
    eps: added to the standard deviation.

  Returns:
    [P, G, T] advantages, float32; all 0 in groups whose steps score alike.

  Raises:
    AssertionError: if the shapes do not fit.

  Reference: Shao et al., DeepSeekMath (process supervision), arXiv 2402.03300.
  """
  chex.assert_rank([rewards, ends], 3)
  chex.assert_equal_shape([rewards, ends])
  steps = ends > 0 if valid is None else (ends > 0) & (valid > 0)[..., None]
  flat = lambda array: array.reshape(len(array), -1)
  relative = group_relative(flat(rewards), valid=flat(steps), ddof=ddof, eps=eps).reshape(rewards.shape)
  return jnp.flip(jnp.cumsum(jnp.flip(relative, -1), -1), -1)


def gae(rewards, values, mask, *, discount=1.0, trace_decay=0.95):
  """Generalised advantage estimates along the sampled tokens of each row.

  A_t = sum_k (discount trace_decay)^k delta_{t+k},  delta_t = r_t + discount V_{t+1} - V_t

  t + 1 is the next unmasked token: forced text and tool output are stepped over without discount. V is 0 past the last.

  Args:
    rewards: [B, T] per-token rewards; those outside the mask are not seen.
    values: [B, T] value estimates before each token.
    mask: [B, T], 1 on sampled tokens.
    discount: gamma.
    trace_decay: lambda; 1 gives the return minus the value, 0 the one-step error.

  Returns:
    (advantages, returns): [B, T] each, float32, 0 outside the mask; returns = advantages + values.

  Raises:
    AssertionError: if the shapes are not equal [B, T].

  Reference: Schulman et al., High-Dimensional Continuous Control Using Generalized Advantage Estimation,
  arXiv 1506.02438.
  """
  chex.assert_rank([rewards, values, mask], 2)
  chex.assert_equal_shape([rewards, values, mask])
  keep = mask > 0
  rewards, values = (
      jnp.where(keep, jax.lax.stop_gradient(array).astype(jnp.float32), 0.0) for array in (rewards, values)
  )

  def step(carry, token):
    reward, value, keep = token
    next_value, next_advantage = carry
    advantage = reward + discount * next_value - value + discount * trace_decay * next_advantage
    carry = jnp.where(keep, value, next_value), jnp.where(keep, advantage, next_advantage)
    return carry, jnp.where(keep, advantage, 0.0)

  zeros = jnp.zeros_like(rewards[:, 0])
  _, advantages = jax.lax.scan(step, (zeros, zeros), (rewards.T, values.T, keep.T), reverse=True)
  return advantages.T, advantages.T + values


def whiten(values, mask, *, eps=1e-8):
  """Values over unmasked tokens with mean 0 and variance 1, 0 elsewhere.

  (A_t - mean) / sqrt(var + eps),  var = sum (A_t - mean)^2 / n

  Args:
    values: [B, T], advantages as a rule; outside the mask they are not seen.
    mask: [B, T], 1 on the n tokens that count.
    eps: added to the variance.

  Returns:
    [B, T], float32, without gradient.

  Raises:
    AssertionError: if the shapes are not equal [B, T].

  Reference: Huang et al., The N+ Implementation Details of RLHF with PPO, arXiv 2403.17031, detail 18.
  """
  chex.assert_rank([values, mask], 2)
  chex.assert_equal_shape([values, mask])
  keep = mask > 0
  count = jnp.maximum(jnp.sum(keep), 1)
  values = jnp.where(keep, jax.lax.stop_gradient(values).astype(jnp.float32), 0.0)
  centred = jnp.where(keep, values - jnp.sum(values) / count, 0.0)
  return centred * jax.lax.rsqrt(jnp.sum(jnp.square(centred)) / count + eps)


def _scored(rewards, valid):
  """Rewards as constant float32 with 0 where they are not valid, and where they are: [P, G] each."""
  chex.assert_rank(rewards, 2)
  keep = jnp.ones(rewards.shape, bool) if valid is None else valid > 0
  chex.assert_equal_shape([rewards, keep])
  return jnp.where(keep, jax.lax.stop_gradient(rewards).astype(jnp.float32), 0.0), keep


def _centred(rewards, valid):
  """Rewards minus the mean over valid members, and the number of these: [P, G], [P, 1]."""
  informative = informative_groups(rewards, valid=valid)[:, None]
  rewards, keep = _scored(rewards, valid)
  size = jnp.sum(keep, axis=-1, keepdims=True).astype(jnp.float32)
  mean = jnp.sum(rewards, axis=-1, keepdims=True) / jnp.maximum(size, 1)
  # Equal rewards are found by comparison: the rounding of their mean, over a standard deviation as small, is not small.
  return jnp.where(keep & informative, rewards - mean, 0.0), size


ADVANTAGES = {
    'group_relative': group_relative,
    'centered': centered,
    'leave_one_out': leave_one_out,
}


def _gae(rewards, mask, *, values, discount=1.0, trace_decay=0.95):
  return gae(rewards, values, mask, discount=discount, trace_decay=trace_decay)


TOKEN_ADVANTAGES = {'returns_to_go': returns_to_go, 'gae': _gae}
