"""Several data sets in one stream: drawn beforehand in exact shares, or row by row in shares that change over a run.

The shares of a run may follow its step (a curriculum) or the student (domains where it lags behind its teacher).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from srm_jax import types
from srm_jax.data import packing, records
from srm_jax.data.pipeline import Schedule, check_identity

# (params, step, the last shares) -> non-negative shares of the parts, in their order; alike on every host.
Shares = Callable[[Any, int, Sequence[float]], Sequence[float]]


def mixture(
    parts: Mapping[str, Sequence[packing.Example]], ratios: Mapping[str, float], *, size, seed
) -> list[packing.Example]:
  """A data set of `size` examples with exact shares; `Schedule` permutes it each epoch.

  Counts are size * ratio / sum of ratios, rounded by largest remainder. A part larger than its count is sampled without
  replacement; of a smaller one no example occurs more than once oftener than another. The `source` of an example is the
  place of its part among the sorted names.

  Args:
    parts: name -> examples.
    ratios: name -> non-negative weight, for the same names.

  Raises:
    ValueError: names differ, a weight is negative, or a part with a positive weight is empty.
  """
  if parts.keys() != ratios.keys():
    raise ValueError(f'ratios name {sorted(ratios)}, parts are {sorted(parts)}; name each part once')
  names = sorted(parts)
  weights = np.array([ratios[name] for name in names], np.float64)
  if weights.min() < 0 or weights.sum() == 0:
    raise ValueError(f'ratios {dict(ratios)} must be non-negative, and one positive')
  counts, mixed = rounded(size * weights / weights.sum()), []
  for number, (name, count) in enumerate(zip(names, counts.tolist(), strict=True)):
    if count and not len(parts[name]):
      raise ValueError(f"part '{name}' is empty but has ratio {ratios[name]}; drop it or fill it")
    for epoch in range(-(-count // max(len(parts[name]), 1))):
      order = packing.permutation(len(parts[name]), seed, number, epoch)
      mixed += [parts[name][i]._replace(source=number) for i in order[: count - epoch * len(parts[name])]]
  return mixed


def rounded(exact) -> np.ndarray:
  """Whole numbers with the same sum, by largest remainder: float [n] with a whole sum -> int [n], none negative."""
  exact = np.maximum(np.asarray(exact, np.float64), 0.0)
  counts, total = np.floor(exact).astype(int), round(float(exact.sum()))
  counts[np.argsort(counts - exact, kind='stable')[: max(total - counts.sum(), 0)]] += 1
  return counts


def shared_source(
    parts: Mapping[str, Sequence[packing.Example]], shares: Shares, *, batch_size, length, seed,
    plan: Callable[..., np.ndarray] = packing.plan, process_index=0, process_count=1,
) -> types.Source:
  """Endless batches whose rows are of one part each, in shares that are asked for at every step.

  What a share leaves over at one step is owed at the next, so that over a run the rows follow the shares exactly. A
  part goes on where it was left, epoch by epoch.

  Args:
    parts: name -> examples, the same on every host.
    shares: see `Shares`.
    batch_size, length, seed, plan, process_index, process_count: as in `pipeline.dataset_source`.

  Returns:
    Source; its state holds the cursors, what is owed and the last shares, so that it resumes exactly.

  Raises:
    ValueError: as `pipeline.dataset_source`, or shares that are negative, not finite or all 0.
  """
  if batch_size % process_count:
    raise ValueError(f'batch_size {batch_size} does not divide over {process_count} hosts; choose a multiple of it')
  names = sorted(parts)
  tables = [
      Schedule(
          [example._replace(source=number) for example in parts[name]], batch_size=1, length=length, seed=seed + number,
          plan=plan,
      )
      for number, name in enumerate(names)
  ]
  identity = {
      'data_hash': records.content_hash([[name, table.data_hash] for name, table in zip(names, tables)]),
      'seed': seed, 'batch_size': batch_size, 'length': length, 'plan': plan.__name__,
  }
  state = {'cursors': [0] * len(names), 'owed': [0.0] * len(names), 'shares': [1 / len(names)] * len(names)}

  def next_batch(params, step):
    state['shares'] = _normalised(shares(params, step, state['shares']), names)
    exact = np.asarray(state['owed']) + batch_size * np.asarray(state['shares'])
    counts = _taken(exact, batch_size)
    state['owed'] = (exact - counts).tolist()
    rows = [
        (table, row) for table, count, first in zip(tables, counts.tolist(), state['cursors'])
        for row in range(first, first + count)
    ]
    state['cursors'] = [first + count for first, count in zip(state['cursors'], counts.tolist())]
    order = packing.permutation(batch_size, seed, step)
    share = batch_size // process_count
    return _lay_out([rows[i] for i in order[process_index * share : (process_index + 1) * share]], length)

  def set_state(found):
    check_identity(found, identity)
    state.update({key: list(found[key]) for key in state})

  return types.Source(next_batch, lambda: {**state, **identity}, set_state)


def _normalised(shares, names) -> list[float]:
  values = np.asarray(shares, np.float64)
  if values.shape != (len(names),) or not np.all(np.isfinite(values)) or values.min() < 0 or values.sum() == 0:
    raise ValueError(f'shares of {names} are {values.tolist()}; expected non-negative numbers, one of them positive')
  return (values / values.sum()).tolist()


def _taken(exact, batch_size) -> np.ndarray:
  """Rows of every part now; a part that is ahead of its share waits."""
  wanted = np.maximum(exact, 0.0)
  return rounded(batch_size * wanted / wanted.sum())


def _lay_out(rows, length) -> types.Batch:
  """Rows of several schedules, each (schedule, its row), as one batch."""
  examples, bins = [], []
  for table, row in rows:
    chosen = table.rows(row)[0]
    chosen = chosen[chosen >= 0]
    bins.append(np.arange(len(examples), len(examples) + len(chosen)))
    examples += [table.examples[i] for i in chosen]
  slots = max(map(len, bins))
  table = np.stack([np.pad(one, (0, slots - len(one)), constant_values=-1) for one in bins])
  return packing.lay_out(examples, table, length)
