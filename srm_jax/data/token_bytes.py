"""The bytes that a token adds to a text: the one measure that all tokenizers share.

A token need not hold whole characters (byte-level BPE and byte pieces cut them), so spans of characters do not tell two
tokenizations of a text apart. What is used, by kind:

  byte            ids below 256 are the bytes.
  SentencePiece   is_byte, is_control, is_unknown and id_to_piece; U+2581 in a piece spells a space.
  tokenizer.json  the vocabulary and added tokens of the file, spelled as its `decoder` section says.

The bytes of a token do not depend on its neighbours. Decoders that strip a space at the start of a text (Llama 2) do
look at the place: there the bytes have that space in front, as the tokens have.
"""

import codecs
import functools
import json
import pathlib
import re
from collections.abc import Sequence

import sentencepiece

from srm_jax.data.tokenizer import LOWER_BAR, Tokenizer

BYTE_PIECE = re.compile('<0x([0-9A-Fa-f]{2})>')
DECODERS = ('ByteLevel', 'ByteFallback', 'Fuse', 'Metaspace', 'Replace', 'Strip')


def token_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> list[bytes]:
  """The bytes of each token.

  Joined they are the text that `tokenizer.encode` was given, unless the tokenizer loses some of it (normalisation to
  NFC, a space in front of every text). Special tokens, end-of-text ids and ids past the vocabulary are b''.

  Args:
    tokenizer: from `tokenizer.load`; its file must still be there.
    ids: token ids.

  Returns:
    As many bytes objects.

  Raises:
    ValueError: see `vocabulary_bytes`.
  """
  table = vocabulary_bytes(tokenizer)
  return [table[i] if 0 <= i < len(table) else b'' for i in ids]


def whole_characters(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[str, int]]:
  """A text to be shown token by token: the shortest runs of tokens that hold whole characters.

  Args:
    tokenizer, ids: as of `token_bytes`.

  Returns:
    [(text, number of tokens)]; a token without bytes is ('', 1), bytes that are no character are U+FFFD.

  Raises:
    ValueError: see `vocabulary_bytes`.
  """
  decoder = codecs.getincrementaldecoder('utf-8')('replace')
  runs, text, count = [], '', 0
  for spelled in [*token_bytes(tokenizer, ids), b'']:
    if spelled:
      text, count = text + decoder.decode(spelled), count + 1
    if count and not (spelled and decoder.getstate()[0]):  # nothing, or nothing more, is missing of a character
      runs.append((text + decoder.decode(b'', final=True), count))
      text, count = '', 0
    if not spelled:
      runs.append(('', 1))
  return runs[:-1]


def vocabulary_bytes(tokenizer: Tokenizer) -> tuple[bytes, ...]:
  """The bytes of every id; b'' for special tokens, end-of-text ids and holes. Read once for each tokenizer.

  Raises:
    ValueError: the tokenizer's file is gone or another one by now, or its decoder does not go token by token.
  """
  return _vocabulary(tokenizer)[0]


def fallback_ids(tokenizer: Tokenizer) -> frozenset[int]:
  """Ids of byte pieces ('<0x0A>'), which a tokenizer uses only for what no other piece of it spells."""
  return _vocabulary(tokenizer)[1]


def _vocabulary(tokenizer):
  silent = frozenset([*tokenizer.end_ids, *tokenizer.special_tokens.values()])
  return _read_once(tokenizer.name, tokenizer.vocab_size, silent, tokenizer.fingerprint)


@functools.lru_cache(maxsize=16)
def _read_once(name, size, silent, fingerprint):
  """(bytes of every id, fallback ids)."""
  del fingerprint  # part of the key: a path may come to hold another tokenizer
  found, fallback = _read(name)
  if max(found, default=0) >= size:
    raise ValueError(f'{name} has ids up to {max(found)}, had {size} when it was loaded; fix: load the tokenizer again')
  return tuple(b'' if i in silent else found.get(i, b'') for i in range(size)), fallback


def _read(name):
  """({id: bytes}, fallback ids)."""
  if name == 'byte':
    return {i: bytes([i]) for i in range(256)}, frozenset()
  path = pathlib.Path(name)
  if not path.is_file():
    raise ValueError(f'{name} is gone since the tokenizer was loaded; fix: keep the file while a run needs its bytes')
  return (_read_hugging_face if path.suffix == '.json' else _read_sentencepiece)(path)


def _read_sentencepiece(path):
  processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
  ids = range(processor.vocab_size())
  spoken = [i for i in ids if not (processor.is_control(i) or processor.is_unknown(i))]
  pieces = {i: processor.id_to_piece(i) for i in spoken}
  fallback = frozenset(i for i in spoken if processor.is_byte(i))
  spell = lambda i, piece: _byte(piece) if i in fallback else piece.replace(LOWER_BAR, ' ').encode()
  return {i: spell(i, piece) for i, piece in pieces.items()}, fallback


def _byte(piece):
  return bytes([int(BYTE_PIECE.fullmatch(piece)[1], 16)])


def _read_hugging_face(path):
  content = json.loads(path.read_text(encoding='utf-8'))
  spell, has_fallback = _speller(content.get('decoder') or {'type': 'none'}, path)
  pieces = content['model']['vocab']
  if isinstance(pieces, list):  # Unigram: [piece, score] in the order of ids
    pieces = {piece: i for i, (piece, _) in enumerate(pieces)}
  added = {token['id']: token['content'].encode() for token in content['added_tokens']}
  fallback = frozenset(i for piece, i in pieces.items() if has_fallback and BYTE_PIECE.fullmatch(piece))
  return {i: spell(piece) for piece, i in pieces.items()} | added, fallback


def _speller(decoder, path):
  """(piece -> bytes, whether it knows byte pieces), as the decoder section of a tokenizer.json says."""
  steps = decoder['decoders'] if decoder['type'] == 'Sequence' else [decoder]
  kinds = {step['type'] for step in steps}
  replaced = [_replacement(step) for step in steps if step['type'] in ('Metaspace', 'Replace')]
  if kinds - set(DECODERS) or None in replaced:
    raise ValueError(
        f'{path}: decoder {sorted(kinds)} does not tell the bytes of a single token; fix: use a tokenizer whose '
        f'decoder is made of {list(DECODERS)}, with replacements of plain strings'
    )

  def spell(piece):
    if 'ByteFallback' in kinds and BYTE_PIECE.fullmatch(piece):
      return _byte(piece)
    for old, new in replaced:
      piece = piece.replace(old, new)
    return _from_alphabet(piece) if 'ByteLevel' in kinds else piece.encode()

  return spell, 'ByteFallback' in kinds


def _replacement(step):
  """(old, new) of a decoder's step; None for a pattern that is no plain string."""
  if step['type'] == 'Metaspace':
    return step['replacement'], ' '
  return (step['pattern']['String'], step['content']) if 'String' in step['pattern'] else None


@functools.cache
def _alphabet():
  """{character: byte} of byte-level BPE: printable Latin-1 stands for itself, the rest follows from U+0100 on."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  rest = [byte for byte in range(256) if byte not in printable]
  return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def _from_alphabet(piece):
  """A piece with a character outside the alphabet is plain text, to decoders of this kind as well."""
  values = [_alphabet().get(character) for character in piece]
  return piece.encode() if None in values else bytes(values)
