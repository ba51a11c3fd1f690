"""A reward model's scores are what its head says of a plain forward pass, at the right tokens."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from srm_jax.data import steps, tokenizer
from srm_jax.inference import reward_scores
from srm_jax.losses.reward_model import AGGREGATIONS
from srm_jax.models import heads, transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.types import Completion, Prompt

BYTES = tokenizer.load('byte')
CONFIG = TransformerConfig(258, 2, 16, 2, 2, 8, 32, max_length=64)
PROMPT = '1+1=\n'


@functools.cache
def _params():
  model = jax.jit(transformer.init_params, static_argnums=0)(CONFIG, jax.random.key(0))
  return model, {**heads.init_value_head(jax.random.key(1), 16), 'bias': jax.numpy.array(0.3)}


def _completion(text, *, prompt=PROMPT, finished=True):
  tokens = (*BYTES.encode(text), *([BYTES.eos_id] if finished else []))
  asked = tuple(BYTES.encode(prompt))
  return Completion(Prompt(prompt, prompt), 0, text, asked, tokens, (0.0,) * len(tokens), finished)


@functools.cache
def _values(completion):
  """What the head says of every token of a completion, from an unpadded forward pass."""
  model, head = _params()
  inputs = np.array([completion.prompt_tokens + completion.tokens], np.int32)
  hidden = transformer.Transformer(CONFIG).apply({'params': model}, inputs, logits_at=()).hidden
  return np.asarray(heads.value(head, hidden))[0, len(completion.prompt_tokens) :]


def _scorer(segment=None):
  return reward_scores.make_reward_scorer(CONFIG, *_params(), BYTES, segment=segment, batch_size=2)


COMPLETIONS = [
    _completion('1+1=2\n#### 2'), _completion('½ €', prompt='a longer prompt\n', finished=False), _completion('x'),
    dataclasses.replace(_completion(''), tokens=()),
]


def test_an_outcome_is_the_score_of_the_last_token():
  with jax.default_matmul_precision('highest'):
    found = _scorer()(COMPLETIONS)
    expected = [_values(one)[-1:] for one in COMPLETIONS[:3]]
  assert [len(row) for row in found] == [1, 1, 1, 0]
  np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=1e-4)


@pytest.mark.parametrize('segment, places', [
    (steps.lines, [[5, 11], [5], [0], []]), (steps.characters, [[0, 1, 2, 3, 4, 11], [1, 5], [0], []]),
])
def test_steps_are_scored_where_they_end(segment, places):
  """The second text is two bytes, a space and three bytes."""
  with jax.default_matmul_precision('highest'):
    found = _scorer(segment)(COMPLETIONS)
    expected = [_values(one)[at] for one, at in zip(COMPLETIONS[:3], places)]
  assert [len(row) for row in found] == [len(at) for at in places]
  np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=1e-4)


def test_completions_of_another_tokenizer_are_named():
  with pytest.raises(ValueError, match='was sampled with another tokenizer'):
    _scorer()([dataclasses.replace(COMPLETIONS[0], prompt_tokens=(1, 2))])


@pytest.mark.parametrize('name', AGGREGATIONS)
def test_scores_are_reduced_whatever_their_number(name):
  found = reward_scores.reduced(name, [np.array([2.0, -1.0]), np.zeros(0), np.array([0.5] * 40)])
  log = lambda x: -np.log1p(np.exp(-x))
  both = {'min': log(-1.0), 'last': log(-1.0), 'mean': np.log((np.exp(log(2.0)) + np.exp(log(-1.0))) / 2)}
  assert found[0] == pytest.approx(both.get(name, log(2.0) + log(-1.0)), rel=1e-5)
  assert found[1] == -np.inf and found[2] == pytest.approx(log(0.5) * (40 if name == 'product' else 1), rel=1e-5)
  assert reward_scores.reduced(name, []) == []
