"""Two tokenizations of one text, cut where both have a border: what distillation across tokenizers compares.

A group is what lies between two consecutive common borders: some tokens of the student and some of the teacher that
spell the same bytes. Borders are byte offsets, so a token may end inside a character. Only supervised tokens are in
groups: the prompts may differ (chat templates, a bos on one side) and shift nothing.

  text     | a n t | e l o p e | . | (end)        groups: 'antelope' 1 : 2, '.' 1 : 1, end of text 1 : 1
  student  | antelope          | . | </s>
  teacher  | ant   | elope     | . | <|im_end|>

An end-of-text token counts as bytes that no text has, whatever its id is. Other tokens without bytes are in no group.
Where the texts differ (a tokenizer normalised one, or the student sampled half a character), what lies between their
longest common beginning and end is in no group.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from srm_jax import types
from srm_jax.data import packing
from srm_jax.data.token_bytes import fallback_ids, token_bytes, vocabulary_bytes
from srm_jax.data.tokenizer import Tokenizer

END = b'\xff\xff'  # stands for an end-of-text token: no text has it, and no token spells it


class Aligned(NamedTuple):
  """One text as an example of each side, with its groups.

  student_groups, teacher_groups: int32, the group of every token, -1 where it is in none; numbers count from 0 in the
  order of the text. exact: bool, per group, set where it is one token on each side and both spell the same bytes.
  """

  student: packing.Example
  teacher: packing.Example
  student_groups: np.ndarray
  teacher_groups: np.ndarray
  exact: np.ndarray


class AlignedBatch(NamedTuple):
  """Rows with the same texts for both models.

  batch: the student's, [B, Ts]. teacher: the teacher's Batch, [B, Tt]. student_groups, teacher_groups: int32 of the
  same shapes, the group of the token that this position predicts, -1 where it is in none, numbered in the row. valid,
  exact: bool [B, G]; the groups of a row come first, those that are not exact before those that are (so that the ones
  whose vocabularies are sorted lie together), the order of the text within both.
  """

  batch: types.Batch
  teacher: types.Batch
  student_groups: np.ndarray
  teacher_groups: np.ndarray
  valid: np.ndarray
  exact: np.ndarray


def align(student: Sequence[bytes], teacher: Sequence[bytes]):
  """Groups of two tokenizations.

  Args:
    student: bytes of each token, as of `token_bytes`, with END for end-of-text tokens.
    teacher: alike, of the same text.

  Returns:
    (student_groups int32 [n], teacher_groups int32 [m], exact bool [groups]), see `Aligned`.
  """
  sides = (student, teacher)
  texts = [b''.join(pieces) for pieces in sides]
  ends = [np.cumsum([len(piece) for piece in pieces], dtype=np.int64) for pieces in sides]
  prefix, suffix = _common_ends(*texts)
  middles = [text[prefix : len(text) - suffix] for text in texts]
  # On an axis where the two middles have no length, both texts end at the same place.
  borders = [end - np.clip(end - prefix, 0, len(middle)) for end, middle in zip(ends, middles)]
  cuts = np.intersect1d(*borders)
  groups = [_group_of(border, cuts[cuts > 0]) for border in borders]
  if any(middles) and (prefix or b''.join(middles).strip(b' ')):  # not only a space that one tokenizer puts in front
    groups = _without_middle(groups, ends, prefix, [prefix + len(middle) for middle in middles])
  # Equal first tokens end at a common border, so there are no others in their group.
  exact = [student[i] == teacher[j] for i, j in zip(*map(_first_tokens, groups), strict=True)]
  return *(group.astype(np.int32) for group in groups), np.array(exact, bool)


def align_examples(
    student: packing.Example, teacher: packing.Example, student_tokenizer: Tokenizer, teacher_tokenizer: Tokenizer
) -> Aligned:
  """Groups of one completion (or of several turns) as tokens of both sides.

  Args:
    student, teacher: the same supervised text, each encoded with its own tokenizer after its own prompt. Both end with
      an end-of-text token or neither does.
    student_tokenizer, teacher_tokenizer: what encoded them.

  Raises:
    ValueError: a tokenizer whose tokens have no bytes of their own, see `token_bytes.vocabulary_bytes`.
  """
  sides = ((student, student_tokenizer), (teacher, teacher_tokenizer))
  student_pieces, teacher_pieces = (_supervised_pieces(*side) for side in sides)
  student_groups, teacher_groups, exact = align(student_pieces, teacher_pieces)
  return Aligned(student, teacher, _spread(student, student_groups), _spread(teacher, teacher_groups), exact)


def shared_ids(student: Tokenizer, teacher: Tokenizer):
  """Ids that spell the same bytes in both vocabularies, and the two end-of-text ids.

  Special tokens spell nothing and are not among them. Where several ids of a vocabulary spell the same bytes, it is the
  one that the tokenizer itself makes of them.

  Returns:
    (student_ids, teacher_ids): int32 [M] each, increasing in the student's ids, no id twice.

  Raises:
    ValueError: see `token_bytes.vocabulary_bytes`.
  """
  ours, theirs = _id_of_bytes(student), _id_of_bytes(teacher)
  pairs = sorted((ours[piece], theirs[piece]) for piece in ours.keys() & theirs.keys())
  student_ids, teacher_ids = np.array(pairs, np.int32).reshape(-1, 2).T
  return student_ids, teacher_ids


def planner(aligned: Sequence[Aligned], *, student_length, teacher_length, max_groups=None):
  """`packing.plan` for rows in which both sides fit: give it to `pipeline.Schedule` beside the student's examples.

  Args:
    aligned: the data set.
    student_length, teacher_length: positions of a row.
    max_groups: groups of a row; None where the rows' positions are the only limit.

  Returns:
    plan(lengths, capacity, *, seed) -> bin table; lengths and capacity are those of the student.

  Raises:
    ValueError: no example, or one that does not fit; it is named.
  """
  limits = {
      'student_length': ([len(item.student.tokens) for item in aligned], student_length),
      'teacher_length': ([len(item.teacher.tokens) for item in aligned], teacher_length),
      'max_groups': ([len(item.exact) for item in aligned], max_groups or min(student_length, teacher_length)),
  }
  for name, (sizes, limit) in limits.items():
    _require_fit(aligned, np.array(sizes), limit, name)
  # Rounded up, each size is a share of the student's row: shares that fit there fit all three.
  shares = np.max([-(-np.array(sizes) * student_length // limit) for sizes, limit in limits.values()], axis=0)

  def plan_aligned(lengths, capacity, *, seed):
    if len(lengths) != len(shares) or capacity != student_length:
      raise ValueError(f'planned {len(shares)} examples in rows of {student_length}, got {len(lengths)} in {capacity}')
    return packing.plan(shares, capacity, seed=seed)

  return plan_aligned


def require_groups(aligned: Sequence[Aligned], bins):
  """Refuses a batch in which nothing is compared. bins: int [rows, slots]."""
  chosen = bins[bins >= 0]
  if not any(aligned[i].exact.size for i in chosen):
    raise ValueError(
        f'a batch has no aligned group; its examples are {[aligned[i].student.id for i in chosen[:8]]}; '
        'fix: see that both sides supervise the same text'
    )


def lay_out(aligned: Sequence[Aligned], bins, *, student_length, teacher_length, max_groups=None) -> AlignedBatch:
  """Rows of both sides.

  Args:
    aligned: what `bins` points into.
    bins: int [B, slots]; -1 is empty.
    student_length, teacher_length: Ts and Tt.
    max_groups: G; None for the smaller of the two lengths, which always suffices.

  Raises:
    ValueError: a row that is too long, or has more than G groups.
  """
  bins = np.asarray(bins)
  rows, slots = np.nonzero(bins >= 0)
  chosen = [aligned[i] for i in bins[rows, slots]]
  ordered = np.full(bins.shape, -1)
  ordered[rows, slots] = np.arange(len(chosen))  # the same rows over `chosen`
  number, valid, exact = _number(rows, chosen, (len(bins), max_groups or min(student_length, teacher_length)))
  firsts = np.cumsum([0, *(len(item.exact) for item in chosen)])

  def side(examples, groups, length):
    # Packed like tokens, numbers of groups are shifted like tokens: 1 + the index in the batch, 0 for none.
    tokens = (np.where(group < 0, 0, 1 + first + group).astype(np.int32) for group, first in zip(groups, firsts))
    targets = packing.lay_out([e._replace(tokens=t) for e, t in zip(examples, tokens)], ordered, length).targets
    return packing.lay_out(examples, ordered, length), np.append(number, np.int32(-1))[targets - 1]

  student, student_groups = side([i.student for i in chosen], [i.student_groups for i in chosen], student_length)
  teacher, teacher_groups = side([i.teacher for i in chosen], [i.teacher_groups for i in chosen], teacher_length)
  return AlignedBatch(student, teacher, student_groups, teacher_groups, valid, exact)


def coverage(aligned: Sequence[Aligned]) -> dict[str, float]:
  """What a run prints at its start: groups, the share of exact ones, shares of supervised tokens that are in groups."""
  def share(examples, groups):
    supervised = sum(np.count_nonzero(example.loss_mask) for example in examples)
    return float(sum(np.count_nonzero(group >= 0) for group in groups) / max(1, supervised))

  groups = sum(len(item.exact) for item in aligned)
  return {
      'groups': groups,
      'exact': float(sum(np.count_nonzero(item.exact) for item in aligned) / max(1, groups)),
      'student_tokens': share([i.student for i in aligned], [i.student_groups for i in aligned]),
      'teacher_tokens': share([i.teacher for i in aligned], [i.teacher_groups for i in aligned]),
  }


def _require_fit(aligned, sizes, limit, name):
  if not sizes.size:
    raise ValueError('the data set is empty; check its path and its filters')
  if sizes.max() > limit:
    raise ValueError(
        f"example id='{aligned[sizes.argmax()].student.id}' takes {sizes.max()} of {name} {limit}; fix: raise it, or "
        f'drop the {np.count_nonzero(sizes > limit)} examples that take more'
    )


def _common_ends(first: bytes, second: bytes):
  """Lengths of the longest common beginning, and of the longest common end of what it leaves."""
  if first == second:
    return len(first), 0
  prefix = len(os.path.commonprefix([first, second]))
  return prefix, len(os.path.commonprefix([first[prefix:][::-1], second[prefix:][::-1]]))


def _group_of(borders, cuts):
  """The group of each token, -1 of those that have no length."""
  return np.where(np.diff(borders, prepend=0) == 0, -1, np.searchsorted(cuts, borders))


def _without_middle(groups, ends, start, stops):
  """Drops the groups with a token that reaches into [start, stop) of its text (or across, where that is empty)."""
  reaching = [
      group[(end > start) & (np.concatenate([[0], end[:-1]]) < stop)] for group, end, stop in zip(groups, ends, stops)
  ]
  dropped = np.unique(np.concatenate(reaching))
  kept = lambda group: np.where(np.isin(group, dropped), -1, group - np.searchsorted(dropped[dropped >= 0], group))
  return [np.where(group < 0, -1, kept(group)) for group in groups]


def _first_tokens(groups):
  """Index of the first token of each group."""
  numbers, first = np.unique(groups, return_index=True)
  return first[numbers >= 0]


def _supervised_pieces(example, tokenizer):
  ids = example.tokens[example.loss_mask].tolist()
  return [END if i in tokenizer.end_ids else piece for i, piece in zip(ids, token_bytes(tokenizer, ids))]


def _spread(example, groups):
  """Groups of the supervised tokens as groups of all."""
  spread = np.full(len(example.tokens), -1, np.int32)
  spread[example.loss_mask] = groups
  return spread


def _id_of_bytes(tokenizer):
  """{bytes: id} over the vocabulary, END for the end-of-text token."""
  fallback, table = fallback_ids(tokenizer), vocabulary_bytes(tokenizer)
  own = {}
  for i, piece in enumerate(table):
    if piece and i not in fallback and (piece not in own or i in tokenizer.encode(piece.decode(errors='ignore'))):
      own[piece] = i
  return {table[i]: i for i in fallback} | own | {END: tokenizer.eos_id}


def _number(rows, chosen, shape):
  """Numbers the groups of each row, exact ones last: (int32 [groups of the batch], valid [B, G], exact [B, G])."""
  row = np.repeat(rows, [len(item.exact) for item in chosen])
  exact = np.concatenate([item.exact for item in chosen])
  order = np.lexsort((exact, row))
  number = np.empty(len(order), np.int32)
  number[order] = packing.rank_in_row(row[order]) - 1
  if number.max(initial=-1) >= shape[1]:
    worst = number.argmax()
    raise ValueError(f'row {row[worst]} of the bins has {number[worst] + 1} groups, max_groups is {shape[1]}; raise it')
  valid, marked = np.zeros((2, *shape), bool)
  valid[row, number], marked[row, number] = True, exact
  return number, valid, marked
