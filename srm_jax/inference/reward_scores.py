"""Scores of given completions under a reward model, by one forward pass; `inference.score` has log-probabilities."""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from srm_jax.data.steps import Segmentation, step_tokens
from srm_jax.inference import decode
from srm_jax.inference.score import hidden_states, token_values
from srm_jax.losses.reward_model import aggregate
from srm_jax.models import heads, transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.sharding import constrain
from srm_jax.types import Completion, Params


def make_reward_scorer(
    config: TransformerConfig, params: Params, head: Params, tokenizer, *, segment: Segmentation | None = None,
    batch_size: int = 64,
) -> Callable[[Sequence[Completion]], list[np.ndarray]]:
  """A scorer for one reward model.

  Args:
    params: of the model; a copy in the compute dtype is taken.
    head: its value head.
    tokenizer: of the reward model; completions must have been sampled with an equal one.
    segment: how a process model's steps end; None for an outcome model, which scores the end of a completion.
    batch_size: completions per forward pass.

  Returns:
    score(completions) -> one float32 array a completion: a logit a step, or one in all. A completion without tokens
    has none. It raises ValueError as `score.token_values`.
  """
  cast = jax.jit(transformer.cast, static_argnums=1)(params, config.dtype)
  values = lambda *arrays: _values(config, cast, head, *arrays)

  def score(completions: Sequence[Completion]) -> list[np.ndarray]:
    found = token_values(
        values, completions, tokenizer=tokenizer, max_length=config.max_length, batch_size=batch_size
    )
    return [row[_ends(one)] for row, one in zip(found, completions)]

  def _ends(completion):
    if segment is None:
      return slice(-1, None)
    return np.array(step_tokens(tokenizer, completion.tokens, segment), np.int32)

  return score


@functools.partial(jax.jit, static_argnames='config')
def _values(config, params, head, prompts, lengths, tokens):
  """float32 [B, N]: what the head says of the text up to and with each completion token."""
  hidden = hidden_states(config, params, prompts, lengths, tokens)[:, prompts.shape[1] :]
  return constrain(heads.value(head, hidden), None, None)


def reduced(name: str, scores: Sequence[np.ndarray]) -> list[float]:
  """One score a completion from those of its steps, by an aggregation of `losses.reward_model`."""
  width = decode.bucket(max((len(row) for row in scores), default=0))
  padded, mask = np.zeros((2, len(scores), width), np.float32)
  for row, values, valid in zip(scores, padded, mask):
    values[: len(row)], valid[: len(row)] = row, 1.0
  return np.asarray(aggregate(name, padded, mask)).tolist()
