"""Truth tables of the strategies that choose among samples, and what they cost."""

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


def test_choices_are_made_group_by_group():
  strategy = STRATEGIES['best_of_n'](fake(['a', 'bb', 'cccc', 'ddd']), score=length_score, samples=2)
  assert [completion.text for completion in strategy([PROMPT], SamplingParams(samples=2))[0]] == ['bb', 'cccc']


@pytest.mark.parametrize('name, options', [
    ('self_consistency', {'extract': answer}), ('best_of_n', {'score': length_score}),
])
def test_no_samples_is_an_error(name, options):
  with pytest.raises(ValueError, match='samples=0'):
    STRATEGIES[name](fake([]), samples=0, **options)
