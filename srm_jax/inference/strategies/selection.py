"""Strategies that sample several completions and keep one."""

import collections
import dataclasses
from collections.abc import Callable, Sequence

from srm_jax.types import Completion, Generate, Prompt, SamplingParams, Spent

Choice = Callable[[Sequence[Sequence[Completion]]], list[Completion]]  # one of every group


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


def best_of_n(
    generate: Generate, *, score: Callable[[Sequence[Completion]], Sequence[float]], samples: int,
) -> Generate:
  """The completion of highest score among `samples`, ties to the first.

  score maps completions to numbers, with a reward model or the log-probabilities of a teacher; it is called once for
  all prompts. It reads prompt and completion, so both count as scored tokens.

  Reference: Cobbe et al., Training Verifiers to Solve Math Word Problems, arXiv:2110.14168.
  """

  def choose(groups):
    scores = iter(score([completion for group in groups for completion in group]))
    return [max(zip(group, scores), key=lambda scored: scored[1])[0] for group in groups]

  def with_cost(prompts, sampling):
    return [[_scored(completion) for completion in group] for group in generate(prompts, sampling)]

  return _select(with_cost, choose, samples)


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
