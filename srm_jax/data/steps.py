"""Where the steps of a completion end: in its text by a named rule, in its tokens by their bytes.

The token of a step is the first after which all bytes of the step are there. A token may reach into the next step
('\\n\\n', or a merge over the border) and may end inside a character; two steps may end in one token.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from srm_jax.data.token_bytes import token_bytes
from srm_jax.data.tokenizer import Tokenizer
from srm_jax.tasks.task import ANSWER_CUE

Segmentation = Callable[[str], list[int]]  # text -> ends in characters, ascending


def lines(text: str) -> list[int]:
  """Every line that is not blank, with its line break."""
  parts = text.splitlines(keepends=True)
  return [end for part, end in zip(parts, itertools.accumulate(map(len, parts))) if part.strip()]


def characters(text: str) -> list[int]:
  """Every character that is no space; the line of the answer is one step, as half a number is no answer."""
  ends, start = [], 0
  for line in text.splitlines(keepends=True):
    whole = line.startswith(ANSWER_CUE.strip())
    ends += [start + len(line)] if whole else [start + i for i, one in enumerate(line, 1) if not one.isspace()]
    start += len(line)
  return ends


def step_tokens(tokenizer: Tokenizer, tokens: Sequence[int], segment: Segmentation) -> list[int]:
  """Indices of the tokens with which the steps of sampled tokens end, each once.

  Bytes that are no text, as a cut character leaves them, stand for themselves.
  """
  text = b''.join(token_bytes(tokenizer, tokens)).decode('utf-8', 'surrogateescape')
  return sorted(set(tokens_at(tokenizer, tokens, text, segment(text))))


def tokens_at(tokenizer: Tokenizer, tokens: Sequence[int], text: str, ends: Sequence[int]) -> list[int]:
  """The index of the token with which each end is reached.

  Args:
    tokens: of the text; there may be others before it (a space that a tokenizer adds) and behind it.
    text: what the ends count characters of.

  Raises:
    ValueError: the tokens do not spell the text.
  """
  spelled = token_bytes(tokenizer, tokens)
  start = b''.join(spelled).find(text.encode('utf-8', 'surrogateescape'))
  if start < 0:
    raise ValueError(
        f'tokenizer {tokenizer.name} does not give back the text {text[:60]!r} that it encoded (it normalises); '
        'fix: drop this completion, or take another tokenizer'
    )
  wanted = [start + len(text[:end].encode('utf-8', 'surrogateescape')) for end in ends]
  return np.searchsorted(np.cumsum([len(piece) for piece in spelled]), wanted).tolist()


SEGMENTATIONS: dict[str, Segmentation] = {'lines': lines, 'characters': characters}
