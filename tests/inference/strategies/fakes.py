"""A sampler with known completions, for tests of strategies."""

from srm_jax.types import Completion, Prompt, Spent

PROMPT = Prompt('p', 'question\n')


def fake(texts, calls=None):
  """A sampler whose i-th sample is texts[i]; every character is a token."""

  def generate(prompts, sampling):
    if calls is not None:
      calls.append((list(prompts), sampling))
    return [[completion_of(prompt, i, texts[i]) for i in range(sampling.samples)] for prompt in prompts]

  return generate


def completion_of(prompt, sample, text):
  prompt_tokens, tokens = tuple(map(ord, prompt.text)), tuple(map(ord, text))
  spent = Spent(len(prompt_tokens), len(tokens))
  return Completion(prompt, sample, text, prompt_tokens, tokens, (-1.0,) * len(tokens), True, spent)


def answer(text):
  return text.split('=')[1] if '=' in text else None


def length_score(completions):
  return [len(completion.text) for completion in completions]
