"""The GSM8K builder: downloads from a loopback mirror, checksums, and the real raw files."""

import functools
import gzip
import hashlib
import http.server
import json
import os
import sys
import threading

import pytest

from srm_jax.tasks import math

RAW = [
    {'question': f'Ann has {i} pens and buys {i + 1}. How many?',
        'answer': f'She has {i}+{i + 1} = <<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1}.\n#### {2 * i + 1:,}'}
    for i in range(600)]

needs_data = pytest.mark.skipif(not os.environ.get('SRM_DATA_DIR'), reason='SRM_DATA_DIR is not set')


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
@pytest.mark.parametrize('split', ['train', 'test'])
def test_the_public_files_have_the_pinned_checksums_and_parse_to_the_same_problems(split):
  from srm_jax.tasks import gsm8k_builder

  path = os.path.join(os.environ['SRM_DATA_DIR'], 'gsm8k', f'raw_{split}.jsonl.gz')
  content = gzip.open(path).read()
  (info,) = (info for info in gsm8k_builder.GradeSchoolMath.url_infos.values() if info.filename == f'{split}.jsonl')
  assert (hashlib.sha256(content).hexdigest(), len(content)) == (info.checksum, info.size)
  problems = math.parse_gsm8k(content.decode().splitlines(), source=path, split=split)
  assert problems == list(math._read(split, os.environ['SRM_DATA_DIR']))
