import time

import numpy as np
import pytest

from srm_jax.data import packing

EOS = 1


def make_examples(count=60, *, seed=0, longest=30):
  """Every token id occurs once in the whole set, so a misplaced token is visible."""
  generator = np.random.default_rng(seed)
  examples, next_id = [], 2
  for number in range(count):
    prompt, completion = generator.integers(1, longest // 2, 2)
    ids = np.arange(next_id, next_id + prompt + completion)
    next_id += prompt + completion
    examples.append(packing.from_prompt_completion(f'e{number}', ids[:prompt], ids[prompt:], EOS))
  return examples


def unpack(batch):
  """[(tokens, mask)] of the segments, from the fields of the batch alone."""
  found = []
  for row in range(len(batch.inputs)):
    for segment in range(1, batch.segment_ids[row].max() + 1):
      where = np.flatnonzero(batch.segment_ids[row] == segment)
      found.append((batch.inputs[row, where], np.append(False, batch.loss_mask[row, where] > 0)[: len(where)]))
  return found


def test_prompt_completion_hand_values():
  example = packing.from_prompt_completion('a', [7, 8], [9, 10], EOS)
  np.testing.assert_array_equal(example.tokens, [7, 8, 9, 10, EOS])
  np.testing.assert_array_equal(example.loss_mask, [0, 0, 1, 1, 1])
  sampled = packing.from_prompt_completion('a', [7, 8], [9, 10, EOS], EOS)
  np.testing.assert_array_equal(sampled.tokens, example.tokens)
  cut = packing.from_prompt_completion('a', [7, 8], [9, 10], None)
  np.testing.assert_array_equal(cut.tokens, [7, 8, 9, 10])
  text = packing.from_text('t', [7, 8], EOS)
  np.testing.assert_array_equal(text.tokens, [7, 8, EOS])
  np.testing.assert_array_equal(text.loss_mask, [0, 1, 1])


def test_pack_hand_values():
  examples = [packing.from_prompt_completion('a', [7, 8], [9], EOS), packing.from_text('b', [4], EOS)]
  batch = packing.pack(examples, np.array([[0, 1]]), 8)
  np.testing.assert_array_equal(batch.inputs, [[7, 8, 9, EOS, 4, EOS, 0, 0]])
  np.testing.assert_array_equal(batch.targets, [[8, 9, EOS, 0, EOS, 0, 0, 0]])
  np.testing.assert_array_equal(batch.loss_mask, [[0, 1, 1, 0, 1, 0, 0, 0]])
  np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 3, 0, 1, 0, 0]])
  np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 1, 1, 2, 2, 0, 0]])
  assert [field.dtype for field in batch[:5]] == [np.int32, np.int32, np.float32, np.int32, np.int32]
  assert batch.sources is None
  mixed = packing.pack([example._replace(source=2 + i) for i, example in enumerate(examples)], np.array([[0, 1]]), 8)
  np.testing.assert_array_equal(mixed.sources, [[2, 2, 2, 2, 3, 3, 0, 0]])


def test_every_example_is_in_the_plan_once_and_rows_fit():
  lengths = np.random.default_rng(0).integers(1, 65, 2500)
  bins = packing.plan(lengths, 64, seed=(3, 1))
  np.testing.assert_array_equal(np.sort(bins[bins >= 0]), np.arange(len(lengths)))
  assert np.where(bins >= 0, lengths[bins], 0).sum(axis=1).max() <= 64


def test_plan_is_a_function_of_its_seed():
  lengths = np.random.default_rng(0).integers(1, 65, 300)
  np.testing.assert_array_equal(packing.plan(lengths, 64, seed=(5, 0)), packing.plan(lengths, 64, seed=(5, 0)))
  assert not np.array_equal(packing.plan(lengths, 64, seed=(5, 0)), packing.plan(lengths, 64, seed=(5, 1)))


def test_rows_are_not_ordered_by_length():
  lengths = np.arange(33, 129)
  bins = packing.plan(lengths, 128)
  longest = lengths[bins].max(axis=1)
  assert abs(np.corrcoef(longest, np.arange(len(bins)))[0, 1]) < 0.5


def test_permutation_is_the_same_on_every_numpy():
  np.testing.assert_array_equal(packing.permutation(8, 0, 1), [7, 4, 5, 1, 6, 2, 0, 3])


@pytest.mark.parametrize('low, high, capacity', [(40, 120, 256), (40, 120, 512), (8, 257, 256), (100, 900, 2048)])
def test_fill_and_speed(low, high, capacity):
  lengths = np.random.default_rng(1).integers(low, high, 50_000)
  start = time.process_time()
  bins = packing.plan(lengths, capacity)
  assert time.process_time() - start < 2
  assert lengths.sum() / (len(bins) * capacity) > 0.95


def test_examples_come_back_out_of_a_packed_batch():
  examples = make_examples()
  bins = packing.plan([len(example.tokens) for example in examples], 48, seed=(2,))
  batch = packing.pack(examples, bins, 48)
  assert batch.segment_ids.max() > 1
  found = sorted(unpack(batch), key=lambda pair: pair[0][0])
  for example, (tokens, mask) in zip(examples, found, strict=True):
    np.testing.assert_array_equal(tokens, example.tokens)
    np.testing.assert_array_equal(mask, example.loss_mask)


def test_every_supervised_token_is_a_target_exactly_once():
  examples = make_examples()
  batch = packing.pack(examples, packing.plan([len(example.tokens) for example in examples], 48), 48)
  targets = np.sort(batch.targets[batch.loss_mask > 0])
  expected = np.sort(np.concatenate([example.tokens[example.loss_mask] for example in examples]))
  np.testing.assert_array_equal(targets, expected)
  assert (targets == EOS).sum() == len(examples)


def test_no_target_crosses_a_segment_and_positions_restart():
  examples = make_examples()
  batch = packing.pack(examples, packing.plan([len(example.tokens) for example in examples], 48), 48)
  supervised = batch.loss_mask[:, :-1] > 0
  np.testing.assert_array_equal(batch.segment_ids[:, :-1][supervised], batch.segment_ids[:, 1:][supervised])
  np.testing.assert_array_equal(batch.targets[:, :-1][supervised], batch.inputs[:, 1:][supervised])
  assert not batch.loss_mask[:, -1].any() and not batch.loss_mask[batch.segment_ids == 0].any()
  new = np.diff(batch.segment_ids, axis=1, prepend=0) != 0
  assert not batch.positions[new].any()
  same = ~new[:, 1:] & (batch.segment_ids[:, 1:] > 0)
  assert (np.diff(batch.positions, axis=1)[same] == 1).all()


def test_the_first_token_of_a_segment_is_never_a_target():
  greedy = [packing.Example(name, np.array([5, 6], np.int32), np.ones(2, bool)) for name in 'ab']
  np.testing.assert_array_equal(packing.pack(greedy, np.array([[0, 1]]), 5).loss_mask, [[1, 0, 1, 0, 0]])


def test_end_of_text_may_be_the_padding_token():
  """Ids of every kind equal: masks can then only come from lengths."""
  example = packing.from_prompt_completion('a', [0, 0], [0, 5], 0)
  batch = packing.pad_batch([example, packing.from_text('b', [0], 0)], 6)
  np.testing.assert_array_equal(batch.loss_mask, [[0, 1, 1, 1, 0, 0], [0] * 6])
  np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]])
  batch, _ = packing.completions_batch([[0, 0]], [[0, 5, 0]], length=6, pad_id=0)
  np.testing.assert_array_equal(batch.loss_mask, [[0, 1, 1, 1, 0, 0]])


def test_one_per_row():
  bins = packing.one_per_row([3, 2, 5], 5)
  assert bins.shape == (3, 1) and sorted(bins[:, 0]) == [0, 1, 2]


def test_completions_batch_hand_values():
  batch, aligned = packing.completions_batch([[5], [6, 7, 8], [9, 9]], [[3, EOS], [], [2]], length=5, pad_id=4)
  np.testing.assert_array_equal(batch.inputs, [[5, 3, EOS, 4, 4], [6, 7, 8, 4, 4], [9, 9, 2, 4, 4]])
  np.testing.assert_array_equal(batch.loss_mask, [[1, 1, 0, 0, 0], [0] * 5, [0, 1, 0, 0, 0]])
  np.testing.assert_array_equal(batch.targets[batch.loss_mask > 0], [3, EOS, 2])
  assert (batch.targets[batch.segment_ids == 0] == 4).all()
  np.testing.assert_array_equal(aligned([[-1.0, -2.0], [], [-3.0]]), [[-1, -2, 0, 0, 0], [0] * 5, [0, -3, 0, 0, 0]])
  with pytest.raises(ValueError, match='must agree'):
    aligned([[-1.0], [], [-3.0]])


def test_completions_may_all_begin_at_one_slot():
  """Prompts of one to three tokens: what is before them is padding, and everything else moves with them."""
  given = [[5], [6, 7, 8], [9, 9]], [[3, EOS], [], [2]]
  batch, aligned = packing.completions_batch(*given, length=6, pad_id=4, prompt_width=3)
  np.testing.assert_array_equal(batch.inputs, [[4, 4, 5, 3, EOS, 4], [6, 7, 8, 4, 4, 4], [4, 9, 9, 2, 4, 4]])
  np.testing.assert_array_equal(batch.segment_ids, [[0, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]])
  np.testing.assert_array_equal(batch.positions, [[0, 0, 0, 1, 2, 0], [0, 1, 2, 0, 0, 0], [0, 0, 1, 2, 0, 0]])
  np.testing.assert_array_equal(batch.loss_mask, [[0, 0, 1, 1, 0, 0], [0] * 6, [0, 0, 1, 0, 0, 0]])
  np.testing.assert_array_equal(batch.targets[batch.loss_mask > 0], [3, EOS, 2])
  values = aligned([[-1.0, -2.0], [], [-3.0]])
  np.testing.assert_array_equal(values, [[0, 0, -1, -2, 0, 0], [0] * 6, [0, 0, -3, 0, 0, 0]])
  with pytest.raises(ValueError, match='row 1: -1 of 3 slots of padding were to stand before the prompt'):
    packing.completions_batch(*given, length=6, prompt_width=2)
  with pytest.raises(ValueError, match='row 0: 3 of 2 slots'):
    packing.completions_batch(*given, length=5, prompt_width=4)


def test_completions_batch_is_the_padded_batch_of_the_same_examples():
  """Rollouts and data sets score the same tokens at the same positions."""
  examples = [
      packing.from_prompt_completion('a', [5, 6], [7, 8], EOS),
      packing.from_prompt_completion('b', [9], [], EOS),
  ]
  rollout, _ = packing.completions_batch([[5, 6], [9]], [[7, 8, EOS], [EOS]], length=7, pad_id=0)
  for ours, theirs in zip(rollout, packing.pad_batch(examples, 7), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_errors_name_the_example_and_the_fix():
  long = [packing.from_text('ok', [3], EOS), packing.from_text('wordy', range(2, 9), EOS)]
  for refused in (lambda: packing.pad_batch(long, 6), lambda: packing.pack(long, np.array([[0], [1]]), 6)):
    with pytest.raises(ValueError, match="example id='wordy' has 8 tokens, context is 6; fix: .*drop the 1 example"):
      refused()
  with pytest.raises(ValueError, match="example id='1' has 9 tokens, context is 8"):
    packing.plan([8, 9], 8)
  with pytest.raises(ValueError, match='row 0 of the bins holds 10 tokens, context is 9'):
    packing.pack(long, np.array([[0, 1]]), 9)
  with pytest.raises(ValueError, match='data set is empty'):
    packing.plan([], 8)
  with pytest.raises(ValueError, match='data set is empty'):
    packing.pad_batch([], 8)
  with pytest.raises(ValueError, match="id='q' has an empty prompt"):
    packing.from_prompt_completion('q', [], [3], EOS)


def test_a_batch_without_supervision_is_refused():
  silent = [packing.from_prompt_completion(name, [3, 4], [], None) for name in 'ab']
  with pytest.raises(ValueError, match=r"no supervised token; its examples are \['a', 'b'\]"):
    packing.pack(silent, np.array([[0, 1]]), 8)
  first_only = [packing.Example('c', np.array([3, 4]), np.array([True, False]))]
  with pytest.raises(ValueError, match=r"\['c'\]"):
    packing.pad_batch(first_only, 4)
  with pytest.raises(ValueError, match='no supervised token'):
    packing.completions_batch([[3]], [[]], length=4)
