"""GSM8K: records, splits and grading by hand; the builder against a local mirror; the real files where they are."""

import functools
import gzip
import hashlib
import http.server
import json
import os
import sys
import threading

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


@pytest.fixture
def mirror(tmp_path, monkeypatch):
  """The builder pointed at a server on the loopback device; yields (requests seen, folder of the data)."""
  from tensorflow_datasets.core.download import checksums

  from srm_jax.tasks import gsm8k_builder

  files, seen = tmp_path / 'mirror', []
  files.mkdir()

  class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
      seen.append(self.path)

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=str(files)))
  infos = {}
  for split, records in (('train', RAW[:30]), ('test', RAW[30:40])):
    content = ''.join(json.dumps(record) + '\n' for record in records).encode()
    (files / f'{split}.jsonl').write_bytes(content)
    url = f'http://127.0.0.1:{server.server_port}/{split}.jsonl'
    infos[url] = checksums.UrlInfo(size=len(content), checksum=hashlib.sha256(content).hexdigest(),
        filename=f'{split}.jsonl')
  monkeypatch.setattr(gsm8k_builder.GradeSchoolMath, 'url_infos', infos)
  monkeypatch.setenv('no_proxy', '127.0.0.1')
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'data'))
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  yield files, seen, tmp_path / 'data'
  server.shutdown()
  thread.join()
  server.server_close()


def test_builder_downloads_once_checks_and_keeps_the_order(mirror):
  from srm_jax.tasks import gsm8k_builder

  _, seen, data = mirror
  lines = gsm8k_builder.read_lines('train', data)
  assert [json.loads(line) for line in lines] == RAW[:30]
  assert len(gsm8k_builder.read_lines('test', data)) == 10
  assert len(seen) == 2 and 'tensorflow' not in sys.modules
  assert list(data.rglob('*.array_record*'))
  problems = math.parse_gsm8k(lines, source='mirror', split='train')
  assert [problem.id for problem in problems[:2]] == ['gsm8k-train-0', 'gsm8k-train-1']


def test_builder_refuses_changed_files(mirror):
  from srm_jax.tasks import gsm8k_builder

  files, _, data = mirror
  (files / 'train.jsonl').write_text('{"question": "poisoned", "answer": "#### 1"}\n')
  with pytest.raises(Exception, match='(?i)checksum'):
    gsm8k_builder.read_lines('train', data)


def test_pinned_urls_carry_checksums():
  from srm_jax.tasks import gsm8k_builder

  for url, info in gsm8k_builder.GradeSchoolMath.url_infos.items():
    assert '/master/' not in url and len(info.checksum) == 64 and info.size > 0


@needs_data
def test_real_files():
  sizes = {split: len(TASKS['gsm8k'].problems(split)) for split in ('train', 'dev', 'test')}
  assert sizes['test'] == 1319 and sizes['train'] + sizes['dev'] == 7473 and 450 < sizes['dev'] < 560
  for problem in TASKS['gsm8k'].problems('test'):
    assert '<<' not in problem.rationale and '####' not in problem.rationale and problem.rationale
    assert math.grade_gsm8k(problem, TASKS['gsm8k'].solution(problem)) == 1.0


@needs_data
@pytest.mark.parametrize('split', ['train', 'test'])
def test_the_public_files_have_the_pinned_checksums_and_parse_to_the_same_problems(split):
  from srm_jax.tasks import gsm8k_builder

  path = os.path.join(os.environ['SRM_DATA_DIR'], 'gsm8k', f'raw_{split}.jsonl.gz')
  content = gzip.open(path).read()
  (info,) = (info for info in gsm8k_builder.GradeSchoolMath.url_infos.values() if info.filename == f'{split}.jsonl')
  assert (hashlib.sha256(content).hexdigest(), len(content)) == (info.checksum, info.size)
  problems = math.parse_gsm8k(content.decode().splitlines(), source=path, split=split)
  assert problems == list(math._read(split, os.environ['SRM_DATA_DIR']))
