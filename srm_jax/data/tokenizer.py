"""Tokenizers behind one record: bytes, SentencePiece models, Hugging Face tokenizer.json files.

Prompt and completion are always encoded separately and concatenated, in training as in sampling, so a token never
straddles the border and the first completion token is the same in both.
"""

import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import sentencepiece
import tokenizers
from etils import epath

BYTE_MARK = 'byte'  # a folder with a file of this name holds the byte tokenizer
LOWER_BAR, BYTE_SPACE = '\u2581', '\u0120'  # SentencePiece's and byte-level BPE's own spellings of a space
SPECIAL_TOKENS = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token')
COMPANIONS = ('tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json', 'chat_template.jinja')
NONE = MappingProxyType({})


class Tokenizer(NamedTuple):
  """Text to ids and back.

  encode(text) -> list of ids without special tokens: their spellings are plain text, so that '<|im_end|>' in a problem
  ends nothing. Added tokens that the file does not mark as special (Qwen3's '<think>') are one id, as where the model
  sampled them. decode(ids) -> text; special ids and ids past the vocabulary (models pad their embedding) are skipped,
  so decode(encode(text)) == text. pad_id may equal eos_id: masks come from lengths. fingerprint: hash of the
  vocabulary and special ids, equal where two tokenizers are interchangeable.

  end_ids: all ids that end a text, eos_id first (Llama 3 has three). special_tokens, added_tokens: spelling -> id, of
  the tokens that `encode` never and always makes from their spelling. encode_rendered(text) -> (ids, spans) of text
  that a chat template wrote: special tokens are recognised; spans[i] = (start, end) are the characters of ids[i]. All
  three only of a tokenizer.json. vocabulary: hash of all (id, piece), see `same_vocabulary`. prefix_ids: what the
  model's own tokenizer puts before every text (Llama 3's and Gemma's bos), and `encode` does not.
  """

  name: str
  vocab_size: int
  eos_id: int
  pad_id: int
  bos_id: int | None
  fingerprint: str
  encode: Callable[[str], list[int]]
  decode: Callable[[Sequence[int]], str]
  end_ids: tuple[int, ...] = ()
  special_tokens: Mapping[str, int] = NONE
  added_tokens: Mapping[str, int] = NONE
  encode_rendered: Callable[[str], tuple[list[int], list[tuple[int, int]]]] | None = None
  vocabulary: str = ''
  prefix_ids: tuple[int, ...] = ()


def load(path_or_name, *, eos_token=None) -> Tokenizer:
  """Loads a tokenizer.

  Args:
    path_or_name: 'byte', a SentencePiece `.model`, a Hugging Face `tokenizer.json`, or a folder with one of the two.
      The files that Hugging Face keeps beside a tokenizer.json name its special tokens and end-of-text ids.
    eos_token: spelling of the end-of-text token, where the files name none or another one is wanted.

  Raises:
    ValueError: unknown name, a file that is cut or not what its name says, or no end-of-text token.
  """
  if str(path_or_name) == 'byte' or (epath.Path(path_or_name) / BYTE_MARK).is_file():
    return _byte_tokenizer()
  path = _tokenizer_file(epath.Path(path_or_name))
  return (_load_hugging_face if path.suffix == '.json' else _load_sentencepiece)(path, eos_token)


def copy(path_or_name, folder):
  """Puts a tokenizer's files into a folder of its own, which `load` then reads."""
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  if load(path_or_name).name == 'byte':
    (folder / BYTE_MARK).touch()
    return
  path = _tokenizer_file(epath.Path(path_or_name))
  target = folder / ('tokenizer.json' if path.suffix == '.json' else 'tokenizer.model')
  target.write_bytes(path.read_bytes())
  for name in COMPANIONS:
    if (path.parent / name).is_file():
      (folder / name).write_bytes((path.parent / name).read_bytes())


def same_vocabulary(first: Tokenizer, second: Tokenizer) -> bool:
  """Whether every id means the same piece in both, so that one model can score what the other one sampled.

  Rows with which a model pads its embedding are no part of the vocabulary: Qwen2.5 of 0.5B (151936 rows) and of 7B
  (152064) share one. Neither are end-of-text ids and the order of a file's entries, so fingerprints may still differ.
  """
  return bool(first.vocabulary) and first.vocabulary == second.vocabulary


def require_rows(tokenizer: Tokenizer, rows, *, model='the model'):
  """Checks that a model's embedding has a row for every id; further rows are padding.

  Raises:
    ValueError: the tokenizer has ids past the last row. `model` names the model in the message.
  """
  if tokenizer.vocab_size > rows:
    raise ValueError(
        f'{model} has {rows} embedding rows, but tokenizer {tokenizer.name} has ids up to {tokenizer.vocab_size - 1}; '
        f"fix: use the tokenizer from the model's own folder, or a model with at least {tokenizer.vocab_size} rows"
    )


def named_special_tokens(folder) -> dict[str, str]:
  """{'eos_token': spelling, ...} from the files beside a tokenizer.json; tokenizer_config.json has the last word."""
  named = {}
  for name in ('special_tokens_map.json', 'tokenizer_config.json'):
    entries = read_json(epath.Path(folder) / name)
    for key in SPECIAL_TOKENS:
      value = entries.get(key)
      value = value.get('content') if isinstance(value, dict) else value
      if isinstance(value, str) and value:
        named[key] = value
  return named


def read_json(path) -> dict:
  """A JSON object from a file, empty where there is none. Raises ValueError where the file is cut or something else."""
  if not path.is_file():
    return {}
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path}: not readable as JSON ({error}); fix: copy the file again, it may be cut') from error
  if not isinstance(value, dict):
    raise ValueError(f'{path}: holds a {type(value).__name__}, expected a JSON object; fix: copy the file again')
  return value


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


def _hash_vocabulary(pieces: Mapping[str, int]):
  ordered = sorted((number, piece) for piece, number in pieces.items())
  return hashlib.sha256('\0'.join(f'{number} {piece}' for number, piece in ordered).encode()).hexdigest()[:16]


def _encode_bytes(text):
  return list(text.encode('utf-8'))


def _decode_bytes(ids):
  return bytes(int(i) for i in ids if 0 <= i < 256).decode('utf-8', errors='replace')


def _byte_tokenizer():
  eos_id, pad_id = 256, 257
  fingerprint = _fingerprint(b'byte', eos_id, pad_id, None)
  return Tokenizer(
      'byte', 258, eos_id, pad_id, None, fingerprint, _encode_bytes, _decode_bytes, (eos_id,), vocabulary='byte'
  )


def _encode_pieces(processor, spelled, text):
  if not any(part in text for part in spelled):
    return processor.encode(text)
  parts = re.split(f'({"|".join(map(re.escape, spelled))})', text)
  return sum((spelled.get(part) or processor.encode(part) for part in parts), [])


def _decode_pieces(processor, special_ids, ids):
  size = processor.vocab_size()
  return processor.decode([int(i) for i in ids if 0 <= i < size and int(i) not in special_ids])


def _lower_bar_ids(processor):
  """Byte ids of a literal lower bar; empty where the model has no bytes or adds a space before every text."""
  ids = [processor.piece_to_id(f'<0x{byte:02X}>') for byte in LOWER_BAR.encode()]
  adds_prefix = processor.encode('a', out_type=str)[0].startswith(LOWER_BAR)
  return ids if all(processor.is_byte(i) for i in ids) and not adds_prefix else []


def _spelled_out(processor, eos_id):
  """{text: its ids} where SentencePiece itself would not encode the text as text."""
  # A literal lower bar would come back as a space: where the model has byte pieces, it is spelled in bytes.
  # An end-of-text token that is a user-defined symbol would be recognised in any text: it is encoded in halves.
  spelled, eos = {LOWER_BAR: _lower_bar_ids(processor)}, processor.id_to_piece(eos_id)
  if eos_id in processor.encode(eos):
    spelled[eos] = processor.encode(eos[:1]) + processor.encode(eos[1:])
  return {text: ids for text, ids in spelled.items() if ids}


def _load_sentencepiece(path, eos_token):
  content = path.read_bytes()
  try:
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
  except RuntimeError as error:
    raise ValueError(f'{path}: not a SentencePiece model ({error}); fix: copy it again, it may be cut') from error
  eos_id = processor.eos_id() if eos_token is None else processor.piece_to_id(eos_token)
  if eos_id in (-1, processor.unk_id()):
    raise ValueError(f'{path}: no end-of-text token {eos_token or ""}; pass eos_token=, one of the model\'s pieces')
  pad_id = processor.pad_id() if processor.pad_id() >= 0 else eos_id
  bos_id = processor.bos_id() if processor.bos_id() >= 0 else None
  size = processor.vocab_size()
  special = {i for i in range(size) if processor.is_control(i) or processor.is_unknown(i)} | {eos_id}
  return Tokenizer(
      name=str(path), vocab_size=size, eos_id=eos_id, pad_id=pad_id, bos_id=bos_id,
      fingerprint=_fingerprint(content, eos_id, pad_id, bos_id),
      encode=functools.partial(_encode_pieces, processor, _spelled_out(processor, eos_id)),
      decode=functools.partial(_decode_pieces, processor, frozenset(special)),
      end_ids=(eos_id,),
      vocabulary=_hash_vocabulary({processor.id_to_piece(i): i for i in range(size)}),
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
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'{path.name}.{os.getpid()}.partial')
  partial.write_bytes(content)
  os.replace(partial, path)
  return str(path)


def _encode_hugging_face(tokenizer, special, text):
  ids = tokenizer.encode(text, add_special_tokens=False).ids
  # A model whose own pieces include the spelling (Unigram's '</s>') yields it without looking at added tokens.
  found = [] if special.isdisjoint(ids) else [tokenizer.id_to_token(i) for i in special.intersection(ids)]
  if any(spelling in text for spelling in found):  # not an unknown piece, which may be special too
    raise ValueError(f'the tokenizer makes special tokens of {found} in plain text {text[:60]!r}; fix: drop that text')
  return ids


def _decode_hugging_face(tokenizer, end_ids, ids):
  return tokenizer.decode([int(i) for i in ids if i >= 0 and i not in end_ids], skip_special_tokens=True)


def _rendered_encoder(tokenizer):
  """See Tokenizer.encode_rendered; None where every text gets a space in front: then segments do not concatenate."""
  if ''.join(tokenizer.encode('a', add_special_tokens=False).tokens).startswith((LOWER_BAR, BYTE_SPACE)):
    return None

  @functools.cache  # a copy, as threads share the setting; made by the first chat (0.9 s, 70 MB for 150k pieces)
  def recognising():
    copied = deepcopy(tokenizer)
    copied.encode_special_tokens = False
    return copied

  def encode_rendered(text):
    encoding = recognising().encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets

  return encode_rendered


def _read_hugging_face(path, content):
  try:
    tokenizer = tokenizers.Tokenizer.from_str(content.decode('utf-8'))
  except Exception as error:  # the library raises no narrower class
    raise ValueError(f'{path}: not a tokenizer.json ({error}); fix: copy it again, it may be cut') from error
  tokenizer.no_truncation()  # some published files cut and pad to the length of their last training run
  tokenizer.no_padding()
  tokenizer.encode_special_tokens = True  # as text: what `encode` gets was written by others
  return tokenizer


def _prefix_ids(tokenizer):
  bare, whole = (tokenizer.encode('a', add_special_tokens=flag).ids for flag in (False, True))
  starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
  return tuple(whole[: next(starts, 0)])


def _end_ids(path, tokenizer, eos_id):
  """eos_id (where there is one), then further ids of eos_token_id in generation_config.json."""
  place = path.parent / 'generation_config.json'
  listed = read_json(place).get('eos_token_id')
  listed = listed if isinstance(listed, list) else [listed] * (listed is not None)
  for number in listed:
    if not isinstance(number, int) or tokenizer.id_to_token(number) is None:
      raise ValueError(f'{place}: eos_token_id {number} is no id of {path}; fix: take both files from one model')
  return tuple(dict.fromkeys([*([] if eos_id is None else [eos_id]), *listed]))


def _load_hugging_face(path, eos_token):
  content = path.read_bytes()
  tokenizer = _read_hugging_face(path, content)
  named = named_special_tokens(path.parent)
  ids = {key: tokenizer.token_to_id(spelling) for key, spelling in named.items()}
  end_ids = _end_ids(path, tokenizer, tokenizer.token_to_id(eos_token) if eos_token else ids.get('eos_token'))
  if not end_ids or (eos_token and tokenizer.token_to_id(eos_token) is None):
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    missing = eos_token or named.get('eos_token', '')
    raise ValueError(f'{path}: no end-of-text token {missing}; pass eos_token=, one of {special[:20]}')
  eos_id, bos_id = end_ids[0], ids.get('bos_token')
  pad_id = eos_id if ids.get('pad_token') is None else ids['pad_token']
  added = tokenizer.get_added_tokens_decoder()
  tokenizer.add_special_tokens([added[i] for i in end_ids if i in added])  # some files leave these ordinary tokens
  added = {token.content: (i, token.special) for i, token in tokenizer.get_added_tokens_decoder().items()}
  special = {spelling: i for spelling, (i, is_special) in added.items() if is_special}
  vocabulary = tokenizer.get_vocab(with_added_tokens=True)
  return Tokenizer(
      name=str(path),
      vocab_size=max(vocabulary.values()) + 1,
      eos_id=eos_id,
      pad_id=pad_id,
      bos_id=bos_id,
      fingerprint=_fingerprint(content, eos_id, pad_id, bos_id, *end_ids[1:]),
      encode=functools.partial(_encode_hugging_face, tokenizer, frozenset(special.values())),
      decode=functools.partial(_decode_hugging_face, tokenizer, frozenset(end_ids)),
      end_ids=end_ids,
      special_tokens=special,
      added_tokens={spelling: i for spelling, (i, is_special) in added.items() if not is_special},
      encode_rendered=_rendered_encoder(tokenizer),
      vocabulary=_hash_vocabulary(vocabulary),
      prefix_ids=_prefix_ids(tokenizer),
  )
