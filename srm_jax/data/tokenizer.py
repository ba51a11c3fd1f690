"""Tokenizers behind one record: bytes, SentencePiece models, Hugging Face tokenizer.json files.

Prompt and completion are always encoded separately and concatenated, in training as in sampling, so a token never
straddles the border and the first completion token is the same in both.
"""

import functools
import hashlib
import io
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import sentencepiece
import tokenizers

BYTE_MARK = 'byte'  # a folder with a file of this name holds the byte tokenizer
LOWER_BAR = '\u2581'  # SentencePiece's own spelling of a space.


class Tokenizer(NamedTuple):
  """Text to ids and back.

  encode(text) -> list of ids without special tokens. decode(ids) -> text; special ids and ids past the vocabulary
  (models pad their embedding) are skipped. pad_id may equal eos_id: masks come from lengths. fingerprint: hash of the
  vocabulary and special ids, equal where two tokenizers are interchangeable.
  """

  name: str
  vocab_size: int
  eos_id: int
  pad_id: int
  bos_id: int | None
  fingerprint: str
  encode: Callable[[str], list[int]]
  decode: Callable[[Sequence[int]], str]


def load(path_or_name, *, eos_token=None) -> Tokenizer:
  """Loads a tokenizer.

  Args:
    path_or_name: 'byte', a SentencePiece `.model`, a Hugging Face `tokenizer.json`, or a folder with one of the two.
    eos_token: spelling of the end-of-text token, where the files name none or another one is wanted.

  Raises:
    ValueError: unknown name, or no end-of-text token.
  """
  if str(path_or_name) == 'byte' or (pathlib.Path(path_or_name) / BYTE_MARK).is_file():
    return _byte_tokenizer()
  path = _tokenizer_file(pathlib.Path(path_or_name))
  return (_load_hugging_face if path.suffix == '.json' else _load_sentencepiece)(path, eos_token)


def copy(path_or_name, folder):
  """Puts a tokenizer's files into a folder of its own, which `load` then reads."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  if load(path_or_name).name == 'byte':
    (folder / BYTE_MARK).touch()
    return
  path = _tokenizer_file(pathlib.Path(path_or_name))
  target = folder / ('tokenizer.json' if path.suffix == '.json' else 'tokenizer.model')
  shutil.copyfile(path, target)
  for name in ('tokenizer_config.json', 'special_tokens_map.json'):
    if (path.parent / name).is_file():
      shutil.copyfile(path.parent / name, folder / name)


def _tokenizer_file(path):
  candidates = [path / 'tokenizer.json', path / 'tokenizer.model'] if path.is_dir() else [path]
  for candidate in candidates:
    if candidate.is_file() and candidate.suffix in ('.json', '.model'):
      return candidate
  raise ValueError(
      f"tokenizer '{path}' not found; choose 'byte', a SentencePiece .model, a Hugging Face tokenizer.json, or a "
      'folder with tokenizer.json or tokenizer.model'
  )


def _fingerprint(content: bytes, *special_ids):
  return hashlib.sha256(content + repr(special_ids).encode()).hexdigest()[:16]


def _encode_bytes(text):
  return list(text.encode('utf-8'))


def _decode_bytes(ids):
  return bytes(int(i) for i in ids if 0 <= i < 256).decode('utf-8', errors='replace')


def _byte_tokenizer():
  eos_id, pad_id = 256, 257
  fingerprint = _fingerprint(b'byte', eos_id, pad_id, None)
  return Tokenizer('byte', 258, eos_id, pad_id, None, fingerprint, _encode_bytes, _decode_bytes)


def _encode_pieces(processor, lower_bar_ids, text):
  # A literal lower bar would come back as a space: where the model has byte pieces, it is spelled in bytes.
  if not lower_bar_ids or LOWER_BAR not in text:
    return processor.encode(text)
  first, *rest = text.split(LOWER_BAR)
  return sum((lower_bar_ids + processor.encode(part) for part in rest), processor.encode(first))


def _decode_pieces(processor, special_ids, ids):
  size = processor.vocab_size()
  return processor.decode([int(i) for i in ids if 0 <= i < size and int(i) not in special_ids])


def _lower_bar_ids(processor):
  """Byte ids of a literal lower bar; empty where the model has no bytes or adds a space before every text."""
  ids = [processor.piece_to_id(f'<0x{byte:02X}>') for byte in LOWER_BAR.encode()]
  adds_prefix = processor.encode('a', out_type=str)[0].startswith(LOWER_BAR)
  return ids if all(processor.is_byte(i) for i in ids) and not adds_prefix else []


def _load_sentencepiece(path, eos_token):
  content = path.read_bytes()
  processor = sentencepiece.SentencePieceProcessor(model_proto=content)
  eos_id = processor.eos_id() if eos_token is None else processor.piece_to_id(eos_token)
  if eos_id in (-1, processor.unk_id()):
    raise ValueError(f'{path}: no end-of-text token {eos_token or ""}; pass eos_token=, one of the model\'s pieces')
  pad_id = processor.pad_id() if processor.pad_id() >= 0 else eos_id
  bos_id = processor.bos_id() if processor.bos_id() >= 0 else None
  special = {i for i in range(processor.vocab_size()) if processor.is_control(i) or processor.is_unknown(i)} | {eos_id}
  return Tokenizer(
      name=str(path),
      vocab_size=processor.vocab_size(),
      eos_id=eos_id,
      pad_id=pad_id,
      bos_id=bos_id,
      fingerprint=_fingerprint(content, eos_id, pad_id, bos_id),
      encode=functools.partial(_encode_pieces, processor, _lower_bar_ids(processor)),
      decode=functools.partial(_decode_pieces, processor, frozenset(special)),
  )


def train_sentencepiece(
    texts: Iterable[str],
    path,
    *,
    vocab_size,
    model_type='bpe',
    split_by_whitespace=True,
    symbols=(),
    character_coverage=0.9999,
    max_lines=1_000_000,
    seed=0,
) -> str:
  """Trains a SentencePiece model that is lossless on every text, and deterministic.

  Digits are split. Bytes stand in for rare characters. Nothing is normalised: spaces and newlines survive, and the
  newline is a token of its own. Ids: 0 padding, 1 end of text, 2 unknown (never produced), then symbols and bytes.

  Args:
    texts: training texts.
    path: where to write the model; its folder is created.
    vocab_size: number of pieces; at least 260 + len(symbols) + the characters covered.
    model_type: 'bpe' or 'unigram'.
    split_by_whitespace: False lets pieces cross spaces, which shortens boilerplate (never across newlines).
    symbols: further strings that are always one token, such as '<think>'.
    character_coverage: share of the text's characters that get a piece rather than bytes.
    max_lines: at most this many lines are used, chosen by `seed`.

  Returns:
    The path.

  Raises:
    ValueError: no text, or a vocab_size that the texts cannot fill or cannot fit into.
  """
  lines = [line for text in texts for line in text.split('\n') if line]
  if not lines:
    raise ValueError(f'no text to train the tokenizer {path} on; give at least one non-empty text')
  if len(lines) > max_lines:
    keep = np.argsort(np.random.PCG64(seed).random_raw(len(lines)), kind='stable')[:max_lines]
    lines = [lines[i] for i in sorted(keep)]
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=vocab_size,
        model_type=model_type,
        split_by_whitespace=split_by_whitespace,
        user_defined_symbols=['\n', *symbols],
        character_coverage=character_coverage,
        split_digits=True,
        byte_fallback=True,
        normalization_rule_name='identity',
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        max_sentence_length=max(9, *(len(line.encode()) for line in lines)) + 1,  # longer lines would be dropped
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,  # the sums of unigram training depend on the number of threads
        minloglevel=2,
    )
  except RuntimeError as error:
    raise ValueError(f'vocab_size {vocab_size} does not suit the texts for {path}: {error}') from error
  return _write_atomically(path, model.getvalue())


def _write_atomically(path, content):
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'{path.name}.{os.getpid()}.partial')
  partial.write_bytes(content)
  os.replace(partial, path)
  return str(path)


def _encode_hugging_face(tokenizer, text):
  return tokenizer.encode(text, add_special_tokens=False).ids


def _decode_hugging_face(tokenizer, eos_id, ids):
  return tokenizer.decode([int(i) for i in ids if i >= 0 and i != eos_id], skip_special_tokens=True)


def _named_special_tokens(folder):
  """{'eos_token': spelling, ...} from the files beside a tokenizer.json."""
  named = {}
  for name in ('special_tokens_map.json', 'tokenizer_config.json'):
    if (folder / name).is_file():
      entries = json.loads((folder / name).read_text(encoding='utf-8'))
      for key in ('eos_token', 'pad_token', 'bos_token'):
        value = entries.get(key)
        named[key] = (value['content'] if isinstance(value, dict) else value) or named.get(key)
  return named


def _load_hugging_face(path, eos_token):
  content = path.read_bytes()
  tokenizer = tokenizers.Tokenizer.from_str(content.decode('utf-8'))
  tokenizer.no_truncation()  # some published files cut and pad to the length of their last training run
  tokenizer.no_padding()
  named = _named_special_tokens(path.parent)
  eos_token = eos_token or named.get('eos_token')
  eos_id = tokenizer.token_to_id(eos_token) if eos_token else None
  if eos_id is None:
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    raise ValueError(f'{path}: no end-of-text token {eos_token or ""}; pass eos_token=, one of {special[:20]}')
  pad_id = tokenizer.token_to_id(named['pad_token']) if named.get('pad_token') else None
  pad_id = eos_id if pad_id is None else pad_id
  bos_id = tokenizer.token_to_id(named['bos_token']) if named.get('bos_token') else None
  return Tokenizer(
      name=str(path),
      vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
      eos_id=eos_id,
      pad_id=pad_id,
      bos_id=bos_id,
      fingerprint=_fingerprint(content, eos_id, pad_id, bos_id),
      encode=functools.partial(_encode_hugging_face, tokenizer),
      decode=functools.partial(_decode_hugging_face, tokenizer, eos_id),
  )
