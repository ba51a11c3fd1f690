"""Which problems a step samples for: all alike, from easy to hard, or those that are neither known nor hopeless.

`ORDERS` are fn(problems, seed, ...) -> Order. What an order has learnt of the student is in its state, so that a run
that is resumed asks for the same problems.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from srm_jax import schema
from srm_jax.rewards import Graded
from srm_jax.rollout import subsample
from srm_jax.types import Problem

Groups = Sequence[Sequence[Graded]]


class Order(NamedTuple):
  """choose(count, turn) -> problems of a draw; learn(groups) is told what came of it; the state is JSON."""

  choose: Callable[[int, int], list[Problem]]
  learn: Callable[[Groups], None]
  get_state: Callable[[], Any]
  set_state: Callable[[Any], None]


def uniform(problems: Sequence[Problem], seed: int) -> Order:
  """Every problem once an epoch, in a new order each."""
  return Order(
      lambda count, turn: subsample(problems, count, seed=seed, step=turn), lambda groups: None, lambda: None,
      lambda state: None,
  )


def levels(
    problems: Sequence[Problem], seed: int, *, key: str = 'steps', advance: float = 0.7, window: int = 64,
) -> Order:
  """From easy to hard: problems up to a level, which rises when the hardest of them are mastered.

  Args:
    problems: with `key` in their metadata.
    seed: of the order.
    key: what is harder the larger it is.
    advance: pass rate of the hardest level, over its last `window` graded completions, at which the next begins.
    window: completions that are judged; a new level starts to count anew.

  Reference: Bengio et al., Curriculum Learning, 2009; Stojanovski et al., Reasoning Gym, arXiv 2505.24760.
  """
  for problem in problems:
    if key not in problem.metadata:
      raise schema.ConfigError(f'problem {problem.id!r} has no {key!r} in its metadata; {sorted(problem.metadata)} are')
  known = sorted({problem.metadata[key] for problem in problems})
  now = {'level': 0, 'recent': []}

  def choose(count, turn):
    allowed = [problem for problem in problems if problem.metadata[key] <= known[now['level']]]
    return subsample(allowed, count, seed=seed, step=turn)

  def learn(groups):
    hardest = known[now['level']]
    grades = [one.correct for group in groups for one in group if one.problem.metadata[key] == hardest]
    now['recent'] = [*now['recent'], *(grade for grade in grades if grade is not None)][-window:]
    if len(now['recent']) == window and np.mean(now['recent']) >= advance and now['level'] + 1 < len(known):
      now.update(level=now['level'] + 1, recent=[])

  return Order(choose, learn, lambda: {**now, 'recent': list(now['recent'])}, now.update)


def pass_rates(
    problems: Sequence[Problem], seed: int, *, memory: float = 0.5, floor: float = 0.05,
) -> Order:
  """Problems in proportion to p (1 - p) + floor, p the pass rate seen so far: half right teaches most.

  Args:
    problems: to choose from, without repetition in one draw.
    seed: of the draws.
    memory: share of the old pass rate when a problem is sampled again. One that was never sampled counts as 1/2.
    floor: keeps what is known and what is hopeless in reach.

  Reference: Foster et al., Learning to Reason at the Frontier of Learnability, arXiv 2502.12272.
  """
  places = {problem.id: place for place, problem in enumerate(problems)}
  rates = np.full(len(problems), 0.5)

  def choose(count, turn):
    weights = rates * (1 - rates) + floor
    if count > len(problems):
      raise schema.ConfigError(f'{count} problems a draw, but there are {len(problems)}; fix: fewer rollouts.prompts')
    drawn = np.random.default_rng((seed, turn)).choice(len(problems), count, replace=False, p=weights / weights.sum())
    return [problems[place] for place in drawn]

  def learn(groups):
    for group in groups:
      grades = [one.correct for one in group if one.correct is not None]
      if grades:
        place = places[group[0].problem.id]
        rates[place] = memory * rates[place] + (1 - memory) * np.mean(grades)

  def set_state(state):
    rates[:] = state

  return Order(choose, learn, rates.tolist, set_state)


ORDERS: dict[str, Callable[..., Order]] = {'uniform': uniform, 'levels': levels, 'pass_rates': pass_rates}
