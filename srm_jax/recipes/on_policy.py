"""The on-policy source: prompts of the step, completions of the student, grades. Shared by RL and distillation.

With `dynamic` a step is made of groups that have something to tell: prompts are sampled until enough groups hold two
different rewards, all others are dropped, and what is left over is carried to the next step.
Reference: dynamic sampling: Yu et al., DAPO, arXiv 2503.14476.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from srm_jax import schema
from srm_jax.data.prompting import Prompting, prompt_ids
from srm_jax.data.records import content_hash
from srm_jax.inference import make_generate
from srm_jax.recipes import learned_rewards
from srm_jax.recipes.context import Context, DataConfig, find_task, load_problems, open_data
from srm_jax.recipes.difficulty import ORDERS
from srm_jax.rewards import REWARDS, Graded, Grading, Part, Seen, grade, make_grade, make_judge
from srm_jax.rollout import rollout, to_rollouts
from srm_jax.types import Completion, Mean, Problem, Rollouts, SamplingParams, Source


@dataclasses.dataclass(frozen=True)
class DynamicConfig:
  """prompts: groups sampled at a time; rounds: at most so many times a step. Where that does not fill the step, groups
  without two different rewards do, with no loss on them.
  """

  prompts: int
  rounds: int


CUT = ('learn', 'mask')


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """prompts groups of `samples` completions a step; rows of `length` positions; top_k 0 and top_p 1 sample from all.

  cut: whether completions that the length limit cut are learnt from, or carry no loss ('mask'; they are graded and
  belong to their group's baseline all the same). order: which problems come when. dynamic: None takes groups as they
  come. patience: steps in a row without any two different rewards in a group (in a batch, where an advantage compares
  none) after which a run that learns from rewards stops; 0 never does.
  """

  prompts: int
  samples: int
  length: int
  max_new_tokens: int
  temperature: float
  top_k: int
  top_p: float
  cut: str
  order: schema.ChoiceConfig
  dynamic: DynamicConfig | None
  patience: int

  def __post_init__(self):
    if self.cut not in CUT:
      raise ValueError(f'cut is {self.cut!r}; choose from {CUT}')
    if self.dynamic and self.dynamic.prompts * self.dynamic.rounds < self.prompts:
      raise ValueError(
          f'dynamic: {self.dynamic.rounds} rounds of {self.dynamic.prompts} prompts are fewer than the {self.prompts} '
          'of a step'
      )


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """kind: from REWARDS, or 'model', with its options. weight: in the sum; at 0 it is only reported."""

  kind: str
  weight: float
  options: Mapping[str, Any]


def open_rewards(
    section: Mapping[str, Any], data: DataConfig, context: Context,
) -> tuple[Grading, Mapping[str, Any]]:
  """How completions are graded: by the weighted sum of the section's rewards, or by the task alone where it is empty.

  Returns:
    (Grading, {name: (TransformerConfig, params)} of the models that it asks).

  Raises:
    ConfigError: an unknown kind or option, or one that the data do not fit.
  """
  if not section:
    return Grading(grade), {}
  parts, judges, models = {}, {}, {}
  for name, one in section.items():
    config, where = schema.parse(RewardConfig, one, f'rewards.{name}'), f'rewards.{name}.kind'
    if config.kind == learned_rewards.KIND:
      fn, models[f'reward/{name}'] = learned_rewards.open_model(config.options, f'rewards.{name}.options', context)
      judges[name] = Part(config.weight, fn)
    else:
      kinds = {**REWARDS, learned_rewards.KIND: learned_rewards.open_model}
      parts[name] = Part(config.weight, schema.bind(where, config.kind, config.options, kinds))
  _try(parts, data)
  return Grading(make_grade(parts), make_judge(judges) if judges else None), models


def _try(parts, data):
  """Asks every reward about one completion, so that what can never work is found when a config is opened."""
  problem, task = load_problems(dataclasses.replace(data, count=1))[0], find_task(data.task)
  completion = Completion(None, 0, 'x', (0,), (0,), (0.0,), True)
  for name, part in parts.items():
    try:
      part.fn(Seen(task, problem, completion, 0.0))
    except (TypeError, ValueError) as error:
      raise schema.ConfigError(f'rewards.{name}: {error}') from error


def check_lengths(
    config: RolloutConfig, prompting: Prompting, problems: Sequence[Problem], context: Context,
) -> int:
  """Tokens of the longest prompt.

  Raises:
    ConfigError: with max_new_tokens it fits neither in a row nor in the model's context.
  """
  lengths = {problem.id: len(prompt_ids(context.tokenizer, prompting.prompt(problem))) for problem in problems}
  longest = max(lengths, key=lengths.get)
  room = min(config.length, context.model.max_length)
  if lengths[longest] + config.max_new_tokens > room:
    raise schema.ConfigError(
        f'prompt {longest} has {lengths[longest]} tokens; with max_new_tokens={config.max_new_tokens} it does not fit '
        f'in {room}, the smaller of rollouts.length={config.length} and model.max_length={context.model.max_length}'
    )
  return lengths[longest]


def prompt_width(config: RolloutConfig, data: DataConfig, context: Context) -> int:
  """Slots that hold every prompt of the data.

  Raises:
    ConfigError: as `check_lengths`; no problem.
  """
  return check_lengths(config, open_data(data, context.tokenizer), _problems(data), context)


def _problems(data: DataConfig) -> list[Problem]:
  problems = load_problems(data)
  if not problems:
    raise schema.ConfigError(f'no problem to sample for in {data}')
  return problems


def row_length(groups, config: RolloutConfig, prompt_width: int) -> int:
  """Half, three quarters or all of what a row may hold, whichever is the least that is enough: little padding, few
  programs. With a width for prompts, it is that and as much of max_new_tokens.
  """
  rows = [one.completion for group in groups for one in group]
  if prompt_width:
    return prompt_width + _enough(max(len(row.tokens) for row in rows), config.max_new_tokens)
  return _enough(max(len(row.prompt_tokens) + len(row.tokens) for row in rows), config.length)


def _enough(needed: int, limit: int) -> int:
  return next(length for length in (limit // 2, 3 * limit // 4, limit) if needed <= length or length == limit)


def informative(group: Sequence[Graded]) -> bool:
  """Whether two of its rewards differ."""
  return len({one.reward for one in group if one.reward is not None}) > 1


def within_groups(groups: Sequence[Sequence[Graded]]) -> bool:
  """Whether rewards differ within a group: what is learnt from comparing a prompt's completions."""
  return any(informative(group) for group in groups)


def within_batch(groups: Sequence[Sequence[Graded]]) -> bool:
  """Whether rewards differ at all: what is learnt from each completion's own."""
  return informative([one for group in groups for one in group])


def source(
    config: RolloutConfig, data: DataConfig, context: Context, *, advantage: Callable | None,
    rewards: Grading = Grading(grade), prompt_width: int = 0, teaches: Callable[..., bool] | None = None,
) -> Source:
  """Rollouts as a pure function of (params, seed, step) and of the state: what is carried, and what an order learnt.

  Every host has all rows of a step, from one program on the devices of all of them, and the same grades, so that all
  decide alike; `sharding.own_rows` are those that it hands in.

  prompt_width: slot at which all completions begin; 0 puts each right behind its prompt.
  teaches: whether the rewards of a step's groups can teach anything, for `patience`; None where they are not learnt.
  """
  rows, hosts = config.prompts * config.samples, jax.process_count()
  if rows % hosts:
    raise schema.ConfigError(
        f'rollouts.prompts x samples are {rows} rows a step, which do not divide over {hosts} hosts; choose a multiple'
    )
  prompting, problems = open_data(data, context.tokenizer), _problems(data)
  check_lengths(config, prompting, problems, context)
  order = schema.bind('rollouts.order', config.order.name, config.order.options, ORDERS)(problems, context.seed)
  identity = {'data_hash': content_hash([problem.id for problem in problems]), 'seed': context.seed}
  by_id = {problem.id: problem for problem in problems}
  sampling = SamplingParams(
      temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, max_new_tokens=config.max_new_tokens,
      samples=config.samples,
  )
  now = {'rounds': 0, 'still': 0, 'carried': []}

  def draw(params, count: int, turn: int) -> list[list[Graded]]:
    generate = make_generate(context.model, params['model'], context.tokenizer, batch_size=count * config.samples)
    drawn = dataclasses.replace(sampling, seed=context.seed * 1_000_003 + turn)
    groups = rollout(generate, prompting, order.choose(count, turn), drawn, grading=rewards)
    order.learn(groups)
    return groups

  def fill(params) -> tuple[list, list]:
    """(the step's groups, informative ones first; all that were drawn for it)."""
    kept, dropped, drawn = now['carried'], [], []
    for _ in range(config.dynamic.rounds):
      if len(kept) >= config.prompts:
        break
      groups = draw(params, config.dynamic.prompts, now['rounds'])
      now['rounds'] += 1
      drawn += groups
      kept = kept + [group for group in groups if informative(group)]
      dropped += [group for group in groups if not informative(group)]
    now['carried'] = kept[config.prompts :]
    return (kept + dropped)[: config.prompts], drawn

  def next_rollouts(params, step: int) -> Rollouts:
    if config.dynamic:
      groups, drawn = fill(params)
    else:
      groups = drawn = draw(params, config.prompts, step)
    if teaches:
      _watch(now, groups, config.patience, teaches)
    made = to_rollouts(
        groups, length=row_length(groups, config, prompt_width), pad_id=context.tokenizer.pad_id,
        prompt_width=prompt_width, advantage=advantage,
    )
    outcomes = made.outcomes._replace(drawn=_in_sum(drawn, len(made.rewards)))
    return _masked(made._replace(outcomes=outcomes), groups, config)

  def get_state():
    return {**identity, **now, 'order': order.get_state(), 'carried': [_packed(group) for group in now['carried']]}

  def set_state(state):
    if {key: state.get(key) for key in identity} != identity:
      raise schema.ConfigError(f'the prompts changed since the checkpoint: {state} then, {identity} now')
    unpack = lambda group: _unpacked(group, by_id[group['problem']], prompting)
    now.update({key: state[key] for key in ('rounds', 'still')}, carried=[unpack(group) for group in state['carried']])
    order.set_state(state['order'])

  return Source(next_rollouts, get_state, set_state)


def _watch(now: dict, groups, patience: int, teaches):
  """Counts steps in a row that teach nothing, and stops a run that has had too many of them."""
  now['still'] = 0 if teaches(groups) else now['still'] + 1
  if patience and now['still'] >= patience:
    known = [one.reward for group in groups for one in group if one.reward is not None]
    seen = 'no completion could be scored'
    if known:
      where = 'of a group ' if teaches is within_groups else ''
      seen = f'all rewards {where}were alike (mean {np.mean(known):.3g})'
    raise schema.ConfigError(
        f'for {patience} steps in a row {seen}, so nothing was learnt; fix: problems of another difficulty '
        "(rollouts.order.name='pass_rates', rollouts.dynamic), more rollouts.samples, a higher rollouts.temperature, a "
        'start that is right now and then, or rollouts.patience=0 to go on'
    )


def _masked(made: Rollouts, groups, config: RolloutConfig) -> Rollouts:
  """No loss on rows that are not to be learnt: cut ones, and groups that only fill a step."""
  keep = np.ones(len(made.rewards), np.float32)
  if config.cut == 'mask':
    keep *= made.outcomes.finished
  if config.dynamic:
    keep *= np.repeat([informative(group) for group in groups], config.samples)
  return made._replace(batch=made.batch._replace(loss_mask=made.batch.loss_mask * keep[:, None]))


def _in_sum(groups, rows: int) -> Mapping[str, np.ndarray]:
  """Numbers of a whole draw, spread evenly over the rows of its step, so that they add up."""
  grades = [one.correct for group in groups for one in group if one.correct is not None]
  totals = {
      'right': sum(grades), 'graded': len(grades), 'groups': len(groups),
      'still': sum(not informative(group) for group in groups),
      'tokens': sum(len(one.completion.tokens) for group in groups for one in group),
  }
  return {name: np.full(rows, total / rows, np.float32) for name, total in totals.items()}


def _packed(group: Sequence[Graded]) -> dict:
  """A group as JSON."""
  rows = []
  for graded in group:
    one = graded.completion
    rows.append(dict(
        sample=one.sample, text=one.text, prompt_tokens=one.prompt_tokens, tokens=one.tokens, logprobs=one.logprobs,
        finished=one.finished, reward=graded.reward, correct=graded.correct, parts=dict(graded.parts),
    ))
  return {'problem': group[0].problem.id, 'rows': rows}


def _unpacked(group: Mapping[str, Any], problem: Problem, prompting: Prompting) -> list[Graded]:
  prompt, found = prompting.prompt(problem), []
  for row in group['rows']:
    tokens = {key: tuple(row[key]) for key in ('prompt_tokens', 'tokens', 'logprobs')}
    completion = Completion(prompt, row['sample'], row['text'], finished=row['finished'], **tokens)
    found.append(Graded(problem, completion, row['reward'], row['correct'], row['parts']))
  return found


def metrics(rollouts: Rollouts) -> dict:
  """Rates that every on-policy run reports, as Means over the rows that the student sampled."""
  sampled = jnp.ones_like(rollouts.rewards) if rollouts.sampled is None else rollouts.sampled
  rows, valid, outcomes = jnp.sum(sampled), rollouts.valid * sampled, rollouts.outcomes
  lengths = jnp.sum(rollouts.batch.loss_mask, axis=1) if outcomes is None else outcomes.lengths
  mean = lambda values, weights: Mean(jnp.sum(values * weights), jnp.sum(weights))
  found = {
      'reward': mean(rollouts.rewards, valid), 'completion_tokens': mean(lengths, sampled),
      'unscorable': Mean(rows - jnp.sum(valid), rows),
  }
  if outcomes is None:
    return found
  found |= {
      'truncated': mean(1 - outcomes.finished, sampled), 'length_right': mean(lengths, outcomes.right),
      'length_wrong': mean(lengths, outcomes.wrong),
  }
  found |= {f'reward/{name}': mean(values, known) for name, (values, known) in outcomes.parts.items()}
  if outcomes.drawn:
    total = {name: jnp.sum(values) for name, values in outcomes.drawn.items()}
    found['pass_rate'] = Mean(total['right'], total['graded'])
    found['zero_variance'] = Mean(total['still'], total['groups'])
    found['drawn_tokens'] = Mean(total['tokens'], rows)  # of dropped groups too, for each row that is learnt
  return found
