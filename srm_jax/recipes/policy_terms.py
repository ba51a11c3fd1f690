"""Terms of a loss on what the student sampled: the teacher's opinion of each token as an advantage, rewards beside it.

  loss_t = surrogate(log q(y_t), log q_sampler(y_t), A_t),  A_t = A_teacher(log p(y_t), log q_sampler(y_t)) + r A_reward

Only the log-probabilities of the sampled tokens are asked of either model; divergences over the whole vocabulary are
`token_terms`, with less variance. MiniLLM is minillm advantages here beside reverse_kl there.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from srm_jax import schema
from srm_jax.losses.advantages import whiten
from srm_jax.losses.on_policy_distillation import TEACHER_ADVANTAGES
from srm_jax.losses.policy_gradient import SURROGATES
from srm_jax.types import Rollouts


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
  """advantage, surrogate: from TEACHER_ADVANTAGES and SURROGATES, with their options.

  reward_weight: what the advantages of the task's own rewards count beside the teacher's. whiten: the teacher's
  advantages get mean 0 and deviation 1 over the term's tokens of the whole batch.
  """

  advantage: str
  advantage_options: Mapping[str, Any]
  surrogate: str
  surrogate_options: Mapping[str, Any]
  reward_weight: float
  whiten: bool


class PolicyTerm(NamedTuple):
  """fn(student log-probabilities [B, T], teacher's [B, T], rollouts, mask [B, T]) -> [B, T]; rewarded: it reads
  rollouts.advantages; coupled: it sees the whole batch at once.
  """

  fn: Callable[..., Any]
  rewarded: bool
  coupled: bool
  spoken: str


def _policy(options, where) -> PolicyTerm:
  config = schema.parse(PolicyConfig, options, where)
  advantage = schema.bind(f'{where}.advantage', config.advantage, config.advantage_options, TEACHER_ADVANTAGES)
  surrogate = schema.bind(
      f'{where}.surrogate', config.surrogate, config.surrogate_options, SURROGATES, given=('old_logprobs',)
  )
  _try(advantage, surrogate, where)

  def fn(student_logprobs, teacher_logprobs, rollouts: Rollouts, mask):
    advantages = advantage(teacher_logprobs, rollouts.sampler_logprobs, mask)
    if config.whiten:
      advantages = whiten(advantages, mask)
    if config.reward_weight:
      advantages = advantages + config.reward_weight * jnp.where(mask > 0, rollouts.advantages, 0.0)
    return surrogate(student_logprobs, rollouts.sampler_logprobs, advantages, mask)

  rewards = f' + {config.reward_weight:g} rewards' if config.reward_weight else ''
  said = f'{"whitened " * config.whiten}{config.advantage}{rewards}'
  return PolicyTerm(fn, bool(config.reward_weight), config.whiten, f'{config.surrogate}({said})')


def _try(advantage, surrogate, where):
  """Traces the two on a few numbers, so that an impossible option is found when a config is opened."""
  one = np.zeros((1, 2), np.float32)
  try:
    jax.eval_shape(lambda: surrogate(one, one, advantage(one, one, one), one))
  except (TypeError, ValueError) as error:
    raise schema.ConfigError(f'{where}: {error}') from error


POLICY_TERMS: dict[str, Callable[[Mapping[str, Any], str], PolicyTerm]] = {'policy': _policy}
