"""Learned rewards: pairs of completions, single steps, and one number from the scores of many steps.

A score is a logit: sigmoid(score) is the probability that a completion is right, or that its steps so far are.
"""

import chex
import jax
import jax.numpy as jnp

_LOG_NOTHING = -1e30  # finite, so that a row without steps has a gradient, of 0


def bradley_terry(chosen_scores, rejected_scores, *, centering=0.0):
  """How surprised a reward model is that one completion of a prompt is better than another.

  -log sigmoid(r+ - r-) + centering (r+ + r-)^2

  Only differences of scores show in the first part; the second keeps their mean near 0, where sigmoid(r) means
  something by itself.

  Args:
    chosen_scores, rejected_scores: [B], r+ and r-.
    centering: weight of the second part.

  Returns:
    [B] loss per pair, float32.

  Raises:
    AssertionError: if the shapes are not equal.

  Reference: Ouyang et al., InstructGPT, arXiv 2203.02155; centering: Eisenstein et al., Helping or Herding?, arXiv
    2312.09244.
  """
  chex.assert_equal_shape([chosen_scores, rejected_scores])
  chosen, rejected = chosen_scores.astype(jnp.float32), rejected_scores.astype(jnp.float32)
  return -jax.nn.log_sigmoid(chosen - rejected) + centering * jnp.square(chosen + rejected)


def process_bce(step_scores, labels, mask):
  """Binary cross-entropy at the end of every step.

  -y log sigmoid(s) - (1 - y) log(1 - sigmoid(s))

  Args:
    step_scores: [B, T], s, logits.
    labels: [B, T], y in [0, 1]: whether a step leads to a right answer, or how often it did.
    mask: [B, T], 1 where a step ends.

  Returns:
    [B, T] loss per step, float32; 0 where no step ends.

  Raises:
    AssertionError: if the shapes are not equal [B, T].

  Reference: Wang et al., Math-Shepherd, arXiv 2312.08935; Lightman et al., Let's Verify Step by Step, arXiv 2305.20050.
  """
  chex.assert_rank([step_scores, labels, mask], 2)
  chex.assert_equal_shape([step_scores, labels, mask])
  # Selected before: a score that counts nowhere may overflow, and its gradient would be 0 times that.
  scores = jnp.where(mask > 0, step_scores.astype(jnp.float32), 0.0)
  losses = jax.nn.softplus(scores) - labels.astype(jnp.float32) * scores
  return jnp.where(mask > 0, losses, 0.0)


def _lowest(logprobs, valid):
  return jnp.min(jnp.where(valid, logprobs, jnp.inf), axis=-1)


def _last(logprobs, valid):
  places = jnp.arange(valid.shape[-1])
  last = jnp.max(jnp.where(valid, places[None], -1), axis=-1, keepdims=True)
  return jnp.sum(jnp.where(places[None] == last, logprobs, 0.0), axis=-1)


def _mean(logprobs, valid):
  count = jnp.maximum(jnp.sum(valid, axis=-1), 1)
  return jax.nn.logsumexp(jnp.where(valid, logprobs, _LOG_NOTHING), axis=-1) - jnp.log(count.astype(jnp.float32))


def _product(logprobs, valid):
  return jnp.sum(jnp.where(valid, logprobs, 0.0), axis=-1)


def aggregate(name: str, step_scores, mask):
  """One score from those of the steps: the log of an aggregate of their probabilities.

  log A(sigmoid(s_1), ..., sigmoid(s_n)),  A one of min, last, mean, product

  The logarithm keeps apart what rounds to 1 as a probability; it orders alike, and its exponential weighs votes. A
  completion of one step, as an outcome model scores it, has log sigmoid(s_1) under each of them. One without steps has
  -inf, probability 0: nothing speaks for it.

  Args:
    name: from AGGREGATIONS.
    step_scores: [B, S], logits.
    mask: [B, S], 1 on steps; what stands elsewhere means nothing.

  Returns:
    [B], float32, at most 0.

  Raises:
    AssertionError: if the shapes are not equal [B, S].
    KeyError: if the name is unknown.

  Reference: Wang et al., Math-Shepherd, arXiv 2312.08935 (min); Lightman et al., arXiv 2305.20050 (product); Snell et
    al., Scaling LLM Test-Time Compute Optimally, arXiv 2408.03314 (last).
  """
  chex.assert_rank([step_scores, mask], 2)
  chex.assert_equal_shape([step_scores, mask])
  valid = mask > 0
  logprobs = jax.nn.log_sigmoid(jnp.where(valid, step_scores.astype(jnp.float32), 0.0))
  return jnp.where(jnp.any(valid, axis=-1), AGGREGATIONS[name](logprobs, valid), -jnp.inf)


# name -> fn(log-probabilities of steps [B, S], valid bool [B, S]) -> [B], for rows with a step.
AGGREGATIONS = {'min': _lowest, 'last': _last, 'mean': _mean, 'product': _product}
