import json
import pathlib
import random
import re
import unicodedata

import pytest
import tokenizers

from srm_jax.data import token_bytes, tokenizer
from tests.data import chats
from tests.data.vocabularies import HARD, TEXTS, byte_fallback, byte_level, random_texts, save

ALL_TEXTS = HARD + random_texts()


def spelled(loaded, text):
  return b''.join(token_bytes.token_bytes(loaded, loaded.encode(text)))


@pytest.fixture(scope='module', params=['byte', 'bpe', 'unigram', 'byte level', 'byte level large', *chats.FAMILIES])
def lossless(request, tmp_path_factory):
  name, folder = request.param, tmp_path_factory.mktemp('tokenizer')
  if name == 'byte':
    return tokenizer.load('byte')
  if name in ('bpe', 'unigram'):
    path = tokenizer.train_sentencepiece(
        TEXTS, folder / 'a.model', vocab_size=340 if name == 'bpe' else 306, model_type=name, symbols=('<think>',)
    )
    return tokenizer.load(path)
  if name.startswith('byte level'):
    return tokenizer.load(save(folder, byte_level(280 if name == 'byte level' else 360)))
  return tokenizer.load(chats.save_family(folder, name))


def test_runs_of_whole_characters_spell_the_text(lossless):
  split = 0
  for text in TEXTS[:5] + [text for text in HARD if text]:
    ids = lossless.encode(text)
    runs = token_bytes.whole_characters(lossless, ids)
    assert ''.join(part for part, _ in runs) == text and sum(count for _, count in runs) == len(ids)
    split += sum(count > 1 for _, count in runs)
    assert all(count <= 4 for _, count in runs)  # no character has more bytes
  assert split or lossless.name.endswith('.model')


def test_what_is_no_character_ends_a_run():
  loaded = tokenizer.load('byte')
  cases = {
      (195, 169, 65): [('é', 2), ('A', 1)], (195, 65): [('\ufffdA', 2)], (65, 195): [('A', 1), ('\ufffd', 1)],
      (195, loaded.eos_id, 169): [('\ufffd', 1), ('', 1), ('\ufffd', 1)], (): [], (loaded.eos_id,): [('', 1)],
  }
  for ids, runs in cases.items():
    assert token_bytes.whole_characters(loaded, ids) == runs


def test_pieces_spell_the_text(lossless):
  decomposed = [unicodedata.normalize('NFD', text) for text in TEXTS[:5]]
  for text in ALL_TEXTS + TEXTS[:20] + ['<think>1</think>'] + decomposed:
    assert spelled(lossless, text) == text.encode(), text


def test_pieces_are_what_decode_writes(lossless):
  generator = random.Random(1)
  ends = [*lossless.end_ids, *lossless.special_tokens.values(), lossless.vocab_size, lossless.vocab_size + 9, -1]
  for text in ALL_TEXTS:
    ids = lossless.encode(text)
    for end in generator.sample(ends, min(3, len(ends))):
      ids.insert(generator.randrange(len(ids) + 1), end)
    pieces = token_bytes.token_bytes(lossless, ids)
    assert len(pieces) == len(ids) and b''.join(pieces).decode() == lossless.decode(ids) == text
  assert token_bytes.token_bytes(lossless, ends) == [b''] * len(ends)
  assert len(token_bytes.vocabulary_bytes(lossless)) == lossless.vocab_size


def test_every_id_alone_is_what_decode_writes(lossless):
  table = token_bytes.vocabulary_bytes(lossless)
  replaced = 0
  for i, piece in enumerate(table):
    try:
      assert lossless.decode([i]) == piece.decode(), i
    except UnicodeDecodeError:  # part of a character: there is no text to compare with
      replaced += 1
      assert '\ufffd' in lossless.decode([i])
  assert 120 < replaced < 140  # every byte above 127, and few merges of them


def test_tokens_cut_characters(lossless):
  pieces = token_bytes.token_bytes(lossless, lossless.encode('\U0001f9ff'))
  assert len(pieces) > 1 and b''.join(pieces) == '\U0001f9ff'.encode()


@pytest.mark.parametrize('strip', [(), (tokenizers.decoders.Strip(' ', 1, 0),)])
def test_byte_pieces_of_a_tokenizer_json(strip, tmp_path):
  normalizer = (tokenizers.normalizers.Prepend('\u2581'),) if strip else ()
  loaded = tokenizer.load(save(tmp_path, byte_fallback(decoder=strip, normalizer=normalizer)))
  front = b' ' if strip else b''
  for text in filter(None, ALL_TEXTS):
    if '\u2581' not in text and '<0x' not in text:  # this kind reads the former as a space, the latter as a byte
      assert spelled(loaded, text) == front + text.encode(), text
      assert loaded.decode(loaded.encode(text)) == text
  assert spelled(loaded, 'x\u2581y') == front + b'x y'


def test_an_ordinary_piece_may_end_a_text(tmp_path):
  loaded = tokenizer.load(save(tmp_path, byte_level(280)), eos_token='!')
  assert token_bytes.token_bytes(loaded, [*loaded.encode('a'), loaded.eos_id]) == [b'a', b'']


def test_metaspace(tmp_path):
  vocabulary = [('<unk>', 0.0), *((letter, -2.0) for letter in 'abc_'), ('_ab', -1.0)]
  model = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, 0))
  model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace('_', prepend_scheme='always')
  model.decoder = tokenizers.decoders.Metaspace('_', prepend_scheme='always')
  loaded = tokenizer.load(save(tmp_path, model))
  assert token_bytes.token_bytes(loaded, loaded.encode('ab  c')) == [b' ab', b' ', b' ', b'c']
  assert loaded.decode(loaded.encode('ab  c')) == 'ab  c'


def test_normalization_is_the_tokenizers_loss(tmp_path):
  model = byte_level(300)
  model.normalizer = tokenizers.normalizers.NFC()
  loaded = tokenizer.load(save(tmp_path, model))
  for text in ALL_TEXTS:
    assert spelled(loaded, text) == unicodedata.normalize('NFC', text).encode(), text


def test_alphabet_is_that_of_the_library():
  model = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  assert set(token_bytes._alphabet()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  assert token_bytes._from_alphabet('日本') == '日本'.encode()  # no spelling of bytes: plain text
  for text in HARD[1:]:
    assert token_bytes._from_alphabet(model.pre_tokenize_str(text)[0][0]) == text.encode()


def test_added_tokens_are_spelled_as_written(tmp_path):
  model = byte_level(280)
  model.add_tokens(['<thé>', '日本 語', '\u0120x'])
  loaded = tokenizer.load(save(tmp_path, model))
  text = 'a<thé>b 日本 語\u0120x'
  assert spelled(loaded, text) == text.encode()
  assert {loaded.added_tokens[token] for token in ('<thé>', '日本 語', '\u0120x')} <= set(loaded.encode(text))


@pytest.mark.parametrize('decoder', [
    tokenizers.decoders.WordPiece(),
    tokenizers.decoders.Sequence([tokenizers.decoders.Replace(tokenizers.Regex('_+'), ' ')]),
    None,
])  # fmt: skip
def test_decoders_that_look_around_are_refused(decoder, tmp_path):
  model = byte_level(280)
  if decoder is not None:
    model.decoder = decoder
  content = save(tmp_path, model) / 'tokenizer.json'
  if decoder is None:
    content.write_text(json.dumps({**json.loads(content.read_text()), 'decoder': None}))
  with pytest.raises(ValueError, match='tokenizer.json: decoder .* fix: use a tokenizer whose'):
    token_bytes.vocabulary_bytes(tokenizer.load(tmp_path))


def test_files_that_are_gone_or_others_by_now(tmp_path):
  small, large = (save(tmp_path / str(size), byte_level(size)) for size in (280, 281))
  loaded, gone = tokenizer.load(small), tokenizer.load(small, eos_token='a')
  (small / 'tokenizer.json').write_bytes((large / 'tokenizer.json').read_bytes())
  with pytest.raises(ValueError, match='has ids up to 281, had 281 when it was loaded; fix: load'):
    token_bytes.vocabulary_bytes(loaded)
  now = tokenizer.load(small)
  assert spelled(now, 'zebra') == b'zebra'
  shifted = byte_level(280)
  shifted.add_tokens(['zebra'])
  save(small, shifted)  # the same path and size, other ids
  later = tokenizer.load(small)
  assert spelled(later, 'zebra') == b'zebra' and later.vocab_size == now.vocab_size
  assert token_bytes.vocabulary_bytes(later) != token_bytes.vocabulary_bytes(now)
  pathlib.Path(small / 'tokenizer.json').unlink()
  with pytest.raises(ValueError, match=re.escape(str(small)) + '.*is gone since'):
    token_bytes.vocabulary_bytes(gone)
  assert spelled(now, 'zebra') == b'zebra'  # read once
