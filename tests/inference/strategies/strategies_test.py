"""Truth tables of the strategies and what they cost, on a sampler with known completions."""

import pytest

from srm_jax.inference.strategies import STRATEGIES, replay
from srm_jax.types import Completion, Prompt, SamplingParams, Spent

PROMPT = Prompt('p', 'question\n')


def _fake(texts, calls=None):
  """A sampler whose i-th sample is texts[i]; every character is a token."""

  def generate(prompts, sampling):
    if calls is not None:
      calls.append((list(prompts), sampling))
    return [[_completion(prompt, i, texts[i]) for i in range(sampling.samples)] for prompt in prompts]

  return generate


def _completion(prompt, sample, text):
  prompt_tokens, tokens = tuple(map(ord, prompt.text)), tuple(map(ord, text))
  spent = Spent(len(prompt_tokens), len(tokens))
  return Completion(prompt, sample, text, prompt_tokens, tokens, (-1.0,) * len(tokens), True, spent)


def _answer(text):
  return text.split('=')[1] if '=' in text else None


def _length_score(completions):
  return [len(completion.text) for completion in completions]


OPTIONS = {
    'direct': {'cue': '='},
    'chain_of_thought': {},
    'self_consistency': {'extract': _answer, 'samples': 3},
    'best_of_n': {'score': _length_score, 'samples': 3},
}


@pytest.mark.parametrize('name', STRATEGIES)
def test_every_strategy_gives_as_many_completions_as_asked_in_order(name):
  prompts = [PROMPT, Prompt('q', 'other')]
  strategy = STRATEGIES[name](_fake(['a=1', 'b=2', 'c=2', 'd=3', 'e=3', 'f=4']), **OPTIONS[name])
  groups = strategy(prompts, SamplingParams(samples=2))
  assert [[(c.prompt.id, c.sample) for c in group] for group in groups] == [[('p', 0), ('p', 1)], [('q', 0), ('q', 1)]]
  assert strategy([], SamplingParams()) == []


def test_options_cover_the_registry():
  assert set(OPTIONS) == set(STRATEGIES)


def test_direct_asks_with_the_cue_and_answers_with_it():
  calls = []
  (completion,), = STRATEGIES['direct'](_fake(['42'], calls), cue='#### ')([PROMPT], SamplingParams())
  assert calls[0][0] == [Prompt('p', 'question\n#### ')]
  assert (completion.text, completion.tokens) == ('#### 42', tuple(map(ord, '42')))
  assert completion.spent == Spent(len('question\n#### '), 2, 0)


@pytest.mark.parametrize('temperature, used', [(None, 0.7), (0.0, 0.0), (1.0, 1.0)])
def test_chain_of_thought_temperature(temperature, used):
  calls = []
  STRATEGIES['chain_of_thought'](_fake(['x'], calls), temperature=temperature)([PROMPT], SamplingParams(temperature=0.7))
  assert calls[0][1].temperature == used


@pytest.mark.parametrize('texts, winner', [
    (['a=1', 'b=2', 'c=2'], 'b=2'),  # majority, first completion with it
    (['a=1', 'b=2', 'c=3'], 'a=1'),  # tie: first seen
    (['a=2', 'b=1', 'c=1', 'd=2'], 'a=2'),  # tie of two
    (['none', 'nothing', 'c=3'], 'c=3'),  # no answer, no vote
    (['none', 'b=', 'c='], 'b='),  # an empty answer is an answer
    (['none', 'nothing', 'void'], 'none'),  # nobody answered
])
def test_self_consistency(texts, winner):
  strategy = STRATEGIES['self_consistency'](_fake(texts), extract=_answer, samples=len(texts))
  (completion,), = strategy([PROMPT], SamplingParams())
  assert completion.text == winner
  assert completion.spent == Spent(9 * len(texts), sum(map(len, texts)), 0)


@pytest.mark.parametrize('texts, winner', [(['a', 'bbb', 'cc'], 'bbb'), (['aa', 'bb', 'c'], 'aa'), (['', '', 'z'], 'z')])
def test_best_of_n(texts, winner):
  (completion,), = STRATEGIES['best_of_n'](_fake(texts), score=_length_score, samples=3)([PROMPT], SamplingParams())
  tokens = sum(map(len, texts))
  assert completion.text == winner
  assert completion.spent == Spent(27, tokens, 27 + tokens)


def test_choices_are_made_group_by_group():
  strategy = STRATEGIES['best_of_n'](_fake(['a', 'bb', 'cccc', 'ddd']), score=_length_score, samples=2)
  assert [completion.text for completion in strategy([PROMPT], SamplingParams(samples=2))[0]] == ['bb', 'cccc']


def test_strategies_nest():
  texts = ['a=1', 'bbbb=2', 'cc=2', 'dd=2']
  inner = STRATEGIES['best_of_n'](_fake(texts), score=_length_score, samples=2)
  (completion,), = STRATEGIES['self_consistency'](inner, extract=_answer, samples=2)([PROMPT], SamplingParams())
  tokens = sum(map(len, texts))
  assert completion.text == 'bbbb=2'
  assert completion.spent == Spent(36, tokens, 36 + tokens)


def test_replay_serves_the_pool():
  pool = _fake(['a=1', 'b=2', 'c=2'])([PROMPT], SamplingParams(samples=3))
  again = replay(pool)
  assert again([PROMPT], SamplingParams(samples=2)) == [pool[0][:2]]
  (voted,), = STRATEGIES['self_consistency'](again, extract=_answer, samples=3)([PROMPT], SamplingParams())
  assert voted.text == 'b=2' and voted.spent == Spent(27, 9, 0)


def test_replay_refuses_what_it_does_not_hold():
  again = replay(_fake(['a', 'b'])([PROMPT], SamplingParams(samples=2)))
  with pytest.raises(ValueError, match="prompt 'p' has 2 completions in the pool, 3"):
    again([PROMPT], SamplingParams(samples=3))
  with pytest.raises(ValueError, match="prompt 'z' has 0 completions"):
    again([Prompt('z', 'question\n')], SamplingParams())
  with pytest.raises(ValueError, match='drawn for another text'):
    again([Prompt('p', 'question\n#### ')], SamplingParams())


@pytest.mark.parametrize('name', ['self_consistency', 'best_of_n'])
def test_no_samples_is_an_error(name):
  with pytest.raises(ValueError, match='samples=0'):
    STRATEGIES[name](_fake([]), **{**OPTIONS[name], 'samples': 0})
