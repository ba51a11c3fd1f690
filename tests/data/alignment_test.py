import random
import unicodedata

import numpy as np
import pytest
import tokenizers

from srm_jax.data import alignment, packing, token_bytes, tokenizer
from srm_jax.data.alignment import END
from tests.data import chats
from tests.data.vocabularies import HARD, TEXTS, byte_fallback, byte_level, random_texts, save

MODELS = ['byte', 'bpe', 'small', 'large', 'llama3', 'qwen3']
PAIRS = [('bpe', 'large'), ('byte', 'bpe'), ('llama3', 'small'), ('small', 'large'), ('qwen3', 'byte'), ('bpe', 'bpe')]


@pytest.fixture(scope='module')
def loaded(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tokenizers')
  pieces = tokenizer.train_sentencepiece(TEXTS, folder / 'bpe.model', vocab_size=340)
  return {
      'byte': tokenizer.load('byte'),
      'bpe': tokenizer.load(pieces),
      'small': tokenizer.load(save(folder / 'small', byte_level(290))),
      'large': tokenizer.load(save(folder / 'large', byte_level(400), special=('<|end|>',))),
      'llama3': tokenizer.load(chats.save_family(folder / 'llama3', 'llama3')),
      'qwen3': tokenizer.load(chats.save_family(folder / 'qwen3', 'qwen3')),
  }


def pieces_of(tokenizer_, text):
  return [*token_bytes.token_bytes(tokenizer_, tokenizer_.encode(text)), END]


def walk(student, teacher):
  """Groups by two pointers: the side that has spelled less gives its next token."""
  groups, i, j, ours, theirs = [], 0, 0, b'', b''
  first = (0, 0)
  while i < len(student) or j < len(teacher):
    if len(ours) <= len(theirs) and i < len(student):
      ours, i = ours + student[i], i + 1
    else:
      theirs, j = theirs + teacher[j], j + 1
    if ours == theirs and (i, j) != first:
      groups.append((list(range(first[0], i)), list(range(first[1], j))))
      first = (i, j)
  return groups


def as_lists(*sides):
  count = max([*sides[0], *sides[1]], default=-1) + 1
  return [tuple(np.flatnonzero(groups == number).tolist() for groups in sides) for number in range(count)]


def test_by_hand():
  student = [b'ant', b'elope', b' is', b'.', END]
  teacher = [b'antelope', b' ', b'is', b'.', END]
  groups = alignment.align(student, teacher)
  np.testing.assert_array_equal(groups[0], [0, 0, 1, 2, 3])
  np.testing.assert_array_equal(groups[1], [0, 1, 1, 2, 3])
  np.testing.assert_array_equal(groups[2], [False, False, True, True])
  assert groups[0].dtype == groups[1].dtype == np.int32 and groups[2].dtype == bool


def test_a_single_common_border_makes_a_single_group():
  groups = alignment.align([b'ab', b'cd', b'e'], [b'a', b'bc', b'de'])
  assert as_lists(*groups[:2]) == [([0, 1, 2], [0, 1, 2])] and not groups[2].any()
  assert [len(x) for x in alignment.align([], [])] == [0, 0, 0]
  assert [x.tolist() for x in alignment.align([b'', b''], [b''])] == [[-1, -1], [-1], []]


@pytest.mark.parametrize('names', PAIRS)
def test_real_tokenizers_against_two_pointers(names, loaded):
  sizes = []
  for text in HARD + random_texts() + TEXTS[:30]:
    student, teacher = (pieces_of(loaded[name], text) for name in names)
    *groups, exact = alignment.align(student, teacher)
    expected = walk(student, teacher)
    assert as_lists(*groups) == expected
    for single, (ours, theirs) in zip(exact, expected, strict=True):
      assert b''.join(student[i] for i in ours) == b''.join(teacher[j] for j in theirs)
      assert single == (len(ours) == len(theirs) == 1)
    sizes += [(len(ours), len(theirs)) for ours, theirs in expected]
  assert ((1, 1) in sizes) and (names == ('bpe', 'bpe')) == (set(sizes) == {(1, 1)})


def test_borders_inside_a_character():
  whole = '😀'.encode()
  groups = alignment.align([whole[:1], whole[1:3], whole[3:], b'a'], [whole[:3], whole[3:] + b'a'])
  assert as_lists(*groups[:2]) == [([0, 1], [0]), ([2, 3], [1])]


def test_tokens_without_bytes_are_in_no_group():
  student, teacher = [b'', b'a', b'', b'b', END], [b'a', b'b', b'', b'', END]
  student_groups, teacher_groups, exact = alignment.align(student, teacher)
  assert student_groups.tolist() == [-1, 0, -1, 1, 2] and teacher_groups.tolist() == [0, 1, -1, -1, 2]
  assert exact.all()
  found = alignment.align([b'', b'a'], [b'', b'', b'a', b''])
  assert [x.tolist() for x in found] == [[-1, 0], [-1, -1, 0, -1], [True]]


def test_a_space_in_front_of_one_side_is_no_difference():
  student, teacher = [b'Hello', b' you', END], [b' Hello', b' you', END]
  for ours, theirs in ((student, teacher), (teacher, student)):
    groups = alignment.align(ours, theirs)
    assert as_lists(*groups[:2]) == [([0], [0]), ([1], [1]), ([2], [2])]
    assert groups[2].tolist() == [False, True, True]
  groups = alignment.align([b'Hel', b'lo', END], [b' ', b'Hel', b'lo', END])
  assert groups[0].tolist() == [0, 1, 2] and groups[1].tolist() == [-1, 0, 1, 2] and groups[2].all()


@pytest.mark.parametrize('student, teacher, expected', [
    # normalised by one side, in the middle of a token and of a character
    (['a', ' e\u0301', ' b', 'c'], ['a', ' \u00e9', ' b', 'c'], [([0], [0]), ([2], [2]), ([3], [3])]),
    (['a', ' caf', 'e\u0301', 's', '.'], ['a caf', 'é', 's.'], [([0, 1], [0]), ([3, 4], [2])]),
    (['a', 'x', 'b'], ['a', 'yyy', 'b'], [([0], [0]), ([2], [2])]),
    (['a', 'x', 'b'], ['ay', 'yy', 'b'], [([2], [2])]),
    # text of one side only: at the start, inside and at the end
    ([' quick', ' fox'], ['e', ' quick', ' fox'], [([0], [1]), ([1], [2])]),
    ([' quick', ' fox'], ['e quick', ' fox'], [([1], [1])]),
    (['a', 'b'], ['a', 'x', 'b'], [([0], [0]), ([1], [2])]),
    (['ab', 'c'], ['a', 'x', 'b', 'c'], [([1], [3])]),
    (['a', 'b'], ['a', 'b', 'c'], [([0], [0]), ([1], [1])]),
    (['a', 'b'], ['a', 'bc'], [([0], [0])]),
    (['a', 'b'], [], []),
    (['a', 'b'], ['x', 'y'], []),
    (['a', ' ', 'b'], ['a', 'b'], [([0], [0]), ([2], [1])]),
])  # fmt: skip
def test_texts_that_differ(student, teacher, expected):
  ours, theirs = ([piece.encode() for piece in pieces] for pieces in (student, teacher))
  groups = alignment.align(ours, theirs)
  assert as_lists(*groups[:2]) == expected and len(groups[2]) == len(expected)
  swapped = alignment.align(theirs, ours)
  assert as_lists(*swapped[:2]) == [(j, i) for i, j in expected]


def test_texts_that_differ_in_one_place_by_chance(loaded):
  generator = random.Random(0)
  compared = 0
  for text in HARD + random_texts() + TEXTS[:20]:
    ours, theirs = pieces_of(loaded['bpe'], text), pieces_of(loaded['large'], text)
    place = generator.randrange(len(theirs))
    theirs[place] = generator.choice([b'\xfe', b'\xfe' * 5, theirs[place] + b'\xfe'])
    *groups, exact = alignment.align(ours, theirs)
    for student, teacher in as_lists(*groups):
      assert b''.join(ours[i] for i in student) == b''.join(theirs[j] for j in teacher)
    assert len(exact) == max(groups[0], default=-1) + 1
    compared += len(exact)
  assert compared > 1000


def test_a_normalizing_teacher(tmp_path, loaded):
  model = byte_level(300)
  model.normalizer = tokenizers.normalizers.NFC()
  teacher = tokenizer.load(save(tmp_path, model))
  text = 'An antelope in the ' + unicodedata.normalize('NFD', 'café') + ' is a rather tired ant.'
  ours, theirs = pieces_of(loaded['small'], text), pieces_of(teacher, text)
  assert b''.join(ours) != b''.join(theirs)
  student_groups, teacher_groups, _ = alignment.align(ours, theirs)
  left_out = b''.join(piece for piece, group in zip(ours, student_groups) if group < 0)
  assert left_out in ('e\u0301'.encode(), 'fe\u0301'.encode(), 'cafe\u0301'.encode(), ' cafe\u0301'.encode())


def test_a_teacher_that_puts_a_space_in_front(tmp_path, loaded):
  decoder, normalizer = (tokenizers.decoders.Strip(' ', 1, 0),), (tokenizers.normalizers.Prepend('\u2581'),)
  teacher = tokenizer.load(save(tmp_path, byte_fallback(decoder=decoder, normalizer=normalizer)))
  example = lambda of, text: packing.from_prompt_completion('a', of.encode('What?\n'), of.encode(text), of.eos_id)
  for text in ('Is it?', 'a', 'é', '4'):
    found = alignment.align_examples(example(loaded['byte'], text), example(teacher, text), loaded['byte'], teacher)
    assert alignment.coverage([found])['student_tokens'] == 1.0
    assert found.teacher_groups[-1] == found.student_groups[-1] == len(found.exact) - 1 > 0


def example(tokenizer_, text, *, id='a', prompt='Question:\n', front=(), finished=True):
  prompt_ids = [*front, *tokenizer_.encode(prompt)]
  return packing.from_prompt_completion(
      id, prompt_ids, tokenizer_.encode(text), tokenizer_.eos_id if finished else None
  )


def pair(loaded, text, *, names=('bpe', 'large'), **options):
  sides = [loaded[name] for name in names]
  return alignment.align_examples(*(example(side, text, **options) for side in sides), *sides)


@pytest.mark.parametrize('names', PAIRS)
def test_end_of_text_is_a_group_whatever_its_id(names, loaded):
  student, teacher = (loaded[name] for name in names)
  for text in ('', 'An antelope.'):
    found = pair(loaded, text, names=names)
    assert found.student.tokens[-1] == student.eos_id and found.teacher.tokens[-1] == teacher.eos_id
    assert found.student_groups[-1] == found.teacher_groups[-1] == len(found.exact) - 1 and found.exact[-1]
    cut = pair(loaded, text, names=names, finished=False) if text else None
    assert not text or (len(cut.exact) == len(found.exact) - 1 and cut.student_groups[-1] == len(cut.exact) - 1)


def test_any_end_of_text_id_ends_a_text(loaded):
  llama = loaded['llama3']
  ended = lambda end: packing.from_prompt_completion('a', llama.encode('x'), llama.encode('An ant') + [end], None)
  for end in llama.end_ids:
    found = alignment.align_examples(ended(end), example(loaded['bpe'], 'An ant'), llama, loaded['bpe'])
    assert found.student_groups[-1] == found.teacher_groups[-1] >= 0 and found.exact[-1]


def test_prompts_may_differ_and_a_bos_shifts_nothing(loaded):
  llama, small = loaded['llama3'], loaded['small']
  plain = alignment.align_examples(example(llama, TEXTS[3]), example(small, TEXTS[3]), llama, small)
  front = example(llama, TEXTS[3], front=(llama.bos_id,))
  for student, teacher, prompt in [
      (front, example(small, TEXTS[3]), 1), (front, example(small, TEXTS[3], prompt='<|user|> a longer prompt'), 1),
      (example(llama, TEXTS[3], prompt='x'), example(small, TEXTS[3]), None),
  ]:  # fmt: skip
    found = alignment.align_examples(student, teacher, llama, small)
    completion = lambda groups, of: groups[of.loss_mask].tolist()
    assert completion(found.student_groups, student) == completion(plain.student_groups, plain.student)
    assert completion(found.teacher_groups, teacher) == completion(plain.teacher_groups, plain.teacher)
    assert (found.student_groups[~student.loss_mask] == -1).all() and (found.exact == plain.exact).all()
    assert prompt is None or found.student_groups.tolist() == [-1] + plain.student_groups.tolist()


def test_plain_text_whose_first_token_nothing_predicts(loaded):
  student, teacher = loaded['large'], loaded['byte']
  text = 'An antelope is 9.'
  ours, theirs = (packing.from_text('a', of.encode(text), of.eos_id) for of in (student, teacher))
  found = alignment.align_examples(ours, theirs, student, teacher)
  pieces = token_bytes.token_bytes(student, ours.tokens.tolist())
  assert found.student_groups[0] == -1 and (found.student_groups[1:] >= 0).all()
  assert (found.teacher_groups[:len(pieces[0])] == -1).all() and (found.teacher_groups[len(pieces[0]):] >= 0).all()


def test_several_turns(loaded):
  """Two supervised answers in one example, with an end of turn each."""
  def chat(of):
    texts = [('Hi?', 0), ('An ant', 1), (None, 1), ('So?', 0), ('No é', 1)]
    parts = [([of.eos_id] if text is None else of.encode(text), mask) for text, mask in texts]
    tokens = np.concatenate([part for part, _ in parts]).astype(np.int32)
    return packing.Example('a', tokens, np.concatenate([[mask] * len(part) for part, mask in parts]).astype(bool))

  found = alignment.align_examples(chat(loaded['bpe']), chat(loaded['byte']), loaded['bpe'], loaded['byte'])
  assert alignment.coverage([found]) == {
      'groups': len(found.exact), 'exact': found.exact.mean(), 'student_tokens': 1.0, 'teacher_tokens': 1.0}
  turn = np.flatnonzero(found.student.tokens == loaded['bpe'].eos_id)[0]
  group = found.student_groups[turn]
  assert found.exact[group] and found.teacher.tokens[found.teacher_groups == group] == [loaded['byte'].eos_id]


# --- rows


def data_set(loaded, count=12, names=('bpe', 'large')):
  return [pair(loaded, TEXTS[i][: 12 + 7 * (i % 5)], names=names, id=f'{i}') for i in range(count)]


def groups_of_rows(batch, row):
  """{(student tokens, teacher tokens): exact} of a row, by the ids that the positions of a group predict."""
  found = {}
  for number in np.flatnonzero(batch.valid[row]):
    ours = batch.batch.targets[row][batch.student_groups[row] == number]
    theirs = batch.teacher.targets[row][batch.teacher_groups[row] == number]
    found[number] = (tuple(ours.tolist()), tuple(theirs.tolist()), bool(batch.exact[row, number]))
  return found


def test_rows_hold_the_groups_of_their_examples(loaded):
  aligned = data_set(loaded)
  bins = np.array([[3, 0, 5], [7, -1, -1], [1, 2, -1]])
  batch = alignment.lay_out(aligned, bins, student_length=130, teacher_length=120)
  assert batch.student_groups.shape == (3, 130) and batch.teacher_groups.shape == (3, 120)
  assert batch.valid.shape == batch.exact.shape == (3, 120) and batch.student_groups.dtype == np.int32
  for row in range(3):
    chosen = [aligned[i] for i in bins[row] if i >= 0]
    of = lambda example, groups, g: tuple(example.tokens[groups == g].tolist())
    expected = [
        (of(a.student, a.student_groups, g), of(a.teacher, a.teacher_groups, g), bool(a.exact[g]))
        for a in chosen for g in range(len(a.exact))
    ]
    found = groups_of_rows(batch, row)
    assert sorted(found.values()) == sorted(expected)
    assert list(found) == list(range(len(expected)))  # the first so many numbers
    assert list(found.values()) == sorted(expected, key=lambda group: group[2])  # exact ones last, else in order
  for groups, side in ((batch.student_groups, batch.batch), (batch.teacher_groups, batch.teacher)):
    np.testing.assert_array_equal(groups >= 0, side.loss_mask > 0)


def test_positions_predict_and_rows_are_those_of_packing(loaded):
  aligned = data_set(loaded, 2)
  batch = alignment.lay_out(aligned, [[0, 1]], student_length=150, teacher_length=140)
  for side, name in ((batch.batch, 'student'), (batch.teacher, 'teacher')):
    examples = [getattr(item, name) for item in aligned]
    expected = packing.pack(examples, np.array([[0, 1]]), side.inputs.shape[1])
    assert all(np.array_equal(x, y) for x, y in zip(side, expected))
    prompt = int(np.argmax(examples[0].loss_mask))
    groups = getattr(batch, f'{name}_groups')[0]
    assert (groups[: prompt - 1] == -1).all() and groups[prompt - 1] >= 0  # the last of the prompt predicts


def test_planned_rows_fit_both_sides(loaded):
  aligned = data_set(loaded, 40, names=('bpe', 'byte'))
  plan = alignment.planner(aligned, student_length=60, teacher_length=140, max_groups=50)
  lengths = [len(item.student.tokens) for item in aligned]
  bins = plan(lengths, 60, seed=(0, 1))
  batch = alignment.lay_out(aligned, bins, student_length=60, teacher_length=140, max_groups=50)
  assert sorted(bins[bins >= 0]) == list(range(40)) and (bins >= 0).sum(axis=1).max() > 1
  assert batch.valid.shape[1] == 50 and batch.valid.sum() == sum(len(item.exact) for item in aligned)
  np.testing.assert_array_equal(bins, plan(lengths, 60, seed=(0, 1)))
  assert not np.array_equal(bins, plan(lengths, 60, seed=(0, 2))) and plan.__name__ == 'plan_aligned'


def test_a_plan_never_fills_a_row_beyond_any_of_its_limits():
  generator = np.random.default_rng(0)
  example = lambda size: packing.Example('a', np.zeros(size, np.int32), np.zeros(size, bool))
  sizes = generator.integers(1, 12, size=(300, 3))
  aligned = [alignment.Aligned(example(i), example(j), None, None, np.zeros(k, bool)) for i, j, k in sizes]
  for limits in ((30, 30, 30), (97, 31, 60), (16, 60, 13), (40, 41, 300)):
    plan = alignment.planner(aligned, student_length=limits[0], teacher_length=limits[1], max_groups=limits[2])
    bins = plan(sizes[:, 0], limits[0], seed=(0,))
    filled = np.where(bins[..., None] >= 0, sizes[bins], 0).sum(axis=1)
    assert (filled <= limits).all() and (filled / limits).max(axis=1).mean() > 0.8


@pytest.mark.parametrize('name', ['student_length', 'teacher_length', 'max_groups'])
def test_an_example_that_does_not_fit_is_named(name, loaded):
  aligned = [pair(loaded, 'a', id='short'), pair(loaded, TEXTS[0], id='much')]
  sizes = [len(aligned[1].student.tokens), len(aligned[1].teacher.tokens), len(aligned[1].exact)]
  limits = dict(zip(('student_length', 'teacher_length', 'max_groups'), sizes))
  alignment.planner(aligned, **limits)
  with pytest.raises(ValueError, match=rf"id='much' takes {limits[name]} of {name} {limits[name] - 1}; fix: raise"):
    alignment.planner(aligned, **{**limits, name: limits[name] - 1})
  with pytest.raises(ValueError, match='data set is empty'):
    alignment.planner([], **limits)


def test_layout_errors(loaded):
  aligned = data_set(loaded, 3)
  lay = lambda limit: alignment.lay_out(
      aligned, [[-1, -1, -1], [0, 1, 2]], student_length=200, teacher_length=200, max_groups=limit
  )
  count = sum(len(item.exact) for item in aligned)
  assert lay(count).valid.sum(axis=1).tolist() == [0, count]
  with pytest.raises(ValueError, match=rf'row 1 of the bins has {count} groups, max_groups is {count - 1}; raise it'):
    lay(count - 1)
  with pytest.raises(ValueError, match='planned 3 examples in rows of 99, got 2 in 99'):
    alignment.planner(aligned, student_length=99, teacher_length=99)([5, 5], 99, seed=(0,))
  others = example(loaded['bpe'], 'xx', id='nothing', finished=False), example(loaded['byte'], 'yy')
  empty = alignment.align_examples(*others, loaded['bpe'], loaded['byte'])
  with pytest.raises(ValueError, match=r"no aligned group; its examples are \['nothing'\]; fix"):
    alignment.require_groups([empty, *aligned], np.array([[0, -1]]))
  alignment.require_groups([empty, *aligned], np.array([[0, 1]]))
  batch = alignment.lay_out([empty], [[0]], student_length=30, teacher_length=30)
  assert not batch.valid.any() and (batch.student_groups == -1).all()
  assert alignment.coverage([empty]) == {'groups': 0, 'exact': 0.0, 'student_tokens': 0.0, 'teacher_tokens': 0.0}


# --- vocabularies


@pytest.mark.parametrize('names', PAIRS)
def test_shared_ids_spell_the_same(names, loaded):
  student, teacher = (loaded[name] for name in names)
  student_ids, teacher_ids = alignment.shared_ids(student, teacher)
  pairs = list(zip(student_ids.tolist(), teacher_ids.tolist()))
  assert (student.eos_id, teacher.eos_id) in pairs and student_ids.dtype == teacher_ids.dtype == np.int32
  assert len(set(student_ids)) == len(set(teacher_ids)) == len(pairs) and sorted(student_ids) == list(student_ids)
  tables = [token_bytes.vocabulary_bytes(of) for of in (student, teacher)]
  assert all(tables[0][i] == tables[1][j] for i, j in pairs)
  expected = {*tables[0]} & {*tables[1]} - {b''}
  assert {tables[0][i] for i, _ in pairs} - {b''} == expected and len(pairs) == len(expected) + 1  # and end of text
  if names == ('bpe', 'bpe'):
    assert (student_ids == teacher_ids).all()


@pytest.mark.parametrize('names', PAIRS)
def test_tokens_of_exact_groups_are_shared(names, loaded):
  pairs = set(zip(*(ids.tolist() for ids in alignment.shared_ids(loaded[names[0]], loaded[names[1]]))))
  for item in data_set(loaded, names=names):
    for group in np.flatnonzero(item.exact):
      ours = item.student.tokens[item.student_groups == group]
      theirs = item.teacher.tokens[item.teacher_groups == group]
      assert (int(ours[0]), int(theirs[0])) in pairs


@pytest.mark.parametrize('strip', [False, True])
def test_byte_pieces_stand_behind_the_pieces_that_are_used(strip, tmp_path, loaded):
  decoder, normalizer = (tokenizers.decoders.Strip(' ', 1, 0),), (tokenizers.normalizers.Prepend('\u2581'),)
  model = byte_fallback(decoder=decoder, normalizer=normalizer) if strip else byte_fallback()
  pieces = tokenizer.load(save(tmp_path, model))
  student_ids, teacher_ids = alignment.shared_ids(loaded['byte'], pieces)
  id_of = dict(zip(student_ids.tolist(), teacher_ids.tolist()))
  assert id_of[ord('W')] == model.token_to_id('W') and id_of[ord(' ')] == model.token_to_id('\u2581')
  word_of, (word,) = dict(zip(*alignment.shared_ids(loaded['large'], pieces))), loaded['large'].encode(' a')
  assert word_of[word] == model.token_to_id('\u2581a')  # rather than ' a', which it never makes
  assert id_of[ord('a')] == model.token_to_id('a')  # though a text 'a' may be the token ' a'
  assert id_of[0xE2] == model.token_to_id('<0xE2>') and id_of[0x0A] == pieces.encode('a\n')[-1]
  ids, fallback = pieces.encode('What\u00e9'), token_bytes.fallback_ids(pieces)
  assert [i in fallback for i in ids[-3:]] == [False, True, True] and len(fallback) == 256
