"""Pairs of completions, one better than the other: from graded annotations, or from groups of rollouts.

`types.Pairs` holds one completion a row, the two of a pair in neighbouring rows, so that a host's or a device's block
of rows holds whole pairs and a page that shows a batch shows them side by side.
"""

from collections.abc import Sequence

import numpy as np

from srm_jax import types
from srm_jax.data import packing, pipeline, records


def by_problem(annotations: Sequence[records.Annotation], *, per_problem, seed) -> np.ndarray:
  """A right and a wrong completion of one problem, by seed.

  Args:
    annotations: those without a grade are left out, and those that repeat a problem's text.
    per_problem: most pairs of a problem; all are different, completions may occur in several.
    seed: of the draw.

  Returns:
    int32 [pairs, 2] into annotations, the right one first; problems in the order of the file.
  """
  pairs = []
  for number, (right, wrong) in enumerate(_graded(annotations)):
    for place in packing.permutation(len(right) * len(wrong), seed, number)[:per_problem].tolist():
      pairs.append((right[place // len(wrong)], wrong[place % len(wrong)]))
  return np.array(pairs, np.int32).reshape(-1, 2)


def across_problems(annotations: Sequence[records.Annotation], *, per_problem, seed) -> np.ndarray:
  """A right and a wrong completion of whatever problems, by seed, for losses that need no pairs.

  Arguments and result as of `by_problem`, but per_problem bounds the right and the wrong completions of a problem. Of
  the kind of which there are fewer, some occur again.
  """
  sides = ([], [])
  for number, kinds in enumerate(_graded(annotations)):
    for side, found in zip(sides, kinds, strict=True):
      side += [found[place] for place in packing.permutation(len(found), seed, number)[:per_problem].tolist()]
  if not all(sides):
    return np.zeros((0, 2), np.int32)
  pairs = max(map(len, sides))
  drawn = [np.array(side)[packing.permutation(len(side), seed, kind)] for kind, side in enumerate(sides)]
  return np.stack([np.resize(side, pairs) for side in drawn], axis=1).astype(np.int32)


def _graded(annotations):
  """[(places of right ones, places of wrong ones)] a problem, without repetitions."""
  problems, seen = {}, set()
  for place, annotation in enumerate(annotations):
    if annotation.correct is None or (annotation.problem.id, annotation.completion) in seen:
      continue
    seen.add((annotation.problem.id, annotation.completion))
    problems.setdefault(annotation.problem.id, ([], []))[0 if annotation.correct else 1].append(place)
  return list(problems.values())


def dataset_source(
    examples: Sequence[packing.Example], pairs, *, size, length, seed, mismatched=False, process_index=0,
    process_count=1,
) -> types.Source:
  """Endless batches of pairs, resumable exactly.

  Args:
    examples: what `pairs` points into, alike on every host.
    pairs: int [n, 2], chosen and rejected.
    size: pairs of the global batch.
    length: positions of a row.
    seed: of the order, new every epoch.
    mismatched: whether every pair is shown beside the completions of the one before it in the epoch, see `mismatch`.
    process_index, process_count: as in `pipeline.dataset_source`.

  Returns:
    Source; next(params, step) -> numpy Pairs of 2 size / process_count rows.

  Raises:
    ValueError: as `pipeline.dataset_source`.
  """

  def shuffled(lengths, capacity, *, seed):
    del lengths, capacity
    table = pairs[packing.permutation(len(pairs), *seed, 0)]
    return np.concatenate([table, np.roll(table, 1, axis=0)], axis=1) if mismatched else table

  schedule = pipeline.Schedule(examples, batch_size=size, length=length, seed=seed, plan=shuffled)
  schedule.data_hash = records.content_hash([schedule.data_hash, pairs, mismatched])

  def assemble(table):
    laid_out = lambda columns: packing.lay_out(examples, columns.reshape(-1, 1), length)
    batch = laid_out(table[:, :2])
    weights = np.ones(len(batch.inputs), np.float32)
    return types.Pairs(batch, weights, mismatch(batch, laid_out(table[:, 2:])) if mismatched else None)

  return pipeline.scheduled_source(
      schedule, assemble=assemble, process_index=process_index, process_count=process_count
  )


def of_rollouts(rollouts: types.Rollouts, *, samples, mismatched=False) -> types.Pairs:
  """The best and the worst completion of every group.

  Args:
    rollouts: numpy, P groups of `samples` rows.
    samples: G.
    mismatched: as in `dataset_source`, of the group before.

  Returns:
    Pairs of 2 P rows; weight 0 where no two completions of a group have different rewards.
  """
  rewards, valid = (x.reshape(-1, samples) for x in (rollouts.rewards, rollouts.valid))
  best = np.argmax(np.where(valid > 0, rewards, -np.inf), axis=1)
  worst = np.argmin(np.where(valid > 0, rewards, np.inf), axis=1)
  groups = np.arange(len(rewards))
  apart = np.any(valid > 0, axis=1) & (rewards[groups, best] > rewards[groups, worst])
  rows = (groups[:, None] * samples + np.stack([best, worst], axis=1)).reshape(-1)
  batch = _rows(rollouts.batch, rows)
  mean = np.sum(rewards * valid, axis=1) / np.maximum(np.sum(valid, axis=1), 1)
  both = lambda values: np.repeat(values, 2).astype(np.float32)
  return types.Pairs(
      batch, both(apart), mismatch(batch, _rows(batch, np.roll(np.arange(len(rows)), 2))) if mismatched else None,
      rewards=both(mean), sampled=both(np.full(len(groups), samples / 2)),
  )


def _rows(batch, places) -> types.Batch:
  return types.Batch(*(None if field is None else field[places] for field in batch))


def mismatch(batch: types.Batch, donors: types.Batch) -> types.Batch:
  """Row i: the prompt of row i of `batch`, and after it the completion of row i of `donors`, cut where the row ends.

  Args:
    batch, donors: numpy [B, T], one sequence a row; a prompt is what stands before the first supervised token.

  Returns:
    Batch of numpy [B, T], with loss where the completion had it.
  """
  examples = [_spliced(batch, donors, row) for row in range(len(batch.inputs))]
  return packing.lay_out(examples, np.arange(len(examples))[:, None], batch.inputs.shape[1])


def _spliced(batch, donors, row) -> packing.Example:
  (start, _), (first, end) = _bounds(batch, row), _bounds(donors, row)
  tokens = np.concatenate([batch.inputs[row, :start], donors.inputs[row, first:end]])
  mask = np.concatenate([np.zeros(start, bool), donors.loss_mask[row, first - 1 : end - 1] > 0])
  length = batch.inputs.shape[1]
  return packing.Example(f'row {row}', tokens[:length], mask[:length])


def _bounds(batch, row) -> tuple[int, int]:
  """First token of the completion of a row, and the end of the row."""
  end = int(np.count_nonzero(batch.segment_ids[row]))
  supervised = np.flatnonzero(batch.loss_mask[row])
  return (int(supervised[0]) + 1 if supervised.size else end), end
