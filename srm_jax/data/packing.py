"""Examples to fixed shapes. The only place where tokens are shifted into inputs and targets.

An example of n tokens takes n positions of a row: position i holds token i as input and token i + 1 as target. Its last
token is an input too (a value or reward head reads it) and predicts nothing. A token is supervised as a target iff its
mask is set, so masks follow lengths and never the identity of a token: end-of-text may be the padding token.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from srm_jax import types


WINDOW = 200  # examples sorted by length together; see `plan`


class Example(NamedTuple):
  """tokens: int32 [n]. loss_mask: bool [n], set where the token is supervised as a target; never at the first.

  source: which data set of a mix it is from; None where there is one data set.
  """

  id: str
  tokens: np.ndarray
  loss_mask: np.ndarray
  source: int | None = None


def from_text(id, token_ids, eos_id) -> Example:
  """Plain text: every token but the first is supervised, and one end-of-text token after the last."""
  tokens = _end_once(token_ids, eos_id)
  return Example(id, tokens, np.arange(len(tokens)) > 0)


def from_prompt_completion(id, prompt_ids, completion_ids, eos_id) -> Example:
  """Prompt and completion: every completion token and one end-of-text token are supervised once.

  Args:
    id: named in errors.
    prompt_ids: at least one token, never supervised.
    completion_ids: may end with eos_id already.
    eos_id: None where the completion was cut and must not learn to end.

  Raises:
    ValueError: empty prompt, because then nothing would predict the first completion token.
  """
  if not len(prompt_ids):
    raise ValueError(f"example id='{id}' has an empty prompt; give it at least one token (a bos or a newline)")
  completion = _end_once(completion_ids, eos_id)
  tokens = np.concatenate([np.asarray(prompt_ids, np.int32), completion])
  return Example(id, tokens, np.arange(len(tokens)) >= len(prompt_ids))


def _end_once(token_ids, eos_id):
  tokens = np.asarray(token_ids, np.int32).reshape(-1)
  missing = eos_id is not None and not (tokens.size and tokens[-1] == eos_id)
  return np.append(tokens, np.int32(eos_id)) if missing else tokens


def permutation(size, *key):
  """Permutation of range(size) by non-negative integers; raw generator output, so the same under every numpy."""
  return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(size), kind='stable')


def plan(lengths, capacity, *, seed=(0,)):
  """Assigns examples to rows: best fit over a permutation sorted by decreasing length in windows, rows then shuffled.

  A window fills nearly as well as sorting everything does, and rows still differ from epoch to epoch.

  Args:
    lengths: int [n], tokens per example.
    capacity: positions of a row.
    seed: tuple of non-negative ints.

  Returns:
    int32 [rows, most examples in a row]: indices of examples, -1 where a row has fewer.

  Raises:
    ValueError: no example, or one longer than the capacity.
  """
  lengths = np.asarray(lengths)
  require_fit(lengths, capacity)
  row_of = np.empty(len(lengths), np.int64)
  rows_by_room = [[] for _ in range(capacity + 1)]
  rooms = 0  # bit r is set where some row has r positions left
  rows = 0
  order = permutation(len(lengths), *seed, 0)
  order = order[np.lexsort((-lengths[order], np.arange(len(order)) // WINDOW))]
  for example, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
    fitting = rooms >> length
    if fitting:
      room = length + (fitting & -fitting).bit_length() - 1
      row = rows_by_room[room].pop()
      if not rows_by_room[room]:
        rooms ^= 1 << room
    else:
      room, row, rows = capacity, rows, rows + 1
    row_of[example] = row
    rows_by_room[room - length].append(row)
    rooms |= 1 << (room - length)
  return _table(row_of, order, rows)[permutation(rows, *seed, 1)]


def _table(row_of, order, rows):
  counts = np.bincount(row_of, minlength=rows)
  placed = order[np.argsort(row_of[order], kind='stable')]
  table = np.full((rows, counts.max()), -1, np.int32)
  slots = np.arange(len(placed)) - np.repeat(np.cumsum(counts) - counts, counts)
  table[np.repeat(np.arange(rows), counts), slots] = placed
  return table


def one_per_row(lengths, capacity, *, seed=(0,)):
  """Like `plan`, without packing: one example a row."""
  require_fit(lengths, capacity)
  return permutation(len(lengths), *seed, 0).astype(np.int32)[:, None]


def require_fit(lengths, capacity, *, ids=None):
  """Refuses an empty data set, and examples longer than a row. ids: names for the error, else indices."""
  if not len(lengths):
    raise ValueError('the data set is empty; check its path and its filters')
  too_long = np.flatnonzero(np.asarray(lengths) > capacity)
  if too_long.size:
    first = too_long[0]
    raise ValueError(
        f"example id='{first if ids is None else ids[first]}' has {lengths[first]} tokens, context is {capacity}; "
        f'fix: raise the length, or shorten or drop the {too_long.size} examples that are longer'
    )


def require_supervised(examples, bins):
  """Refuses a batch on which no token would be learnt. bins: int [rows, slots]."""
  chosen = bins[bins >= 0]
  if not any(examples[i].loss_mask[1:].any() for i in chosen):
    ids = [examples[i].id for i in chosen[:8]]
    raise ValueError(
        f'a batch has no supervised token; its examples are {ids}{" ..." if chosen.size > 8 else ""}; '
        'fix: give them completions, or look at their loss masks'
    )


def pack(examples: Sequence[Example], bins, capacity) -> types.Batch:
  """Lays examples out as rows.

  Args:
    examples: what `bins` points into.
    bins: int [B, slots] from `plan`, or a slice of its rows; -1 is empty.
    capacity: T.

  Returns:
    Batch of numpy [B, T]: segments count from 1 in a row, positions restart in each. Padding is segment 0, id 0.

  Raises:
    ValueError: an example or a row longer than T, or a batch without a supervised token.
  """
  require_supervised(examples, bins)
  return lay_out(examples, bins, capacity)


def lay_out(examples, bins, capacity) -> types.Batch:
  """`pack` for a part of a batch: other hosts may hold its supervised tokens."""
  bins = np.asarray(bins)
  rows, slots = np.nonzero(bins >= 0)
  chosen = [examples[i] for i in bins[rows, slots]]
  lengths = np.array([len(example.tokens) for example in chosen], np.int64)
  require_fit(lengths, capacity, ids=[example.id for example in chosen])
  used = np.bincount(rows, lengths, minlength=len(bins)).astype(np.int64)
  if used.max() > capacity:
    raise ValueError(f'row {used.argmax()} of the bins holds {used.max()} tokens, context is {capacity}; plan with it')

  ends = np.cumsum(lengths)
  positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
  row_starts = np.cumsum(used) - used
  column_starts = ends - lengths - row_starts[rows]
  flat = np.repeat(rows * capacity + column_starts, lengths) + positions

  tokens = np.concatenate([example.tokens for example in chosen])
  mask = np.concatenate([example.loss_mask for example in chosen])
  targets, target_mask = np.roll(tokens, -1), np.roll(mask, -1)
  targets[ends - 1], target_mask[ends - 1] = 0, False  # the last token of a segment predicts nothing
  segments = np.repeat(rank_in_row(rows), lengths)
  mixed = chosen[0].source is not None

  def field(values, dtype):
    out = np.zeros(len(bins) * capacity, dtype)
    out[flat] = values
    return out.reshape(len(bins), capacity)

  return types.Batch(
      inputs=field(tokens, np.int32),
      targets=field(targets, np.int32),
      loss_mask=field(target_mask, np.float32),
      positions=field(positions, np.int32),
      segment_ids=field(segments, np.int32),
      sources=field(np.repeat([example.source for example in chosen], lengths), np.int32) if mixed else None,
  )


def rank_in_row(rows):
  """1, 2, ... within every run of equal values: int [n] -> int [n]."""
  first = np.flatnonzero(np.diff(rows, prepend=-1))
  runs = np.diff(np.append(first, len(rows)))
  return np.arange(len(rows)) - np.repeat(first, runs) + 1


def pad_batch(examples: Sequence[Example], length) -> types.Batch:
  """One example a row, in order, padded to [B, length]; raises like `pack`."""
  require_fit([len(example.tokens) for example in examples], length, ids=[example.id for example in examples])
  return pack(examples, np.arange(len(examples))[:, None], length)


def completions_batch(
    prompt_tokens: Sequence[Sequence[int]], completion_tokens: Sequence[Sequence[int]], *, length, pad_id=0,
    prompt_width=0,
) -> tuple[types.Batch, Callable[[Sequence[Sequence[float]]], np.ndarray]]:
  """Sampled completions, one a row, with loss on exactly the tokens that were sampled.

  Args:
    prompt_tokens, completion_tokens: B lists of ids; a completion has its end-of-text id iff it was sampled, and may
      be empty. Nothing is appended.
    length: T.
    pad_id: fills inputs and targets of padding.
    prompt_width: slots of a prompt, which is padded on the left to end with them; 0 pads rows on the right alone.

  Returns:
    Batch of numpy [B, T], and aligned(values): B lists with a value per completion token (sampler log-probabilities)
    -> float32 [B, T], each at the position that predicts its token, 0 elsewhere.

  Raises:
    ValueError: empty prompt, a row longer than T, no completion token in the batch, values of another length, a prompt
      longer than its slots.
  """
  examples = [
      from_prompt_completion(f'row {row}', prompt, completion, None)
      for row, (prompt, completion) in enumerate(zip(prompt_tokens, completion_tokens, strict=True))
  ]
  batch = pad_batch(examples, length)
  if prompt_width:
    batch = _behind(batch, [prompt_width - len(prompt) for prompt in prompt_tokens])
  padding = batch.segment_ids == 0
  batch = batch._replace(inputs=np.where(padding, pad_id, batch.inputs).astype(np.int32))
  batch = batch._replace(targets=np.where(padding, pad_id, batch.targets).astype(np.int32))
  counts = [len(completion) for completion in completion_tokens]

  def aligned(values):
    given = [len(row) for row in values]
    if given != counts:
      raise ValueError(f'values per completion are {given[:8]}, completion tokens {counts[:8]}; they must agree')
    out = np.zeros(batch.loss_mask.shape, np.float32)
    out[batch.loss_mask > 0] = np.concatenate([np.asarray(row, np.float32) for row in values])
    return out

  return batch, aligned


def _behind(batch: types.Batch, empty: Sequence[int]) -> types.Batch:
  """The batch with so many slots of padding moved from the end of each row to its front."""
  spare = np.count_nonzero(batch.segment_ids == 0, axis=1)
  for row, (moved, there) in enumerate(zip(empty, spare, strict=True)):
    if not 0 <= moved <= there:
      raise ValueError(f'row {row}: {moved} of {there} slots of padding were to stand before the prompt')
  slots = (np.arange(batch.inputs.shape[1])[None] - np.asarray(empty)[:, None]) % batch.inputs.shape[1]
  return types.Batch(*(None if x is None else np.take_along_axis(x, slots, axis=1) for x in batch))
