"""Truth tables of the strategies that choose among samples, and what they cost."""

import itertools
import math

import pytest

from srm_jax.inference.strategies import STRATEGIES
from srm_jax.types import SamplingParams, Spent
from tests.inference.strategies.fakes import PROMPT, answer, fake, length_score


@pytest.mark.parametrize('texts, winner', [
    (['a=1', 'b=2', 'c=2'], 'b=2'),  # majority, first completion with it
    (['a=1', 'b=2', 'c=3'], 'a=1'),  # tie: first seen
    (['a=2', 'b=1', 'c=1', 'd=2'], 'a=2'),  # tie of two
    (['none', 'nothing', 'c=3'], 'c=3'),  # no answer, no vote
    (['none', 'b=', 'c='], 'b='),  # an empty answer is an answer
    (['none', 'nothing', 'void'], 'none'),  # nobody answered
])
def test_self_consistency(texts, winner):
  strategy = STRATEGIES['self_consistency'](fake(texts), extract=answer, samples=len(texts))
  (completion,), = strategy([PROMPT], SamplingParams())
  assert completion.text == winner
  assert completion.spent == Spent(9 * len(texts), sum(map(len, texts)), 0)


@pytest.mark.parametrize('texts, winner', [
    (['a', 'bbb', 'cc'], 'bbb'), (['aa', 'bb', 'c'], 'aa'), (['', '', 'z'], 'z'),
])
def test_best_of_n(texts, winner):
  (completion,), = STRATEGIES['best_of_n'](fake(texts), score=length_score, samples=3)([PROMPT], SamplingParams())
  tokens = sum(map(len, texts))
  assert completion.text == winner
  assert completion.spent == Spent(27, tokens, 27 + tokens)


@pytest.mark.parametrize('right', range(4))
def test_a_perfect_scorer_finds_the_right_completion(right):
  texts = [f'{place}={int(place == right)}' for place in range(4)]
  perfect = lambda completions: [0.0 if answer(one.text) == '1' else -math.inf for one in completions]
  for name, options in [('best_of_n', {}), ('weighted_vote', {'extract': answer})]:
    strategy = STRATEGIES[name](fake(texts), score=perfect, samples=4, **options)
    assert strategy([PROMPT], SamplingParams())[0][0].text == texts[right]


def weights(**given):
  """score: logarithms of the weights of texts by their first letter."""
  logarithm = lambda weight: math.log(weight) if weight else -math.inf
  return lambda completions: [logarithm(given[completion.text[0]]) for completion in completions]


@pytest.mark.parametrize('texts, given, winner', [
    (['a=1', 'b=2', 'c=2'], dict(a=0.7, b=0.2, c=0.4), 'a=1'),  # one that weighs more than both others
    (['a=1', 'b=2', 'c=2'], dict(a=0.5, b=0.2, c=0.4), 'c=2'),  # together they do; the better of the two
    (['a=1', 'b=2', 'c=2'], dict(a=1e-300, b=1e-302, c=1e-302), 'a=1'),  # weights that are 0 in float32
    (['a=1', 'b=2', 'c=3'], dict(a=0.5, b=0.5, c=0.25), 'a=1'),  # tie: first seen
    (['none', 'b=2', 'c=3'], dict(n=1.0, b=0.1, c=0.2), 'c=3'),  # no answer, no vote
    (['a=1', 'b=2', 'c=2'], dict(a=0, b=0, c=0), 'a=1'),  # nothing speaks for any
    (['none', 'void', 'null'], dict(n=0.1, v=1.0), 'none'),  # nobody answered
])
def test_weighted_vote(texts, given, winner):
  strategy = STRATEGIES['weighted_vote'](fake(texts), extract=answer, score=weights(**given), samples=len(texts))
  (completion,), = strategy([PROMPT], SamplingParams())
  assert completion.text == winner
  tokens = sum(map(len, texts))
  assert completion.spent == Spent(27, tokens, 27 + tokens)


def test_equal_weights_vote_like_the_majority():
  for texts in itertools.product(['a=1', 'b=2', 'c'], repeat=3):
    vote, majority = (
        STRATEGIES[name](fake(texts), extract=answer, samples=3, **options)([PROMPT], SamplingParams())[0][0].text
        for name, options in [('weighted_vote', {'score': lambda group: [-3.0] * len(group)}), ('self_consistency', {})]
    )
    assert vote == majority


def test_choices_are_made_group_by_group():
  strategy = STRATEGIES['best_of_n'](fake(['a', 'bb', 'cccc', 'ddd']), score=length_score, samples=2)
  assert [completion.text for completion in strategy([PROMPT], SamplingParams(samples=2))[0]] == ['bb', 'cccc']


@pytest.mark.parametrize('name, options', [
    ('self_consistency', {'extract': answer}), ('best_of_n', {'score': length_score}),
    ('weighted_vote', {'extract': answer, 'score': length_score}),
])
def test_no_samples_is_an_error(name, options):
  with pytest.raises(ValueError, match='samples=0'):
    STRATEGIES[name](fake([]), samples=0, **options)
