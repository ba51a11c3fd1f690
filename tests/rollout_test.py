"""Completions become rows: every sampled token once, with its log-probability and its row's advantage."""

import collections

import jax
import numpy as np
import pytest

from srm_jax.data import prompting, tokenizer
from srm_jax.losses.advantages import ADVANTAGES
from srm_jax.rewards import Graded, Grading, grade
from srm_jax.rollout import all_sampled, beside, from_data, rollout, subsample, to_rollouts
from srm_jax.types import Completion, Prompt, SamplingParams
from tests import tiny
from tests.tiny import SUMS


def completion(problem, sample, text, *, tokens=(1,), prompt_tokens=(5, 6), finished=True):
  logprobs = tuple(-0.1 * (i + 1) - sample for i in range(len(tokens)))
  prompt = Prompt(problem.id, SUMS.prompt(problem))
  return Completion(prompt, sample, text, tuple(prompt_tokens), tuple(tokens), logprobs, finished)


@pytest.fixture(scope='module')
def groups():
  """Two problems of two completions; the last one of the first group cannot be scored."""
  first, second = SUMS.problems('train', count=2)
  one = lambda problem, sample, tokens, reward, prompt: Graded(
      problem, completion(problem, sample, '', tokens=tokens, prompt_tokens=prompt), reward
  )
  return [
      [one(first, 0, (11, 12, 13), 1.0, (1, 2)), one(first, 1, (14,), None, (1, 2))],
      [one(second, 0, (15, 16), 1.0, (3, 4, 5)), one(second, 1, (17, 18), 0.0, (3, 4, 5))],
  ]


def test_every_sampled_token_is_scored_once_where_it_is_predicted(groups):
  made = to_rollouts(groups, length=8, pad_id=0)
  rows = [one.completion for group in groups for one in group]
  assert made.advantages is None
  for i, row in enumerate(rows):
    scored = np.flatnonzero(made.batch.loss_mask[i])
    np.testing.assert_array_equal(scored, len(row.prompt_tokens) - 1 + np.arange(len(row.tokens)))
    np.testing.assert_array_equal(made.batch.targets[i, scored], row.tokens)
    np.testing.assert_allclose(made.sampler_logprobs[i, scored], row.logprobs, rtol=1e-6)
    np.testing.assert_array_equal(made.batch.inputs[i, : len(row.prompt_tokens)], row.prompt_tokens)
    np.testing.assert_array_equal(made.batch.inputs[i, scored[1:]], row.tokens[:-1])
  assert not made.sampler_logprobs[made.batch.loss_mask == 0].any()


def test_rewards_groups_and_validity(groups):
  made = to_rollouts(groups, length=8, pad_id=0)
  np.testing.assert_array_equal(made.rewards, [1, 0, 1, 0])
  np.testing.assert_array_equal(made.valid, [1, 0, 1, 1])
  np.testing.assert_array_equal(made.group, [0, 0, 1, 1])


@pytest.mark.parametrize('name', ADVANTAGES)
def test_advantages_lie_on_sampled_tokens_alone(groups, name):
  made = to_rollouts(groups, length=8, pad_id=0, advantage=ADVANTAGES[name])
  assert not made.advantages[made.batch.loss_mask == 0].any()
  assert not made.advantages[:2].any()  # one member that can be scored: nothing to compare it with
  for row, sign in ((2, 1), (3, -1)):
    on_tokens = made.advantages[row][made.batch.loss_mask[row] > 0]
    assert len(set(on_tokens)) == 1 and np.sign(on_tokens[0]) == sign


def test_a_row_that_does_not_fit_is_refused(groups):
  with pytest.raises(ValueError, match='context is 4'):
    to_rollouts(groups, length=4, pad_id=0)


def test_rollout_keeps_the_order_of_the_problems():
  problems = SUMS.problems('train', count=3)

  def generate(prompts, sampling):
    by_id = {problem.id: problem for problem in problems}
    return [
        [completion(by_id[prompt.id], i, f'#### {eval(prompt.text)}') for i in range(sampling.samples)]
        for prompt in prompts
    ]

  asked = prompting.plain(SUMS, tokenizer.load('byte'))
  groups = rollout(generate, asked, problems, SamplingParams(samples=2))
  assert [[one.problem.id for one in group] for group in groups] == [[problem.id] * 2 for problem in problems]
  assert all(one.reward == 1.0 for group in groups for one in group)
  doubled = Grading(grade, lambda group: [one._replace(reward=2 * one.reward) for one in group])
  judged = rollout(generate, asked, problems, SamplingParams(samples=2), grading=doubled)
  assert [[one.reward for one in group] for group in judged] == [[2.0, 2.0]] * 3


def test_subsample_covers_every_problem_once_an_epoch_and_is_a_pure_function():
  problems = SUMS.problems('train', count=10)
  draws = [subsample(problems, 4, seed=3, step=step) for step in range(10)]
  ids = [problem.id for draw in draws for problem in draw]
  for epoch in range(4):
    assert sorted(ids[10 * epoch : 10 * (epoch + 1)]) == sorted(problem.id for problem in problems)
  assert ids[:10] != ids[10:20]
  assert subsample(problems, 4, seed=3, step=7) == draws[7]
  assert [subsample(problems, 4, seed=4, step=step) for step in range(10)] != draws
  assert collections.Counter(ids).most_common()[0][1] == 4


# Rows that the student did not sample.


def kinds(rollouts):
  """The structure of a batch, and the types of its fields."""
  return jax.tree.structure(rollouts), [leaf.dtype for leaf in jax.tree.leaves(rollouts)]


def test_data_are_rollouts_that_nobody_sampled(groups):
  batch = tiny.random_batch()
  made = from_data(batch)
  assert made.batch is batch
  assert not any(np.any(field) for field in (made.sampled, made.rewards, made.valid, made.advantages))
  assert not made.sampler_logprobs.any() and np.all(made.group == -1)
  for advantage in (None, ADVANTAGES['centered']):  # one program and one set of metrics for both kinds of step
    sampled = all_sampled(to_rollouts(groups, length=16, pad_id=0, advantage=advantage))
    assert kinds(sampled) == kinds(made)
    assert np.all(sampled.sampled == 1) and np.any(sampled.advantages) == (advantage is not None)


def order_of(sampled_rows, data_rows):
  both = beside(tiny.random_rollouts(rows=sampled_rows), tiny.random_batch(5, rows=data_rows))
  return ''.join('ds'[int(one)] for one in both.sampled)


def test_rows_of_both_kinds_take_turns():
  assert (order_of(4, 4), order_of(6, 2), order_of(2, 6)) == ('sdsdsdsd', 'ssdsssds', 'dsdddsdd')
  for sampled_rows in range(1, 7):
    for data_rows in range(1, 7):  # every device holds a block of rows, and in it nearly its share of both
      order = order_of(sampled_rows, data_rows)
      share = sampled_rows / len(order)
      assert all(abs(order[:n].count('s') - share * n) <= 1 for n in range(len(order) + 1)), order


def test_parts_of_a_mix_are_of_no_concern_beside_samples():
  batch = tiny.random_batch(5, rows=4)
  mixed = batch._replace(sources=np.ones_like(batch.inputs))
  found, expected = (jax.tree.leaves(beside(tiny.random_rollouts(rows=4), one)) for one in (mixed, batch))
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_rows_stay_what_they_were_beside_others():
  """Whichever part is longer; what is added behind a row is padding."""
  for sampled_length, data_length in ((16, 12), (12, 16)):
    rollouts = tiny.random_rollouts(rows=6, length=sampled_length)
    batch = tiny.random_batch(5, rows=3, length=data_length)
    both = beside(rollouts, batch)
    assert both.batch.inputs.shape == (9, 16)
    for part, rows in ((all_sampled(rollouts), both.sampled == 1), (from_data(batch), both.sampled == 0)):
      length = part.batch.inputs.shape[1]
      for whole, own in zip(jax.tree.leaves(both), jax.tree.leaves(part), strict=True):
        kept, added = (whole[rows], np.zeros(0)) if own.ndim == 1 else (whole[rows, :length], whole[rows, length:])
        np.testing.assert_array_equal(kept, own)
        assert whole.dtype == own.dtype and not added.any()
