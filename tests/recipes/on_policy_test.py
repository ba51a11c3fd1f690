"""Rollouts are a pure function of parameters, seed and step, and their cursor is what they were drawn from."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from srm_jax import schema
from srm_jax.data import tokenizer
from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import on_policy
from srm_jax.recipes.context import Context, DataConfig
from srm_jax.rewards import Graded
from srm_jax.types import Completion
from tests import tiny
from tests.tiny import tiny_tasks  # noqa: F401

MODEL = TransformerConfig(258, 1, 16, 2, 2, 8, 32, max_length=64)
CONTEXT = Context(MODEL, tokenizer.load('byte'), 1, 10)


def make(context=CONTEXT, *, advantage=None, rollouts=None, **options):
  config = schema.parse(on_policy.RolloutConfig, tiny.rollouts(**(rollouts or {})), 'rollouts')
  data = schema.parse(DataConfig, tiny.data(**options), 'data')
  return on_policy.source(config, data, context, advantage=advantage)


@pytest.fixture(scope='module')
def params():
  return {'model': jax.jit(transformer.init_params, static_argnums=0)(MODEL, jax.random.key(0))}


@pytest.fixture(scope='module')
def drawn(params):
  """Steps 0, 1 and 2 of one source."""
  source = make()
  return [source.next(params, step) for step in range(3)]


def test_a_step_is_drawn_again_from_its_number_alone(params, drawn):
  again = make().next(params, 2)
  jax.tree.map(np.testing.assert_array_equal, again, drawn[2])
  assert not np.array_equal(drawn[0].batch.inputs, drawn[1].batch.inputs)
  assert drawn[0].batch.inputs.shape == (8, 12) and drawn[0].advantages is None
  other_seed = make(CONTEXT._replace(seed=2)).next(params, 2)
  assert not np.array_equal(other_seed.batch.inputs, drawn[2].batch.inputs)


def test_samples_of_a_group_share_the_prompt_and_differ_after_it(drawn):
  for group in range(2):
    rows = drawn[0].batch.inputs[drawn[0].group == group]
    assert len({tuple(row[:4]) for row in rows}) == 1 and len({tuple(row) for row in rows}) == 4


@pytest.mark.parametrize('longest, length', [(3, 8), (8, 8), (9, 12), (12, 12), (13, 16), (16, 16), (17, 16)])
def test_rows_are_the_shortest_of_three_lengths(longest, length):
  row = lambda tokens: Graded(None, Completion(None, 0, '', (1,), (2,) * (tokens - 1), (), True), None)
  assert on_policy.row_length([[row(2)], [row(longest)]], 16) == length


def test_the_state_names_the_prompts():
  source = make()
  source.set_state(source.get_state())
  with pytest.raises(schema.ConfigError, match='the prompts changed since the checkpoint'):
    make(count=11).set_state(source.get_state())
  with pytest.raises(schema.ConfigError, match='the prompts changed'):
    make(CONTEXT._replace(seed=2)).set_state(source.get_state())


@pytest.mark.parametrize('context, rollouts, room', [
    (CONTEXT, dict(length=11), 11), (CONTEXT._replace(model=dataclasses.replace(MODEL, max_length=10)), dict(), 10),
])
def test_prompts_that_do_not_fit_are_refused_before_anything_is_sampled(context, rollouts, room):
  with pytest.raises(schema.ConfigError, match=f'has 4 tokens; with max_new_tokens=8 it does not fit in {room}'):
    make(context, rollouts=rollouts)
  assert make(rollouts=dict(length=12))


def test_metrics_count_what_can_be_scored():
  made = tiny.random_rollouts()
  found = on_policy.metrics(made)
  assert found['reward'].total == (made.rewards * made.valid).sum() and found['reward'].count == 7
  assert found['unscorable'].total == 1 and found['unscorable'].count == 8
  assert found['completion_tokens'].total == made.batch.loss_mask.sum()


@pytest.mark.parametrize('prompt, completion, length', [(3, 5, 8), (3, 6, 12), (6, 6, 12), (6, 7, 16), (1, 15, 16)])
def test_rows_are_no_longer_than_the_batch_needs(prompt, completion, length):
  short = SimpleNamespace(completion=SimpleNamespace(prompt_tokens=(0,), tokens=(0,)))
  longest = SimpleNamespace(completion=SimpleNamespace(prompt_tokens=(0,) * prompt, tokens=(0,) * completion))
  assert on_policy.row_length([[short, longest], [short, short]], 16) == length
