"""Which completions meet, what stands in the rows, and that a batch is a function of data, seed and step."""

import json

import jax
import numpy as np
import pytest

from srm_jax.data import packing, pairs
from srm_jax.types import Rollouts
from tests.data import graded
from tests.tiny import random_rollouts

EOS = 1


def of(found, table):
  """[(problem, grade) of both] of every pair."""
  return [tuple((found[i].problem.id, found[i].correct) for i in pair) for pair in table]


def test_pairs_of_a_problem_are_a_right_and_a_wrong_completion_of_it():
  found = graded.annotations((2, 3), (0, 4), (3, 0), (1, 1))
  everything = pairs.by_problem(found, per_problem=100, seed=0)
  assert len(everything) == 2 * 3 + 1 and len({tuple(pair) for pair in everything}) == 7
  for (problem, good), (same, bad) in of(found, everything):
    assert problem == same and good and not bad
  few = pairs.by_problem(found, per_problem=2, seed=0)
  assert len(few) == 3 and {tuple(pair) for pair in few} < {tuple(pair) for pair in everything}
  draws = [pairs.by_problem(found, per_problem=2, seed=seed).tolist() for seed in (0, *range(6))]
  assert draws[0] == draws[1] and len({str(draw) for draw in draws}) > 2


def test_what_has_no_grade_or_is_there_already_makes_no_pair():
  found = graded.annotations((1, 1))
  problem = found[0].problem
  found += [graded.annotation(problem, 7, found[1].completion, False), graded.annotation(problem, 8, 'x', None)]
  for draw in (pairs.by_problem, pairs.across_problems):
    assert draw(found, per_problem=9, seed=0).tolist() == [[0, 1]]
  assert pairs.by_problem(graded.annotations((2, 0), (0, 2)), per_problem=9, seed=0).shape == (0, 2)
  assert pairs.across_problems(graded.annotations((2, 0), (1, 0)), per_problem=9, seed=0).shape == (0, 2)


def test_across_problems_every_completion_is_used():
  found = graded.annotations((5, 0), (0, 2), (1, 1))
  table = pairs.across_problems(found, per_problem=4, seed=0)
  assert table.shape == (5, 2) and all(found[i].correct and not found[j].correct for i, j in table)
  assert len(set(table[:, 0])) == 5  # four of the first problem, and the one of the last
  counts = np.unique(table[:, 1], return_counts=True)[1]
  assert len(counts) == 3 and counts.max() - counts.min() <= 1  # three wrong ones stand against five right ones
  assert any(first != second for (first, _), (second, _) in of(found, table))


def examples(count=10):
  """Example i has prompt i + 2 (i % 3 + 1 times) and completion i + 100 (i % 4 + 1 times)."""
  return [
      packing.from_prompt_completion(f'e{i}', [i + 2] * (i % 3 + 1), [i + 100] * (i % 4 + 1), EOS) for i in range(count)
  ]


TABLE = np.array([[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]])


def source(**options):
  return pairs.dataset_source(examples(), TABLE, **{'size': 2, 'length': 12, 'seed': 3, **options})


def test_rows_are_chosen_and_rejected_in_turn():
  seen = []
  for step in range(5):
    made = source().next(None, step)
    assert made.batch.inputs.shape == (4, 12) and made.mismatched is None and np.all(made.weights == 1)
    first = made.batch.inputs[:, 0] - 2
    seen += first.reshape(-1, 2).tolist()
    for row, number in enumerate(first):
      wanted = examples()[number].tokens
      np.testing.assert_array_equal(made.batch.inputs[row, : len(wanted)], wanted)
      assert made.batch.loss_mask[row].sum() == number % 4 + 2  # the completion and its end
  assert sorted(seen[:5]) == sorted(seen[5:]) == TABLE.tolist() and seen[:5] != seen[5:]  # two epochs, shuffled anew


def assert_equal(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize('mismatched', [False, True])
def test_a_source_continues_where_it_stopped(mismatched):
  whole = [source(mismatched=mismatched).next(None, step) for step in range(7)]
  first = source(mismatched=mismatched)
  for step in range(4):
    assert_equal(first.next(None, step), whole[step])
  second = source(mismatched=mismatched)
  second.set_state(json.loads(json.dumps(first.get_state())))
  for step in range(4, 7):
    assert_equal(second.next(None, step), whole[step])


@pytest.mark.parametrize('change', [dict(seed=4), dict(size=1), dict(length=13), dict(mismatched=True)])
def test_the_state_is_of_one_setting(change):
  with pytest.raises(ValueError, match='the state to resume from has'):
    source(**change).set_state(source().get_state())


def test_the_state_is_of_these_pairs():
  other = pairs.dataset_source(examples(), TABLE[:, ::-1], size=2, length=12, seed=3)
  with pytest.raises(ValueError, match='the state to resume from has data_hash'):
    other.set_state(source().get_state())


@pytest.mark.parametrize('mismatched', [False, True])
def test_every_host_reads_its_own_pairs(mismatched):
  whole = source(mismatched=mismatched).next(None, 1)
  parts = [source(mismatched=mismatched, process_index=host, process_count=2).next(None, 1) for host in range(2)]
  assert_equal(jax.tree.map(lambda *rows: np.concatenate(rows), *parts), whole)


def test_a_completion_longer_than_a_row_is_named():
  with pytest.raises(ValueError, match="example id='e2' has 7 tokens, context is 5"):
    source(length=5)


def content(batch, row):
  """(prompt, completion) of a row, as the numbers of their examples, and the tokens with loss."""
  tokens = batch.inputs[row, : np.count_nonzero(batch.segment_ids[row])]
  numbers = [int(token) - (100 if token >= 100 else 2) for token in tokens if token != EOS]
  return numbers[0], numbers[-1], int(batch.loss_mask[row].sum())


def test_mismatched_rows_hold_a_prompt_and_the_completion_of_the_pair_before():
  """All of it with loss, the end too; rows that would be longer are cut."""
  made = [source(mismatched=True).next(None, step) for step in range(2)]
  rows = [content(one.batch, row) for one in made for row in range(4)]
  others = [content(one.mismatched, row) for one in made for row in range(4)]
  for row in range(2, 8):
    assert others[row] == (rows[row][0], rows[row - 2][1], rows[row - 2][2])
  assert all(prompt != completion for prompt, completion, _ in others)
  batch = packing.pad_batch(examples()[2:4], 7)  # prompts of 3 and 1 tokens, completions of 4 and 5 with their ends
  cut = pairs.mismatch(batch, packing.pad_batch(examples()[3:1:-1], 7))
  np.testing.assert_array_equal(cut.inputs, [[4, 4, 4, 103, 103, 103, 103], [5, 102, 102, 102, EOS, 0, 0]])
  np.testing.assert_array_equal(cut.loss_mask, [[0, 0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0]])
  np.testing.assert_array_equal(cut.targets[0, 2:6], [103] * 4)
  np.testing.assert_array_equal(cut.targets[1, :4], [102, 102, 102, EOS])



def rollouts(rewards, valid) -> Rollouts:
  made = random_rollouts(rows=len(rewards) + 1)  # the last row is padding
  made = jax.tree.map(lambda x: x[:-1], made)
  return made._replace(rewards=np.array(rewards, np.float32), valid=np.array(valid, np.float32))


def test_the_best_and_the_worst_of_a_group_are_its_pair():
  drawn = rollouts([0, 1, 0.5, 2, 9, 2, 3, 3, 3, 0, 0, 0], [1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0])
  made = pairs.of_rollouts(drawn, samples=3)
  rows = [1, 0]  # 1 against 0
  np.testing.assert_array_equal(made.batch.inputs[:2], drawn.batch.inputs[rows])
  np.testing.assert_array_equal(made.batch.loss_mask[:2], drawn.batch.loss_mask[rows])
  # 9 cannot be scored and the rest of its group is alike; all alike; none that can be scored.
  np.testing.assert_array_equal(made.weights, [1, 1, 0, 0, 0, 0, 0, 0])
  np.testing.assert_array_equal(made.rewards, [0.5, 0.5, 2, 2, 3, 3, 0, 0])
  assert np.all(made.sampled == 1.5) and made.batch.inputs.shape == (8, 16) and made.mismatched is None


def test_groups_lend_each_other_their_completions():
  drawn = rollouts([0, 1, 1, 0, 1, 0], np.ones(6))
  made = pairs.of_rollouts(drawn, samples=2, mismatched=True)
  expected = pairs.mismatch(made.batch, jax.tree.map(lambda x: np.roll(x, 2, axis=0), made.batch))
  assert_equal(made.mismatched, expected)
  np.testing.assert_array_equal(made.mismatched.inputs[:, 0], made.batch.inputs[:, 0])
  for row in range(6):
    mask, donor = made.mismatched.loss_mask[row] > 0, made.batch.loss_mask[row - 2] > 0
    count = int(mask.sum())
    assert count and count <= donor.sum()
    np.testing.assert_array_equal(
        made.mismatched.targets[row, mask], made.batch.targets[row - 2, donor][:count]
    )
