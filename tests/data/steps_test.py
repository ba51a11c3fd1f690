"""Where steps end: in characters, and in tokens that may hold half a character or half a step."""

import pytest

from srm_jax.data import steps, tokenizer
from tests.data import chats

BYTES = tokenizer.load('byte')


def pieces(text, ends):
  return [text[start:end] for start, end in zip([0, *ends], ends)]


@pytest.mark.parametrize('text, expected', [
    ('', []), ('\n \n', []), ('a', ['a']), ('a\nb\n', ['a\n', 'b\n']), ('a\n\nb', ['a\n', '\nb']),
    (' 3+4=7\n#### 7', [' 3+4=7\n', '#### 7']),
])
def test_lines(text, expected):
  assert pieces(text, steps.lines(text)) == expected


@pytest.mark.parametrize('text, expected', [
    ('', []), ('15 4', ['1', '5', ' 4']), ('15\n#### 12', ['1', '5', '\n#### 12']), ('é\n', ['é']),
])
def test_characters(text, expected):
  assert pieces(text, steps.characters(text)) == expected


@pytest.mark.parametrize('name', steps.SEGMENTATIONS)
def test_ends_ascend_and_lie_in_the_text(name):
  text = '3 + 4 = 7 €\n\n 7 − 1 = 6\n#### 6\n'
  ends = steps.SEGMENTATIONS[name](text)
  assert ends == sorted(set(ends)) and 0 < ends[0] and ends[-1] <= len(text)


def test_a_step_ends_with_the_last_byte_of_its_last_character():
  text = '2 €\n½ 😀\nx'
  tokens = BYTES.encode(text)
  ends = steps.step_tokens(BYTES, tokens, steps.lines)
  assert [bytes(tokens[: end + 1]).decode() for end in ends] == ['2 €\n', '2 €\n½ 😀\n', text]
  euro = steps.step_tokens(BYTES, tokens, steps.characters)[1]
  assert bytes(tokens[: euro + 1]) == '2 €'.encode()


def test_end_of_text_belongs_to_no_step():
  assert steps.step_tokens(BYTES, [*BYTES.encode('a\nb'), BYTES.eos_id], steps.lines) == [1, 2]
  assert steps.step_tokens(BYTES, [BYTES.eos_id], steps.lines) == steps.step_tokens(BYTES, [], steps.lines) == []


def test_sampled_bytes_that_are_no_text_stand_for_themselves():
  cut = list('a\n€'.encode())[:-1]
  assert steps.step_tokens(BYTES, cut, steps.lines) == [1, 3]
  assert steps.step_tokens(BYTES, [0xFF, ord('\n'), ord('b')], steps.lines) == [1, 2]


def test_tokens_of_several_characters(tmp_path):
  """Every prefix of a real vocabulary's tokens, up to a step's token and not one before, holds the step."""
  loaded = tokenizer.load(chats.save_family(tmp_path, 'qwen2_5'))
  text = 'the sum is 12\n\nthat is ½ of 24 €\n#### 12'
  tokens = loaded.encode(text)
  for segment in steps.SEGMENTATIONS.values():
    ends = segment(text)
    for end, place in zip(ends, steps.tokens_at(loaded, tokens, text, ends), strict=True):
      assert loaded.decode(tokens[: place + 1]).startswith(text[:end])
      assert not loaded.decode(tokens[:place]).startswith(text[:end])


def test_the_text_may_begin_behind_other_tokens():
  assert steps.tokens_at(BYTES, BYTES.encode(' a\nb'), 'a\nb', [2, 3]) == [2, 3]


def test_another_text_is_refused():
  with pytest.raises(ValueError, match="tokenizer byte does not give back the text 'é'"):
    steps.tokens_at(BYTES, BYTES.encode('e'), 'é', [1])
