"""Every entry of STRATEGIES, alone and nested."""

import pytest

from srm_jax.inference.strategies import STRATEGIES
from srm_jax.types import Prompt, SamplingParams, Spent
from tests.inference.strategies.fakes import PROMPT, answer, fake, length_score


OPTIONS = {
    'direct': {'cue': '='},
    'chain_of_thought': {},
    'self_consistency': {'extract': answer, 'samples': 3},
    'best_of_n': {'score': length_score, 'samples': 3},
    'weighted_vote': {'extract': answer, 'score': length_score, 'samples': 3},
}


@pytest.mark.parametrize('name', STRATEGIES)
def test_every_strategy_gives_as_many_completions_as_asked_in_order(name):
  prompts = [PROMPT, Prompt('q', 'other')]
  strategy = STRATEGIES[name](fake(['a=1', 'b=2', 'c=2', 'd=3', 'e=3', 'f=4']), **OPTIONS[name])
  groups = strategy(prompts, SamplingParams(samples=2))
  assert [[(c.prompt.id, c.sample) for c in group] for group in groups] == [[('p', 0), ('p', 1)], [('q', 0), ('q', 1)]]
  assert strategy([], SamplingParams()) == []


def test_options_cover_the_registry():
  assert set(OPTIONS) == set(STRATEGIES)


def test_strategies_nest():
  texts = ['a=1', 'bbbb=2', 'cc=2', 'dd=2']
  inner = STRATEGIES['best_of_n'](fake(texts), score=length_score, samples=2)
  (completion,), = STRATEGIES['self_consistency'](inner, extract=answer, samples=2)([PROMPT], SamplingParams())
  tokens = sum(map(len, texts))
  assert completion.text == 'bbbb=2'
  assert completion.spent == Spent(36, tokens, 36 + tokens)
