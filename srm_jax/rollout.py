"""Prompts -> completions -> grades. Annotation writes them, RL trains on them, evaluation averages them."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from srm_jax import hosts
from srm_jax.data import packing
from srm_jax.data.prompting import Prompting
from srm_jax.rewards import Graded, Grading, grade, known_arrays, reward_arrays
from srm_jax.types import Batch, Generate, Outcomes, Problem, Rollouts, SamplingParams


def rollout(
    generate: Generate, prompting: Prompting, problems: Sequence[Problem], sampling: SamplingParams, *,
    grading: Grading = Grading(grade),
) -> list[list[Graded]]:
  """One group of `sampling.samples` graded completions a problem, in order.

  All hosts have all completions; each is graded by one of them, which tells the others.
  """
  completions = generate([prompting.prompt(problem) for problem in problems], sampling)

  def grades(place: int) -> list:
    group = grading.grade(prompting.task, problems[place], completions[place])
    return [(one.reward, one.correct, one.parts) for one in group]

  told = hosts.deal(grades, range(len(problems)))
  groups = [
      [Graded(problem, one, *row) for one, row in zip(group, rows, strict=True)]
      for problem, group, rows in zip(problems, completions, told, strict=True)
  ]
  return groups if grading.judge is None else [grading.judge(group) for group in groups]


def to_rollouts(
    groups: Sequence[Sequence[Graded]], *, length: int, pad_id: int, prompt_width: int = 0,
    advantage: Callable[..., np.ndarray] | None = None,
) -> Rollouts:
  """Numpy rollouts of equal-sized groups, one completion a row.

  Args:
    groups: P groups of G.
    length: positions of a row.
    pad_id: fills what is behind a completion, or before a prompt.
    prompt_width: slot at which completions begin; 0 puts them right behind prompts that begin with the row.
    advantage: (rewards [P, G], valid=[P, G]) -> [P, G], or None where no objective reads advantages.

  Returns:
    Rollouts with B = P G rows; advantages are spread over the sampled tokens of a row.

  Raises:
    ValueError: a row longer than `length`, or a prompt longer than its slots.
  """
  rows = [one.completion for group in groups for one in group]
  batch, aligned = packing.completions_batch(
      [row.prompt_tokens for row in rows], [row.tokens for row in rows], length=length, pad_id=pad_id,
      prompt_width=prompt_width,
  )
  rewards, valid = reward_arrays(groups)
  advantages = None
  if advantage is not None:
    advantages = np.asarray(advantage(rewards, valid=valid)).reshape(-1)[:, None] * batch.loss_mask
  return Rollouts(
      batch=batch, sampler_logprobs=aligned([row.logprobs for row in rows]), advantages=advantages,
      rewards=rewards.reshape(-1), valid=valid.reshape(-1),
      group=np.repeat(np.arange(len(groups), dtype=np.int32), len(groups[0])),
      outcomes=outcomes([one for group in groups for one in group]),
  )


def outcomes(rows: Sequence[Graded]) -> Outcomes:
  """What came of graded completions; nothing is drawn beside them."""
  correct, graded = known_arrays([[one.correct for one in rows]])
  parts = {name: known_arrays([[one.parts[name] for one in rows]]) for name in rows[0].parts}
  return Outcomes(
      lengths=np.array([len(one.completion.tokens) for one in rows], np.float32),
      finished=np.array([one.completion.finished for one in rows], np.float32),
      right=graded[0] * (correct[0] > 0.5), wrong=graded[0] * (correct[0] <= 0.5),
      parts={name: (values[0], known[0]) for name, (values, known) in parts.items()}, drawn={},
  )


def from_data(batch: Batch) -> Rollouts:
  """Rows of a data set as Rollouts that nobody sampled: no rewards, `sampled` 0, and no parts of a mix."""
  batch = batch if batch.sources is None else batch._replace(sources=None)
  zeros, rows = np.zeros(batch.inputs.shape, np.float32), len(batch.inputs)
  none = np.zeros(rows, np.float32)
  return Rollouts(
      batch=batch, sampler_logprobs=zeros, advantages=zeros, rewards=none, valid=none,
      group=np.full(rows, -1, np.int32), sampled=none,
  )


def all_sampled(rollouts: Rollouts) -> Rollouts:
  """The same rows with the fields of `from_data`: `sampled` 1, advantages 0 where there were none, no outcomes."""
  advantages = np.zeros_like(rollouts.sampler_logprobs) if rollouts.advantages is None else rollouts.advantages
  return rollouts._replace(advantages=advantages, sampled=np.ones_like(rollouts.rewards), outcomes=None)


def beside(rollouts: Rollouts, batch: Batch) -> Rollouts:
  """Sampled rows and rows of a data set in one batch, padded to the longer of the two.

  Rows alternate as evenly as they can, so that every device has some of both.
  """
  sampled, data = all_sampled(rollouts), from_data(batch)
  length = max(part.batch.inputs.shape[1] for part in (sampled, data))
  places = np.concatenate([(np.arange(len(part.rewards)) + 0.5) / len(part.rewards) for part in (sampled, data)])
  order = np.argsort(places, kind='stable')

  def join(first, second):
    parts = [np.pad(x, ((0, 0), (0, length - x.shape[1]))) if x.ndim == 2 else x for x in (first, second)]
    return np.concatenate(parts)[order]

  return jax.tree.map(join, sampled, data)


def subsample(problems: Sequence[Problem], count: int, *, seed: int, step: int) -> list[Problem]:
  """`count` problems of step `step`: consecutive slices of a new permutation each epoch, a pure function of
  (seed, step).
  """
  total, places = len(problems), range(step * count, (step + 1) * count)
  orders = {epoch: packing.permutation(total, seed, epoch) for epoch in {place // total for place in places}}
  return [problems[orders[place // total][place % total]] for place in places]
