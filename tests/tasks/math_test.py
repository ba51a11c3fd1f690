"""GSM8K: records, splits and grading by hand; the builder against a local mirror; the real files where they are."""

import gzip
import json
import os

import pytest

from srm_jax.tasks import TASKS, graders, math

RAW = [
    {'question': f'Ann has {i} pens and buys {i + 1}. How many?',
        'answer': f'She has {i}+{i + 1} = <<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1}.\n#### {2 * i + 1:,}'}
    for i in range(600)]

needs_data = pytest.mark.skipif(not os.environ.get('SRM_DATA_DIR'), reason='SRM_DATA_DIR is not set')


def _write(folder, records, split='train', name='gsm8k'):
  (folder / name).mkdir(exist_ok=True)
  with gzip.open(folder / name / f'{split}.jsonl.gz', 'wt', encoding='utf-8') as file:
    file.writelines(record if isinstance(record, str) else json.dumps(record) + '\n' for record in records)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.setenv('SRM_DATA_DIR', str(tmp_path))
  math._read.cache_clear()
  yield tmp_path
  math._read.cache_clear()


def test_both_layouts_give_the_same_problem():
  raw = {'question': 'Q? ', 'answer': 'He pays 2*600 = $<<2*600=1200>>1200.\nDone.\n#### 1,200'}
  apart = {'question': 'Q?', 'answer': '1200', 'rationale': 'He pays 2*600 = $<<2*600=1200>>1200.\nDone.'}
  (one,), (two,) = (math.parse_gsm8k([json.dumps(record)], source='s', split='train') for record in (raw, apart))
  assert one == two
  assert one.answer == '1200' and one.rationale == 'He pays 2*600 = $1200.\nDone.' and one.metadata['steps'] == 2


@pytest.mark.parametrize('line', [
    '{"question": "q"', '["q", "a"]', '{"question": "q"}', '{"question": "q", "answer": "no mark"}',
    '{"question": "q", "answer": "x\\n#### many"}', '{"question": " ", "answer": "x\\n#### 1"}',
    '{"question": 3, "answer": "#### 1"}', ''])
def test_a_malformed_record_names_file_and_line(folder, line):
  _write(folder, RAW[:2] + [line + '\n'])
  with pytest.raises(ValueError, match=r'train\.jsonl\.gz, line 3: malformed GSM8K record'):
    TASKS['gsm8k'].problems('train')


def test_missing_empty_and_broken_files(folder):
  with pytest.raises(FileNotFoundError, match='test.jsonl.gz not found; point SRM_DATA_DIR'):
    TASKS['gsm8k'].problems('test')
  _write(folder, [])
  with pytest.raises(ValueError, match='holds no record'):
    TASKS['gsm8k'].problems('train')
  (folder / 'gsm8k' / 'test.jsonl.gz').write_bytes(b'not gzip')
  with pytest.raises(ValueError, match='test.jsonl.gz is not a readable gzip'):
    TASKS['gsm8k'].problems('test')


def test_dev_is_a_fixed_slice_of_train(folder):
  _write(folder, RAW)
  train, dev = (TASKS['gsm8k'].problems(split) for split in ('train', 'dev'))
  assert len(train) + len(dev) == 600 and 20 < len(dev) < 60
  assert not {problem.question for problem in train} & {problem.question for problem in dev}
  _write(folder, RAW[::-1])
  math._read.cache_clear()
  assert {problem.question for problem in TASKS['gsm8k'].problems('dev')} == {problem.question for problem in dev}


def test_count_is_a_prefix_of_a_seeded_permutation(folder):
  _write(folder, RAW)
  problems = TASKS['gsm8k'].problems
  assert problems('train', count=20, seed=1)[:5] == problems('train', count=5, seed=1) != problems('train', count=5,
      seed=2)
  with pytest.raises(ValueError, match='problems, not 700'):
    problems('train', count=700)


@pytest.mark.parametrize('text, answer', [
    ('so\n#### 72', '72'), ('#### $1,234.', '1234'), ('#### -5\nmore', '-5'), ('#### 72 apples', '72'),
    ('####72', '72'),
    ('#### 7\n#### 8', '7'), ('72', None), ('####', None), ('#### many', None), ('#### .', None)])
def test_strict_extraction(text, answer):
  assert math.extract_gsm8k(text) == answer


def test_strict_and_flexible_grading_differ_where_the_mark_is_missing():
  (problem,) = math.parse_gsm8k([json.dumps(RAW[3])], source='s', split='train')
  assert problem.answer == '7'
  assert math.grade_gsm8k(problem, 'so 7') == 0.0 and graders.last_number_equal(problem.answer, 'so 7')
  assert math.grade_gsm8k(problem, '#### 7') == 1.0 and math.grade_gsm8k(problem, '#### 17') == 0.0


@needs_data
def test_real_files():
  sizes = {split: len(TASKS['gsm8k'].problems(split)) for split in ('train', 'dev', 'test')}
  assert sizes['test'] == 1319 and sizes['train'] + sizes['dev'] == 7473 and 450 < sizes['dev'] < 560
  for problem in TASKS['gsm8k'].problems('test'):
    assert '<<' not in problem.rationale and '####' not in problem.rationale and problem.rationale
    assert math.grade_gsm8k(problem, TASKS['gsm8k'].solution(problem)) == 1.0
