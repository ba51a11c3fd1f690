"""What the prompting strategies ask and answer."""

import pytest

from srm_jax.inference.strategies import STRATEGIES
from srm_jax.types import Prompt, SamplingParams, Spent
from tests.inference.strategies.fakes import PROMPT, fake


def test_direct_asks_with_the_cue_andanswers_with_it():
  calls = []
  (completion,), = STRATEGIES['direct'](fake(['42'], calls), cue='#### ')([PROMPT], SamplingParams())
  assert calls[0][0] == [Prompt('p', 'question\n#### ')]
  assert (completion.text, completion.tokens) == ('#### 42', tuple(map(ord, '42')))
  assert completion.spent == Spent(len('question\n#### '), 2, 0)


@pytest.mark.parametrize('temperature, used', [(None, 0.7), (0.0, 0.0), (1.0, 1.0)])
def test_chain_of_thought_temperature(temperature, used):
  calls = []
  STRATEGIES['chain_of_thought'](fake(['x'], calls), temperature=temperature)([PROMPT], SamplingParams(temperature=0.7))
  assert calls[0][1].temperature == used
