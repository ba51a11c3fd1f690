import gc
import json
import threading
import time

import jax
import numpy as np
import pytest

from srm_jax.data import packing, pipeline

EOS = 1
OPTIONS = {'batch_size': 4, 'length': 32, 'seed': 7}


def make_examples(count=50, *, seed=0):
  generator = np.random.default_rng(seed)
  return [
      packing.from_prompt_completion(f'e{i}', [2 + i], generator.integers(100, 200, generator.integers(1, 20)), EOS)
      for i in range(count)
  ]


def assert_equal(batch, other):
  for ours, theirs in zip(batch, other, strict=True):
    np.testing.assert_array_equal(ours, theirs)


def example_numbers(schedule, start_row, stop_row):
  """Examples in the rows [start, stop) of the endless stream, in order."""
  size = schedule.batch_size
  rows = [schedule.rows(step) for step in range(start_row // size, -(-stop_row // size))]
  flat = [row[row >= 0].tolist() for table in rows for row in table]
  return sum(flat[start_row % size : start_row % size + stop_row - start_row], [])


def test_resume_is_exact_across_epochs():
  examples = make_examples()
  source = pipeline.dataset_source(examples, **OPTIONS)
  whole = [source.next(None, step) for step in range(30)]
  first = pipeline.dataset_source(examples, **OPTIONS)
  for step in range(11):
    assert_equal(first.next(None, step), whole[step])
  state = json.loads(json.dumps(first.get_state()))
  assert state['step'] == 11
  second = pipeline.dataset_source(examples, **OPTIONS)
  second.set_state(state)
  assert second.get_state() == state
  for step in range(11, 30):
    assert_equal(second.next(None, step), whole[step])


def test_a_step_does_not_depend_on_the_order_of_calls_or_on_prefetch():
  examples = make_examples()
  sources = [pipeline.dataset_source(examples, **OPTIONS, prefetch=n) for n in (0, 1, 5)]
  for step in (3, 0, 1, 25, 24, 25):
    first, *others = [source.next(None, step) for source in sources]
    for other in others:
      assert_equal(first, other)
  assert sources[0].get_state()['step'] == 26


def test_every_epoch_holds_every_example_once_and_is_shuffled_anew():
  schedule = pipeline.Schedule(make_examples(), **{**OPTIONS, 'batch_size': 8})
  tables = [packing.plan(schedule.lengths, 32, seed=(7, epoch)) for epoch in range(3)]
  starts = np.cumsum([0] + [len(table) for table in tables])
  assert starts[1] % 8, 'the test wants a batch that spans two epochs'
  epochs = [example_numbers(schedule, a, b) for a, b in zip(starts[:-1], starts[1:], strict=True)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(50))
  assert epochs[0] != epochs[1] != epochs[2]


def test_batches_larger_than_the_data_set_wrap_several_times():
  schedule = pipeline.Schedule(make_examples(3), batch_size=8, length=32, seed=0, plan=packing.one_per_row)
  rows = np.concatenate([schedule.rows(step)[:, 0] for step in range(3)])
  for epoch in range(8):
    assert sorted(rows[3 * epoch : 3 * epoch + 3]) == [0, 1, 2]
  np.testing.assert_array_equal(schedule.rows(0)[:, 0], rows[:8])


def test_hosts_read_disjoint_slices_that_make_up_the_batch():
  examples = make_examples()
  whole = pipeline.dataset_source(examples, **OPTIONS)
  hosts = [pipeline.dataset_source(examples, **OPTIONS, process_index=i, process_count=2) for i in range(2)]
  for step in (0, 1, 9):
    parts = [host.next(None, step) for host in hosts]
    assert parts[0].inputs.shape == (2, 32)
    assert_equal(jax.tree.map(lambda *fields: np.concatenate(fields), *parts), whole.next(None, step))
  assert hosts[0].get_state() == hosts[1].get_state() == whole.get_state()
  with pytest.raises(ValueError, match='batch_size 4 does not divide over 3 hosts'):
    pipeline.dataset_source(examples, **OPTIONS, process_count=3)


def test_number_of_supervised_tokens():
  schedule = pipeline.Schedule(make_examples(), **OPTIONS)
  source = pipeline.scheduled_source(schedule)
  for step in range(12):
    assert schedule.num_supervised_tokens(step) == source.next(None, step).loss_mask.sum() > 0


@pytest.mark.parametrize('change, key', [
    ({'seed': 8}, 'seed'),
    ({'batch_size': 2}, 'batch_size'),
    ({'length': 40}, 'length'),
    ({'plan': packing.one_per_row}, 'plan'),
])  # fmt: skip
def test_a_state_of_other_settings_is_refused(change, key):
  state = pipeline.dataset_source(make_examples(), **OPTIONS).get_state()
  with pytest.raises(ValueError, match=f'state to resume from has {key} .*fix: resume with'):
    pipeline.dataset_source(make_examples(), **{**OPTIONS, **change}).set_state(state)


def test_a_state_of_other_data_is_refused():
  state = pipeline.dataset_source(make_examples(), **OPTIONS).get_state()
  same_tokens = make_examples()
  same_tokens[3].loss_mask[-1] = False
  renamed = [example._replace(id='other') for example in make_examples()]
  for examples in (make_examples(49), make_examples(seed=1), same_tokens, renamed):
    with pytest.raises(ValueError, match='has data_hash'):
      pipeline.dataset_source(examples, **OPTIONS).set_state(state)
  pipeline.dataset_source(make_examples(), **OPTIONS).set_state(state)


def test_bad_data_is_refused_before_the_first_step():
  with pytest.raises(ValueError, match='data set is empty'):
    pipeline.dataset_source([], **OPTIONS)
  wordy = packing.from_text('wordy', range(2, 60), EOS)
  with pytest.raises(ValueError, match="example id='wordy' has 59 tokens, context is 32"):
    pipeline.dataset_source([*make_examples(), wordy], **OPTIONS)


def test_a_batch_without_supervision_stops_every_host_and_the_next_call_recovers():
  silent = [packing.from_prompt_completion(f's{i}', [2, 3], [], None) for i in range(30)]
  data = [*silent, packing.from_text('loud', [4, 5], EOS)]
  options = {'batch_size': 2, 'length': 8, 'seed': 1, 'plan': packing.one_per_row}
  schedule = pipeline.Schedule(data, **options)
  counts = [schedule.num_supervised_tokens(step) for step in range(15)]
  good = next(step for step in range(14) if counts[step] and not counts[step + 1])
  ids = ', '.join(repr(data[i].id) for i in schedule.rows(good + 1)[:, 0])
  sources = [pipeline.dataset_source(data, **options, process_index=i, process_count=2) for i in range(2)]
  for source in sources:
    assert source.next(None, good).inputs.shape == (1, 8)
    for _ in range(2):
      with pytest.raises(ValueError, match=rf'no supervised token; its examples are \[{ids}\]'):
        source.next(None, good + 1)
  assert sum(source.next(None, good).loss_mask.sum() for source in sources) == 2


def test_prefetch_leaves_no_thread_behind():
  others = set(threading.enumerate())
  source = pipeline.dataset_source(make_examples(), **OPTIONS)
  source.next(None, 0)
  (worker,) = set(threading.enumerate()) - others
  del source
  gc.collect()
  worker.join(5)
  assert not worker.is_alive()


def test_next_is_cheap():
  """Target 2 ms for 64 x 256; the bound leaves room for a busy machine."""
  generator = np.random.default_rng(0)
  lengths = generator.integers(40, 120, 3000)
  examples = [packing.from_text(str(i), generator.integers(2, 99, n), EOS) for i, n in enumerate(lengths)]
  source = pipeline.dataset_source(examples, batch_size=64, length=256, seed=0, prefetch=0)
  source.next(None, 0)
  start = time.process_time()
  for step in range(1, 13):
    source.next(None, step)
  assert (time.process_time() - start) / 12 < 0.01
