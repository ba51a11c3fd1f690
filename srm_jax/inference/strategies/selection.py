"""Strategies that sample several completions and keep one."""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence

from srm_jax.types import Completion, Generate, Prompt, SamplingParams, Spent

Choice = Callable[[Sequence[Sequence[Completion]]], list[Completion]]  # one of every group
Score = Callable[[Sequence[Completion]], Sequence[float]]


def self_consistency(generate: Generate, *, extract: Callable[[str], str | None], samples: int) -> Generate:
  """The first completion with the most frequent answer among `samples`.

  answer = argmax_a sum_i 1[extract(completion_i) = a], ties to the answer seen first. Completions without an answer do
  not vote; where none has one, the first completion is returned.

  Reference: Wang et al., Self-Consistency Improves Chain of Thought Reasoning, arXiv:2203.11171.
  """

  def choose(groups):
    return [_majority(group, [extract(completion.text) for completion in group]) for group in groups]

  return _select(generate, choose, samples)


def _majority(group, answers):
  votes = collections.Counter(answer for answer in answers if answer is not None)
  if not votes:
    return group[0]
  winner, _ = votes.most_common(1)[0]  # equal counts stay in the order of first appearance
  return group[answers.index(winner)]


def best_of_n(generate: Generate, *, score: Score, samples: int) -> Generate:
  """The completion of highest score among `samples`, ties to the first.

  score maps completions to numbers, with a reward model or the log-probabilities of a teacher; it is called once for
  all prompts. It reads prompt and completion, so both count as scored tokens.

  Reference: Cobbe et al., Training Verifiers to Solve Math Word Problems, arXiv:2110.14168.
  """

  def choose(groups):
    scores = iter(score([completion for group in groups for completion in group]))
    return [max(zip(group, scores), key=lambda scored: scored[1])[0] for group in groups]

  return _select(_with_cost(generate), choose, samples)


def weighted_vote(
    generate: Generate, *, extract: Callable[[str], str | None], score: Score, samples: int,
) -> Generate:
  """The best scored completion with the answer that has most weight among `samples`.

  answer = argmax_a sum_i 1[extract(completion_i) = a] exp(score_i), ties to the answer seen first. score maps
  completions to logarithms of weights: of a probability to be right, by a reward model, or to be written. Completions
  without an answer do not vote; where none has one, the first completion is returned.

  Reference: Li et al., Making Language Models Better Reasoners with Step-Aware Verifier, arXiv:2206.02336.
  """

  def choose(groups):
    scores = iter(score([completion for group in groups for completion in group]))
    return [_heaviest(group, [extract(one.text) for one in group], [next(scores) for _ in group]) for group in groups]

  return _select(_with_cost(generate), choose, samples)


def _heaviest(group, answers, scores):
  highest, votes = max(scores), collections.defaultdict(float)
  for answer, one in zip(answers, scores):
    if answer is not None:  # relative to the highest: weights of long texts would all round to 0
      votes[answer] += math.exp(one - highest) if one > -math.inf else 0.0
  if not votes:
    return group[0]
  winner = max(votes, key=votes.get)  # equal weights stay in the order of first appearance
  return max((row for row in zip(scores, group, answers) if row[2] == winner), key=lambda row: row[0])[1]


def _with_cost(generate: Generate) -> Generate:
  return lambda prompts, sampling: [[_scored(one) for one in group] for group in generate(prompts, sampling)]


def _scored(completion):
  tokens = len(completion.prompt_tokens) + len(completion.tokens)
  return dataclasses.replace(completion, spent=completion.spent._replace(scored=completion.spent.scored + tokens))


def _select(generate: Generate, choose: Choice, samples: int) -> Generate:
  """Draws `samples` completions for each one asked for and keeps the chosen one, at the cost of all of them."""
  if samples < 1:
    raise ValueError(f'samples={samples}; a choice needs at least 1')

  def strategy(prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Completion]]:
    drawn = generate(prompts, dataclasses.replace(sampling, samples=sampling.samples * samples))
    groups = [group[k * samples : (k + 1) * samples] for group in drawn for k in range(sampling.samples)]
    kept = [
        dataclasses.replace(completion, sample=i % sampling.samples, spent=_total(group))
        for i, (completion, group) in enumerate(zip(choose(groups), groups, strict=True))
    ]
    return [kept[i * sampling.samples : (i + 1) * sampling.samples] for i in range(len(prompts))]

  return strategy


def _total(group):
  return Spent(*(sum(part) for part in zip(*(completion.spent for completion in group))))
