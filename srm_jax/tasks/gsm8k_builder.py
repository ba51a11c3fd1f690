"""GSM8K as a tensorflow-datasets builder: downloads the two public files once, checks them, keeps them as array_record.

Works without TensorFlow: the files come over HTTP and are read back through `as_data_source`. The builder in
tensorflow-datasets itself follows a moving branch without checksums and drops the order of the records; this one is
pinned to a commit, so that a problem's id means the same everywhere.
"""

from __future__ import annotations

import os

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums

_COMMIT = '3101c7d5072418e28b9008a6636bde82a006892c'
_PREFIX = f'https://raw.githubusercontent.com/openai/grade-school-math/{_COMMIT}/grade_school_math/data/'


class GradeSchoolMath(tfds.core.GeneratorBasedBuilder):
  """One line of the public files an example, in their order; parsing is the task's business.

  Reference: Cobbe et al., Training Verifiers to Solve Math Word Problems, arXiv 2110.14168.
  """

  VERSION = tfds.core.Version('1.0.0')
  url_infos = {
      f'{_PREFIX}train.jsonl': checksums.UrlInfo(
          size=4166206, checksum='17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465',
              filename='train.jsonl'),
      f'{_PREFIX}test.jsonl': checksums.UrlInfo(
          size=749738, checksum='3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14',
              filename='test.jsonl'),
  }

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict({'line': tfds.features.Text(), 'index': tfds.features.Scalar(np.int64)})
    return tfds.core.DatasetInfo(
        builder=self, features=features, disable_shuffling=True,
            homepage='https://github.com/openai/grade-school-math')

  def _split_generators(self, dl_manager):
    paths = dl_manager.download({info.filename.removesuffix('.jsonl'): url for url, info in self.url_infos.items()})
    return {split: self._generate_examples(path) for split, path in paths.items()}

  def _generate_examples(self, path):
    with open(path, encoding='utf-8') as lines:
      for index, line in enumerate(lines):
        yield index, {'line': line, 'index': index}


def read_lines(split: str, data_dir: str | os.PathLike | None = None) -> list[str]:
  """Lines of 'train' or 'test'; downloads them at the first call.

  Args:
    split: 'train' or 'test'.
    data_dir: where tensorflow-datasets keeps its data; None is its own default ($TFDS_DATA_DIR, ~/tensorflow_datasets).
  """
  builder = GradeSchoolMath(data_dir=data_dir, file_format='array_record')
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(force_checksums_validation=True))
  examples = sorted(builder.as_data_source(split), key=lambda example: int(example['index']))
  return [example['line'].decode('utf-8') for example in examples]
