"""Completions that were drawn before, behind the interface of a sampler: strategies compared on the same samples."""

from collections.abc import Sequence

from srm_jax.types import Completion, Generate, Prompt, SamplingParams


def replay(pool: Sequence[Sequence[Completion]]) -> Generate:
  """Serves the first `sampling.samples` completions of each prompt from a pool, one list of completions a prompt.

  Temperature, truncation and seed are those of the pool, whatever is asked for.

  Raises (the returned function):
    ValueError: a prompt that is not in the pool or has another text there, or too few completions.
  """
  by_id = {group[0].prompt.id: list(group) for group in pool if group}

  def generate(prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Completion]]:
    for prompt in prompts:
      _check(prompt, by_id.get(prompt.id, []), sampling.samples)
    return [by_id[prompt.id][: sampling.samples] for prompt in prompts]

  return generate


def _check(prompt, group, samples):
  if len(group) < samples:
    raise ValueError(
        f'prompt {prompt.id!r} has {len(group)} completions in the pool, {samples} are asked for; draw more'
    )
  if group[0].prompt.text != prompt.text:
    raise ValueError(
        f'prompt {prompt.id!r} was drawn for another text ({group[0].prompt.text!r}, now {prompt.text!r}); '
        'a strategy that changes the prompt needs a sampler'
    )
