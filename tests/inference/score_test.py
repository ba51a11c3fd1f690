"""Scores are the sampler's own log-probabilities, recomputed."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from srm_jax import inference
from srm_jax.inference import score
from srm_jax.types import Completion, Prompt, SamplingParams
from tests.inference import models

TOKENIZER = models.Characters


@functools.cache
def _completions():
  generate = inference.make_generate(models.CONFIG, models.params(), TOKENIZER, batch_size=4, steps=8)
  prompts = [Prompt('a', 'twelve letters'), Prompt('b', '7'), Prompt('c', '1+1=')]
  return [group[0] for group in generate(prompts, SamplingParams(max_new_tokens=8, temperature=0.6))]


@functools.cache
def _scorer(temperature=1.0):
  return score.make_scorer(models.CONFIG, models.params(), TOKENIZER, batch_size=2, temperature=temperature)


def test_scores_are_the_samplers_logprobs():
  completions = _completions()
  short = dataclasses.replace(completions[0], tokens=completions[0].tokens[:3])
  with jax.default_matmul_precision('highest'):
    scores = _scorer(0.6)([*completions, short])
  for completion, scored in zip([*completions, short], scores, strict=True):
    np.testing.assert_allclose(scored, completion.logprobs[: len(completion.tokens)], atol=1e-4)


def test_first_token_and_end_of_text_are_scored_once():
  prompt, tokens = TOKENIZER.encode('1+1='), [19, TOKENIZER.eos_id]
  completion = Completion(Prompt('c', '1+1='), 0, '2', tuple(prompt), tuple(tokens), (0.0, 0.0), True)
  logprobs = jax.nn.log_softmax(models.full_logits(models.params(), prompt + tokens), axis=-1)
  expected = [logprobs[len(prompt) - 1, 19], logprobs[len(prompt), TOKENIZER.eos_id]]
  np.testing.assert_allclose(_scorer()([completion])[0], expected, atol=1e-4)


def test_reductions():
  logprobs = np.log(np.array([0.5, 0.125, 0.5]))
  assert {name: pytest.approx(reduce(logprobs)) for name, reduce in score.REDUCTIONS.items()} == {
      'mean': np.log(0.03125) / 3, 'min': np.log(0.125), 'sum': np.log(0.03125)
  }
  assert all(reduce(np.zeros(0)) == -np.inf for reduce in score.REDUCTIONS.values())


def test_completions_of_another_tokenizer_or_too_long_are_named():
  good = _completions()[1]
  with pytest.raises(ValueError, match="completion 0 of prompt 'b' was sampled with another tokenizer"):
    _scorer()([dataclasses.replace(good, prompt_tokens=(1, 2))])
  with pytest.raises(ValueError, match="completion 0 of prompt 'b' has 301 tokens.*max_length=256"):
    _scorer()([dataclasses.replace(good, tokens=(5,) * 300)])
  assert _scorer()([]) == []
