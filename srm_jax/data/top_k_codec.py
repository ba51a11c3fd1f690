"""The most likely next tokens of a distribution and the mass of the rest, in a fixed number of bytes a token.

A row of bytes holds, for ids in ascending order,

  float32 highest log-probability a, float32 span s (highest less lowest), float32 tail mass
  codes c of the log-probabilities, 10 bits each:  log p = a - s (c / 1023)^2
  low bits of the ids, then the high bits in unary, as Elias and Fano do: bit (id >> low) + rank is set

Squares put the fine steps where the mass is. On Zipf-like, peaked and two-peaked softmaxes over 151 936 tokens (k = 64)
ten bits are the fewest that kept the mean KL of quantising below 1 % of the truncation's: 0.12 % at worst, where 8 bits
had 1.5 %, powers 1 and 3 in place of 2 no less, and bfloat16's 16 bits 2 to 17 times as much. The ids take 106 bytes
where a set of 64 equally likely ones needs 101. All rows have one size, so nothing here loops over tokens.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np
from scipy import special

VERSION = 1  # of the layout above; raise it whenever old bytes would be read otherwise
LEVEL_BITS = 10
HIGHEST_LEVEL = 2**LEVEL_BITS - 1
HEAD = np.dtype('<f4')
HEAD_BYTES = 3 * HEAD.itemsize
MASS_TOLERANCE = 1e-3  # by which a sum of probabilities may be wrong; a float32 log-softmax stays far below
UNKNOWN_MASS = 2.0**-24  # what a float32 sum near one cannot tell from nothing
KL_ELEMENTS = 2**23  # entries of dense float64 that `reconstruction_kl` holds at a time


class TeacherTokens(NamedTuple):
  """ids: int32 [..., k], ascending. logprobs: float32 [..., k]. tail: float32 [...], mass of all other tokens."""

  ids: np.ndarray
  logprobs: np.ndarray
  tail: np.ndarray


class ReconstructionKL(NamedTuple):
  """float64 [n]. total: against what is decoded. quantisation: the part of it that exact log-probs would not have."""

  total: np.ndarray
  quantisation: np.ndarray


@dataclasses.dataclass(frozen=True)
class Codec:
  """k of vocab_size tokens. Raises ValueError unless 1 <= k <= vocab_size."""

  vocab_size: int
  k: int

  def __post_init__(self):
    if not 1 <= self.k <= self.vocab_size:
      raise ValueError(f'k {self.k} is not within 1 and the vocabulary of {self.vocab_size}; choose a k that is')

  @functools.cached_property
  def low_bits(self):
    """Bits of an id that are stored as they are: as many as make a row smallest."""
    sizes = [_packed_bytes(self.k, bits) + self._high_bytes(bits) for bits in range(self.vocab_size.bit_length())]
    return int(np.argmin(sizes))

  @property
  def bytes_per_token(self):
    return sum(self._sizes)

  def encode(self, ids, logprobs):
    """Rows of bytes for n tokens.

    Args:
      ids: int [n, k], distinct in a row, in any order.
      logprobs: float [n, k] log-softmax over the whole vocabulary at these ids, the k highest; taken as float32.

    Returns:
      uint8 [n, bytes_per_token]. What `decode` makes of them sums to one with its tail.

    Raises:
      ValueError: a shape, an id outside the vocabulary or twice in a row, or log-probabilities that are not finite or
        cannot be the k highest of a distribution; names the token.
    """
    ids, logprobs = np.asarray(ids), np.asarray(logprobs, np.float32)
    if ids.ndim != 2 or ids.shape[1] != self.k or ids.shape != logprobs.shape:
      raise ValueError(f'ids {ids.shape} and log-probabilities {logprobs.shape} must both be [n, k={self.k}]')
    order = np.argsort(ids, axis=1)
    ids, logprobs = np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprobs, order, axis=1)
    self._require_ids(ids)
    tail = self._tail(logprobs)
    head, levels = _quantise(logprobs, tail)
    ids, low_bits = ids.astype(np.uint32), self.low_bits
    low = _pack(ids & np.uint32((1 << low_bits) - 1), low_bits)
    return np.concatenate([head, _pack(levels, LEVEL_BITS), low, self._pack_high(ids >> np.uint32(low_bits))], axis=1)

  def decode(self, rows) -> TeacherTokens:
    """What `encode` made: uint8 [n, bytes_per_token] -> TeacherTokens of n tokens, ids ascending.

    Raises:
      ValueError: rows of another size, or that `encode` cannot have made.
    """
    rows = np.asarray(rows)
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != self.bytes_per_token:
      raise ValueError(
          f'rows {rows.dtype} {rows.shape} must be uint8 [n, {self.bytes_per_token}] for k {self.k} of '
          f'{self.vocab_size}; read them with the k and vocabulary that wrote them')
    head, levels, low, high = np.split(rows, np.cumsum(self._sizes[:-1]), axis=1)
    top, span, tail = np.ascontiguousarray(head).view(HEAD).astype(np.float32).T
    logprobs = _dequantise(top, span, _unpack(levels, self.k, LEVEL_BITS))
    low_bits = self.low_bits
    ids = self._unpack_high(high) << low_bits | _unpack(low, self.k, low_bits)
    return TeacherTokens(ids.astype(np.int32), logprobs, tail)

  @functools.cached_property
  def _sizes(self):
    """Bytes of head, levels, low and high bits in a row."""
    low_bits = self.low_bits
    return (
        HEAD_BYTES, _packed_bytes(self.k, LEVEL_BITS), _packed_bytes(self.k, low_bits), self._high_bytes(low_bits))

  def _high_bits(self, low_bits):
    return self.k + (self.vocab_size - 1 >> low_bits)

  def _high_bytes(self, low_bits):
    return -(-self._high_bits(low_bits) // 8)

  def _require_ids(self, ids):
    outside = (ids[:, 0] < 0) | (ids[:, -1] >= self.vocab_size)
    if outside.any():
      row = outside.argmax()
      raise ValueError(
          f'token {row} has ids from {ids[row, 0]} to {ids[row, -1]}, the vocabulary has {self.vocab_size}; '
          'give ids of this vocabulary')
    twice = ids[:, 1:] == ids[:, :-1]
    if twice.any():
      row, column = np.argwhere(twice)[0]
      raise ValueError(f'token {row} has id {ids[row, column]} twice; give the ids of one top-k')

  def _tail(self, logprobs):
    """float64 [n]: mass outside the k. Where rounding hides it, at most what the least of the k allows for."""
    if not np.isfinite(logprobs).all():
      row, column = np.argwhere(~np.isfinite(logprobs))[0]
      raise ValueError(f'token {row} has a log-probability {logprobs[row, column]}; give finite ones, or a smaller k')
    missing = 1 - np.exp(logprobs, dtype=np.float64).sum(axis=1)
    most = (self.vocab_size - self.k) * np.exp(logprobs.min(axis=1), dtype=np.float64)
    wrong = (missing < -MASS_TOLERANCE) | (missing > most + MASS_TOLERANCE)
    if wrong.any():
      row = wrong.argmax()
      raise ValueError(
          f'token {row}: the {self.k} probabilities sum to {1 - missing[row]:.6g} and the rest, none of them likelier '
          f'than the least, to at most {most[row]:.6g}; give the highest of a float32 log-softmax over all logits')
    return np.clip(missing, np.minimum(UNKNOWN_MASS, most), most)

  def _pack_high(self, high):
    bits = np.zeros((len(high), self._high_bits(self.low_bits)), np.uint8)
    np.put_along_axis(bits, high + np.arange(self.k), 1, axis=1)
    return np.packbits(bits, axis=1)

  def _unpack_high(self, packed):
    width = self._high_bits(self.low_bits)
    where = np.flatnonzero(np.unpackbits(packed, axis=1, count=width))
    if where.size == len(packed) * self.k:
      where = where.reshape(len(packed), self.k) - np.arange(len(packed))[:, None] * width
      if (where[:, 0] >= 0).all() and (where[:, -1] < width).all():
        return where - np.arange(self.k)
    raise ValueError(f'rows without {self.k} ids each: damaged, or of another k or vocabulary; write them anew')


def _quantise(logprobs, tail):
  """Head bytes [n, HEAD_BYTES] and codes [n, k]; the head takes up what makes codes and tail sum to one."""
  top = logprobs.max(axis=1)
  fall = top[:, None] - logprobs
  span = fall.max(axis=1)
  share = fall / np.where(span > 0, span, 1)[:, None]
  levels = np.rint(np.sqrt(share) * np.float32(HIGHEST_LEVEL)).astype(np.uint16)
  norm = np.exp(_dequantise(top, span, levels)).sum(axis=1, dtype=np.float64) + tail
  head = np.stack([np.minimum(top - np.log(norm), 0), span, tail / norm], axis=1)
  return head.astype(HEAD).view(np.uint8), levels


def _dequantise(top, span, levels):
  steps = levels.astype(np.float32)
  return top[:, None] - steps * steps * (span / np.float32(HIGHEST_LEVEL**2))[:, None]


def _packed_bytes(count, bits):
  return bits // 8 * count + bits % 8 * -(-count // 8)


def _pack(values, bits):
  """[n, k] non-negative integers of so many bits -> uint8 [n, _packed_bytes]: whole bytes first, then bit planes."""
  whole = bits - bits % 8
  planes = [(values >> shift).astype(np.uint8) for shift in range(0, whole, 8)]
  planes += [np.packbits((values >> shift).astype(np.uint8) & 1, axis=1) for shift in range(whole, bits)]
  return np.concatenate(planes, axis=1) if planes else np.empty((len(values), 0), np.uint8)


def _unpack(packed, count, bits):
  """What `_pack` packed, int32 [n, count]."""
  whole = bits - bits % 8
  values = np.zeros((len(packed), count), np.int32)
  for shift in range(0, whole, 8):
    start = shift // 8 * count
    values |= packed[:, start : start + count].astype(np.int32) << shift
  start, plane = whole // 8 * count, -(-count // 8)
  for shift in range(whole, bits):
    values |= np.unpackbits(packed[:, start : start + plane], axis=1, count=count).astype(np.int32) << shift
    start += plane
  return values


def reconstruction_kl(logits, tokens: TeacherTokens, *, temperature=1.0) -> ReconstructionKL:
  """What training on decoded tokens loses: the decoded tail is spread evenly over the rest of the vocabulary.

  KL(p || r) = KL(top and tail of p || decoded top and tail) + sum over the rest of p_v log(p_v (V - k) / tail of p)

  The first part is the quantisation's: it vanishes if log-probabilities and tail are exact.

  Args:
    logits: [n, V] of the teacher.
    tokens: TeacherTokens of the same n positions.
    temperature: positive number that divides the logits, as when the tokens were made.

  Returns:
    ReconstructionKL, in nats.

  Raises:
    ValueError: more ids than logits, another number of positions, or a temperature that is not positive.
  """
  logits, k = np.asarray(logits), tokens.ids.shape[-1]
  if logits.ndim != 2 or tokens.ids.shape != (len(logits), k):
    raise ValueError(f'logits {logits.shape} and ids {tokens.ids.shape} must be [n, V] and [n, k]; align them')
  if k > logits.shape[1]:
    raise ValueError(f'k {k} is more than the vocabulary of {logits.shape[1]}; choose a smaller k')
  if not temperature > 0:
    raise ValueError(f'temperature {temperature} is not positive; give the one that the tokens were made with')
  rows = max(1, KL_ELEMENTS // logits.shape[1])
  parts = [
      _kl(logits[i : i + rows].astype(np.float64) / temperature, *(field[i : i + rows] for field in tokens))
      for i in range(0, max(len(logits), 1), rows)]
  return ReconstructionKL(*map(np.concatenate, zip(*parts, strict=True)))


def _kl(logits, ids, logprobs, tail):
  log_p = logits - special.logsumexp(logits, axis=1, keepdims=True)
  top = np.take_along_axis(log_p, ids, axis=1)
  rest = np.exp(log_p)
  np.put_along_axis(rest, ids, 0, axis=1)
  mass = rest.sum(axis=1)
  quantisation = (np.exp(top) * (top - logprobs)).sum(axis=1) + special.rel_entr(mass, tail)
  even = mass / max(logits.shape[1] - ids.shape[1], 1)
  return quantisation + special.rel_entr(rest, even[:, None]).sum(axis=1), quantisation
