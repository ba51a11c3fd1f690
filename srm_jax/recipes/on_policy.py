"""The on-policy source: prompts of the step, completions of the student, grades. Shared by RL and distillation."""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from srm_jax import schema
from srm_jax.data.prompting import Prompting, prompt_ids
from srm_jax.data.records import content_hash
from srm_jax.inference import make_generate
from srm_jax.recipes.context import Context, DataConfig, load_problems, open_data
from srm_jax.rollout import rollout, subsample, to_rollouts
from srm_jax.types import Mean, Problem, Rollouts, SamplingParams, Source


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """prompts groups of `samples` completions a step; rows of `length` positions; top_k 0 and top_p 1 sample from all."""

  prompts: int
  samples: int
  length: int
  max_new_tokens: int
  temperature: float
  top_k: int
  top_p: float


def check_lengths(config: RolloutConfig, prompting: Prompting, problems: Sequence[Problem], context: Context):
  """Raises ConfigError where the longest prompt and max_new_tokens fit neither in a row nor in the model's context."""
  lengths = {problem.id: len(prompt_ids(context.tokenizer, prompting.prompt(problem))) for problem in problems}
  longest = max(lengths, key=lengths.get)
  room = min(config.length, context.model.max_length)
  if lengths[longest] + config.max_new_tokens > room:
    raise schema.ConfigError(
        f'prompt {longest} has {lengths[longest]} tokens; with max_new_tokens={config.max_new_tokens} it does not fit '
        f'in {room}, the smaller of rollouts.length={config.length} and model.max_length={context.model.max_length}'
    )


def row_length(groups, limit: int) -> int:
  """Half, three quarters or all of `limit`, whichever is the least that holds every row: little padding, few
  programs.
  """
  longest = max(len(one.completion.prompt_tokens) + len(one.completion.tokens) for group in groups for one in group)
  return next(length for length in (limit // 2, 3 * limit // 4, limit) if longest <= length or length == limit)


def source(config: RolloutConfig, data: DataConfig, context: Context, *, advantage: Callable | None) -> Source:
  """Rollouts as a pure function of (params, seed, step), so that the cursor is nothing but the step."""
  prompting, problems = open_data(data, context.tokenizer), load_problems(data)
  if not problems:
    raise schema.ConfigError(f'no problem to sample for in {data}')
  check_lengths(config, prompting, problems, context)
  identity = {'data_hash': content_hash([problem.id for problem in problems]), 'seed': context.seed}
  sampling = SamplingParams(
      temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, max_new_tokens=config.max_new_tokens,
      samples=config.samples,
  )

  def next_rollouts(params, step: int) -> Rollouts:
    generate = make_generate(
        context.model, params['model'], context.tokenizer, batch_size=config.prompts * config.samples,
    )
    chosen = subsample(problems, config.prompts, seed=context.seed, step=step)
    drawn = dataclasses.replace(sampling, seed=context.seed * 1_000_003 + step)
    groups = rollout(generate, prompting, chosen, drawn)
    length = row_length(groups, config.length)
    return to_rollouts(groups, length=length, pad_id=context.tokenizer.pad_id, advantage=advantage)

  def set_state(state):
    if state != identity:
      raise schema.ConfigError(f'the prompts changed since the checkpoint: {state} then, {identity} now')

  return Source(next_rollouts, lambda: identity, set_state)


def metrics(rollouts: Rollouts) -> dict:
  """Rates that every on-policy run reports, as Means over the rows that the student sampled."""
  sampled = jnp.ones_like(rollouts.rewards) if rollouts.sampled is None else rollouts.sampled
  rows, valid = jnp.sum(sampled), rollouts.valid * sampled
  return {
      'reward': Mean(jnp.sum(rollouts.rewards * valid), jnp.sum(valid)),
      'completion_tokens': Mean(jnp.sum(rollouts.batch.loss_mask * sampled[:, None]), rows),
      'unscorable': Mean(rows - jnp.sum(valid), rows),
  }
