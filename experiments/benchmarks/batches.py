"""What the benchmarks train on and sample from: random tokens."""

import numpy as np

from srm_jax.types import Batch


def make_batch(vocab_size: int, rows: int, length: int) -> Batch:
  """Random tokens, one segment a row, every target supervised."""
  tokens = np.random.default_rng(0).integers(0, vocab_size, (rows, length + 1), dtype=np.int32)
  ones = np.ones((rows, length), np.int32)
  positions = np.cumsum(ones, axis=1, dtype=np.int32) - 1
  return Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), positions, ones)


class Numbers:
  """Ids written as numbers: prompts are drawn as ids."""

  eos_id = 0

  @staticmethod
  def encode(text):
    return [int(word) for word in text.split()]

  @staticmethod
  def decode(tokens):
    return ' '.join(map(str, tokens))
