"""Strategies that change what is asked and sample once."""

import dataclasses
from collections.abc import Sequence

from srm_jax.types import Completion, Generate, Prompt, SamplingParams


def direct(generate: Generate, *, cue: str) -> Generate:
  """The answer at once: `cue` ends the prompt and opens the completion's text, so that graders read a full answer.

  `tokens` and `logprobs` stay what the model sampled; the cue is part of `prompt.text` and of `prompt_tokens`.
  """

  def strategy(prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Completion]]:
    cued = [_opened(prompt, cue) for prompt in prompts]
    return [
        [dataclasses.replace(completion, text=cue + completion.text) for completion in group]
        for group in generate(cued, sampling)
    ]

  return strategy


def _opened(prompt: Prompt, cue: str) -> Prompt:
  opening = prompt.opening + cue if prompt.tokens else ''
  return prompt._replace(text=prompt.text + cue, opening=opening)


def chain_of_thought(generate: Generate, *, temperature: float | None = None) -> Generate:
  """The model reasons, then answers: its completion as it is. temperature None samples as asked; 0 is greedy.

  Reference: Wei et al., Chain-of-Thought Prompting Elicits Reasoning in Large Language Models, arXiv:2201.11903.
  """

  def strategy(prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Completion]]:
    chosen = sampling if temperature is None else dataclasses.replace(sampling, temperature=temperature)
    return generate(prompts, chosen)

  return strategy
