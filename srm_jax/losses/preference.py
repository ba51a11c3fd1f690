"""Preference losses on log-probabilities of whole completions: one is to become likelier, another less so.

Every loss but kto's is fn(chosen, rejected, *, beta, ...) -> [P] values to be minimised, one a pair: chosen and
rejected are `Scores` of the pair's completions. kto asks for no pairs: its values are of completions, [C + R] for C
desirable ones in the place of chosen and R undesirable ones in that of rejected. Nothing is averaged here, and
reference log-probabilities receive no gradient. With r = log pi(y | x) - log pi_ref(y | x), + for chosen and - for
rejected:

  dpo    -log sigmoid(beta (r+ - r-))                                       needs a reference
  ipo    (r+ / |y+| - r- / |y-| - 1 / (2 beta))^2                           needs a reference
  kto    1 - sigmoid(beta (r+ - z0)), 1 - sigmoid(beta (z0 - r-))           needs a reference and z0 of mismatched pairs
  simpo  -log sigmoid(beta (log pi(y+) / |y+| - log pi(y-) / |y-|) - gamma)
  orpo   -log pi(y+) / |y+| - beta log sigmoid(log odds(y+) - log odds(y-))
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

# log(1 - p) of a certain completion would be -inf; float32 tells 1 - 1e-6 from 1, and past it nothing is learnt.
_MAX_MEAN_LOGPROB = -1e-6


class Scores(NamedTuple):
  """What models think of n completions.

  logprobs: [n], sums over a completion's tokens under the policy. lengths: [n], tokens. reference_logprobs: [n], sums
  under the reference policy; None where there is none.
  """

  logprobs: jax.Array
  lengths: jax.Array
  reference_logprobs: jax.Array | None = None


def score(logprobs, mask, reference_logprobs=None) -> Scores:
  """Sums over the tokens of completions.

  log pi(y | x) = sum_t m_t log pi(y_t)

  Args:
    logprobs: [B, T], one completion a row; what stands outside the mask, NaN included, reaches nothing.
    mask: [B, T], 1 on tokens of completions.
    reference_logprobs: [B, T] of the reference policy, or None.

  Returns:
    Scores of float32 [B].

  Raises:
    AssertionError: if the shapes are not equal [B, T].
  """
  chex.assert_rank([logprobs, mask], 2)
  chex.assert_equal_shape([logprobs, mask] + ([] if reference_logprobs is None else [reference_logprobs]))
  total = lambda values: jnp.sum(jnp.where(mask > 0, values.astype(jnp.float32), 0.0), axis=-1)
  reference = None if reference_logprobs is None else jax.lax.stop_gradient(total(reference_logprobs))
  return Scores(total(logprobs), jnp.sum((mask > 0).astype(jnp.float32), axis=-1), reference)


def log_ratio(scores: Scores):
  """log pi(y | x) - log pi_ref(y | x): [n]. Raises ValueError where there is no reference."""
  if scores.reference_logprobs is None:
    raise ValueError('this preference loss compares with a reference policy; give Scores its reference_logprobs')
  chex.assert_equal_shape(list(scores))
  return scores.logprobs.astype(jnp.float32) - jax.lax.stop_gradient(scores.reference_logprobs).astype(jnp.float32)


def mean_logprob(scores: Scores):
  """log pi(y | x) / |y|: [n], 0 of an empty completion."""
  chex.assert_equal_shape([scores.logprobs, scores.lengths])
  return scores.logprobs.astype(jnp.float32) / _lengths(scores)


def reward(scores: Scores):
  """What the losses call a reward, beta left out: the log-ratio, or the mean log-probability without a reference."""
  return mean_logprob(scores) if scores.reference_logprobs is None else log_ratio(scores)


def dpo(chosen: Scores, rejected: Scores, *, beta, label_smoothing=0.0):
  """Logistic regression on the difference of log-ratios; smoothed where a share of the labels is wrong.

  -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d),  d = r+ - r-, e = label_smoothing

  Args:
    chosen, rejected: Scores of [P], with a reference.
    beta: strength of the tie to the reference; above 0.
    label_smoothing: probability that a label is wrong, below 1/2.

  Returns:
    [P] values, float32.

  Raises:
    AssertionError: if the shapes are not equal [P].
    ValueError: no reference, or an option out of its range.

  Reference: Rafailov et al., Direct Preference Optimization, arXiv 2305.18290; smoothed: Mitchell, A Note on DPO with
  Noisy Preferences, 2023.
  """
  _check('dpo', beta, chosen, rejected)
  if not 0 <= label_smoothing < 0.5:
    raise ValueError(f'label_smoothing {label_smoothing} of dpo must be in [0, 0.5): it is the share of wrong labels')
  logits = beta * (log_ratio(chosen) - log_ratio(rejected))
  return -(1 - label_smoothing) * jax.nn.log_sigmoid(logits) - label_smoothing * jax.nn.log_sigmoid(-logits)


def ipo(chosen: Scores, rejected: Scores, *, beta):
  """Regression of the difference of log-ratios on a constant, so that sure preferences do not overrule the reference.

  (r+ / |y+| - r- / |y-| - 1 / (2 beta))^2

  The paper's equation 17 has sums over tokens. The mean over a completion's tokens is TRL's form, of which its authors
  say that the paper's results are those: without it the target is one of length as well.

  Args:
    chosen, rejected: Scores of [P], with a reference.
    beta: the paper's tau; above 0.

  Returns:
    [P] values, float32.

  Raises:
    AssertionError: if the shapes are not equal [P].
    ValueError: no reference, or beta is not above 0.

  Reference: Azar et al., A General Theoretical Paradigm to Understand Learning from Human Preferences, arXiv
  2310.12036.
  """
  _check('ipo', beta, chosen, rejected)
  difference = log_ratio(chosen) / _lengths(chosen) - log_ratio(rejected) / _lengths(rejected)
  return jnp.square(difference - 1 / (2 * beta))


def simpo(chosen: Scores, rejected: Scores, *, beta, gamma):
  """The mean log-probability as reward, which is what greedy decoding follows; no reference.

  -log sigmoid(beta (log pi(y+) / |y+| - log pi(y-) / |y-|) - gamma)

  Args:
    chosen, rejected: Scores of [P].
    beta: scale of the rewards; above 0 (2 to 2.5 in the paper).
    gamma: margin by which chosen is to win, not divided by beta (TRL's simpo_gamma; 0.3 to 1.6 in the paper).

  Returns:
    [P] values, float32.

  Raises:
    AssertionError: if the shapes are not equal [P].
    ValueError: beta is not above 0.

  Reference: Meng et al., SimPO: Simple Preference Optimization with a Reference-Free Reward, arXiv 2405.14734.
  """
  _check('simpo', beta, chosen, rejected)
  return -jax.nn.log_sigmoid(beta * (mean_logprob(chosen) - mean_logprob(rejected)) - gamma)


def kl_baseline(mismatched: Scores, weights):
  """KTO's z0: an estimate of KL(pi || pi_ref) from prompts with completions of other prompts.

  z0 = max(0, sum_i w_i r_i / sum_i w_i)

  Args:
    mismatched: Scores of [n], with a reference; completion i was not written for prompt i.
    weights: [n], 0 where a row does not count.

  Returns:
    float32 scalar, through which `kto` lets no gradient.

  Raises:
    AssertionError: if the shapes are not equal [n].
    ValueError: no reference.

  Reference: Ethayarajh et al., KTO: Model Alignment as Prospect Theoretic Optimization, arXiv 2402.01306.
  """
  ratios = log_ratio(mismatched)
  chex.assert_equal_shape([ratios, weights])
  mean = jnp.sum(jnp.where(weights > 0, weights * ratios, 0.0)) / jnp.maximum(jnp.sum(weights), 1)
  return jnp.maximum(mean, 0.0)


def kto(chosen: Scores, rejected: Scores, *, baseline, beta, desirable_weight=1.0, undesirable_weight=1.0):
  """Every completion by itself, better or worse than the policy's distance from its reference.

  desirable_weight (1 - sigmoid(beta (r - z0))) of a desirable one, undesirable_weight (1 - sigmoid(beta (z0 - r))) else

  Args:
    chosen: Scores of [C], the desirable completions, with a reference.
    rejected: Scores of [R], the undesirable ones.
    baseline: scalar z0, from `kl_baseline`.
    beta: strength of the tie to the reference; above 0.
    desirable_weight, undesirable_weight: times their numbers of completions, within 4/3 of each other in the paper.

  Returns:
    [C + R] values, float32, the desirable ones first.

  Raises:
    AssertionError: if the shapes within Scores differ.
    ValueError: no reference, or an option out of its range.

  Reference: Ethayarajh et al., KTO: Model Alignment as Prospect Theoretic Optimization, arXiv 2402.01306.
  """
  _check('kto', beta)
  if desirable_weight < 0 or undesirable_weight < 0:
    raise ValueError(f'weights {desirable_weight}, {undesirable_weight} of kto must not be negative')
  baseline = jax.lax.stop_gradient(baseline)
  gain = desirable_weight * jax.nn.sigmoid(beta * (baseline - log_ratio(chosen)))  # 1 - sigmoid(x) = sigmoid(-x)
  loss = undesirable_weight * jax.nn.sigmoid(beta * (log_ratio(rejected) - baseline))
  return jnp.concatenate([gain, loss])


def orpo(chosen: Scores, rejected: Scores, *, beta):
  """Cross-entropy on the chosen completion, and beside it the log odds ratio; no reference.

  -log p+ - beta log sigmoid(log(p+ / (1 - p+)) - log(p- / (1 - p-))),  log p = log pi(y | x) / |y|

  Every pair's cross-entropy is the mean over the tokens of its chosen completion; TRL's is one mean over the tokens of
  the batch, prompts included.

  Args:
    chosen, rejected: Scores of [P].
    beta: the paper's lambda, the weight of the odds ratio; above 0.

  Returns:
    [P] values, float32.

  Raises:
    AssertionError: if the shapes are not equal [P].
    ValueError: beta is not above 0.

  Reference: Hong et al., ORPO: Monolithic Preference Optimization without Reference Model, arXiv 2403.07691.
  """
  _check('orpo', beta, chosen, rejected)
  ratio = _log_odds(mean_logprob(chosen)) - _log_odds(mean_logprob(rejected))
  return -mean_logprob(chosen) - beta * jax.nn.log_sigmoid(ratio)


def _log_odds(logprobs):
  logprobs = jnp.minimum(logprobs, _MAX_MEAN_LOGPROB)
  return logprobs - jnp.log(-jnp.expm1(logprobs))


def _lengths(scores: Scores):
  return jnp.maximum(scores.lengths.astype(jnp.float32), 1)


def _check(name, beta, *pair: Scores):
  if beta <= 0:
    raise ValueError(f'beta {beta} of {name} must be above 0; 0.1 is usual (2 for simpo)')
  for scores in pair:
    chex.assert_rank(scores.logprobs, 1)
    chex.assert_equal_shape([scores.logprobs, pair[0].logprobs])


PREFERENCES = {'dpo': dpo, 'ipo': ipo, 'simpo': simpo, 'kto': kto, 'orpo': orpo}

# Names of those that compare with a reference policy, and of those whose values are of completions, not of pairs.
REFERENCED = frozenset({'dpo', 'ipo', 'kto'})
UNPAIRED = frozenset({'kto'})
