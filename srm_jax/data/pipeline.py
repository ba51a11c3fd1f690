"""Data sets as sources: the batch of a step is a pure function of (data, seed, step), so the cursor is one integer.

Each epoch permutes the examples and packs them anew into a table of rows; the tables of all epochs, end to end, are one
stream, and step s takes rows [s B, (s + 1) B) of it. A batch may therefore begin in one epoch and end in the next, and
nothing is dropped. Every host computes the same tables from lengths alone and lays out its own rows.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from srm_jax import types
from srm_jax.data import packing, records

KEPT_EPOCHS = 4  # tables in memory: prefetch and a caller may read around two epoch borders


class Schedule:
  """Which examples form the rows of a step, on every host alike."""

  def __init__(self, examples: Sequence[packing.Example], *, batch_size, length, seed, plan=packing.plan):
    """See `dataset_source`."""
    self.examples = examples
    self.batch_size = batch_size
    self.length = length
    self.seed = seed
    self.plan = plan
    self.lengths = np.array([len(example.tokens) for example in examples], np.int64)
    packing.require_fit(self.lengths, length, ids=[example.id for example in examples])
    self.supervised = np.array([np.count_nonzero(example.loss_mask[1:]) for example in examples], np.int64)
    self.data_hash = records.content_hash([
        [example.id for example in examples],
        self.lengths,
        np.concatenate([example.tokens for example in examples]),
        np.concatenate([example.loss_mask for example in examples]),
    ])
    self._first_rows = [0]  # of every epoch planned so far, and of the one after
    self._tables = {}
    self._lock = threading.Lock()

  def rows(self, step):
    """int32 [batch_size, slots]: example indices of the rows of a step, -1 where a row has fewer."""
    start, stop = step * self.batch_size, (step + 1) * self.batch_size
    with self._lock:
      self._extend_to(stop)
      first = int(np.searchsorted(self._first_rows, start, side='right')) - 1
      last = int(np.searchsorted(self._first_rows, stop, side='left'))
      parts = [
          self._table(epoch)[max(start - self._first_rows[epoch], 0) : stop - self._first_rows[epoch]]
          for epoch in range(first, last)
      ]
    slots = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(p, ((0, 0), (0, slots - p.shape[1])), constant_values=-1) for p in parts])

  def num_supervised_tokens(self, step):
    """Targets with loss in the global batch of a step."""
    rows = self.rows(step)
    return int(self.supervised[rows[rows >= 0]].sum())

  def _extend_to(self, stop):
    while self._first_rows[-1] < stop:
      epoch = len(self._first_rows) - 1
      self._first_rows.append(self._first_rows[-1] + len(self._table(epoch)))

  def _table(self, epoch):
    if epoch not in self._tables:
      self._tables[epoch] = self.plan(self.lengths, self.length, seed=(self.seed, epoch))
      if len(self._tables) > KEPT_EPOCHS:
        del self._tables[next(iter(self._tables))]
    return self._tables[epoch]


class _HostBatches:
  """step -> this host's part of the batch; the random-access form that grain reads."""

  def __init__(self, schedule, assemble, process_index, process_count):
    self.schedule = schedule
    self.assemble = assemble
    self.share = schedule.batch_size // process_count
    self.start = process_index * self.share

  def __len__(self):
    return sys.maxsize

  def __getitem__(self, step):
    rows = self.schedule.rows(step)
    packing.require_supervised(self.schedule.examples, rows)  # on global rows: all hosts stop together
    return self.assemble(rows[self.start : self.start + self.share])


def dataset_source(
    examples: Sequence[packing.Example],
    *,
    batch_size,
    length,
    seed,
    plan: Callable[..., np.ndarray] = packing.plan,
    prefetch=2,
    process_index=0,
    process_count=1,
) -> types.Source:
  """Endless batches of examples, resumable exactly.

  Args:
    examples: all of them, the same on every host.
    batch_size: rows of the global batch.
    length: positions of a row.
    seed: of the permutations.
    plan: (lengths, length, *, seed) -> bin table; `packing.plan`, or `packing.one_per_row` to leave examples unpacked.
    prefetch: batches made ahead by one background thread, which ends with the source; 0 makes them in the call.
    process_index, process_count: which of the equal slices of the rows `next` returns.

  Returns:
    Source; next(params, step) -> numpy Batch [batch_size / process_count, length] for any step, fastest in order. Its
    state does not depend on the number of hosts.

  Raises:
    ValueError: no example, one longer than a row, a batch without supervised token, a state of other data or settings.
  """
  schedule = Schedule(examples, batch_size=batch_size, length=length, seed=seed, plan=plan)
  return scheduled_source(schedule, prefetch=prefetch, process_index=process_index, process_count=process_count)


def scheduled_source(
    schedule: Schedule, *, assemble: Callable[[np.ndarray], Any] | None = None, prefetch=2, process_index=0,
    process_count=1,
) -> types.Source:
  """`dataset_source` over a schedule that the caller keeps, for instance to count supervised tokens.

  assemble: this host's part of the bin table -> what `next` returns, a record of arrays with these rows in front; None
  for their Batch. It is called by the prefetching thread.
  """
  size = schedule.batch_size
  if size % process_count:
    raise ValueError(f'batch_size {size} does not divide over {process_count} hosts; choose a multiple of it')
  if assemble is None:
    def assemble(rows):
      return packing.lay_out(schedule.examples, rows, schedule.length)
  batches = _HostBatches(schedule, assemble, process_index, process_count)
  options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
  iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
  identity = {
      'data_hash': schedule.data_hash,
      'seed': schedule.seed,
      'batch_size': schedule.batch_size,
      'length': schedule.length,
      'plan': schedule.plan.__name__,
  }
  cursor = {'step': 0, 'prefetched': 0}

  def next_batch(params, step):
    del params
    if cursor['prefetched'] != step:
      iterator.set_state({'next_index': step})
    cursor['prefetched'] = None  # an error below leaves grain's own count behind its buffer
    batch = next(iterator)
    cursor.update(step=step + 1, prefetched=step + 1)
    return batch

  def get_state():
    return {'step': cursor['step'], **identity}

  def set_state(state):
    check_identity(state, identity)
    cursor.update(step=state['step'])

  return types.Source(next_batch, get_state, set_state)


def check_identity(state, identity):
  """Raises ValueError where the state that a source is to resume from belongs to other data or settings."""
  for key, value in identity.items():
    if state.get(key) != value:
      raise ValueError(
          f'the state to resume from has {key} {state.get(key)!r}, this data set has {value!r}; '
          'fix: resume with the data and settings of that run, or start a new workdir'
      )
