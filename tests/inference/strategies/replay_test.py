"""A pool of completions served again."""

import pytest

from srm_jax.inference.strategies import STRATEGIES, replay
from srm_jax.types import Prompt, SamplingParams, Spent
from tests.inference.strategies.fakes import PROMPT, answer, fake


def test_replay_serves_the_pool():
  pool = fake(['a=1', 'b=2', 'c=2'])([PROMPT], SamplingParams(samples=3))
  again = replay(pool)
  assert again([PROMPT], SamplingParams(samples=2)) == [pool[0][:2]]
  (voted,), = STRATEGIES['self_consistency'](again, extract=answer, samples=3)([PROMPT], SamplingParams())
  assert voted.text == 'b=2' and voted.spent == Spent(27, 9, 0)


def test_replay_refuses_what_it_does_not_hold():
  again = replay(fake(['a', 'b'])([PROMPT], SamplingParams(samples=2)))
  with pytest.raises(ValueError, match="prompt 'p' has 2 completions in the pool, 3"):
    again([PROMPT], SamplingParams(samples=3))
  with pytest.raises(ValueError, match="prompt 'z' has 0 completions"):
    again([Prompt('z', 'question\n')], SamplingParams())
  with pytest.raises(ValueError, match='drawn for another text'):
    again([Prompt('p', 'question\n#### ')], SamplingParams())
