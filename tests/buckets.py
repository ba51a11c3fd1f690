"""A bucket of objects in memory in place of gs://, for tests of what reads and writes far away."""

from etils.epath import backend
from fsspec.implementations import memory
from fsspec.spec import AbstractBufferedFile


class RangeFile(AbstractBufferedFile):
  """Reads as gcsfs does: ranges of bytes, through a cache that reads ahead. `ranges` lists them."""

  ranges: list[tuple[int, int]] = []

  def _fetch_range(self, start, end):
    self.ranges.append((start, end))
    return self.fs.store[self.path].getvalue()[start:end]


class Bucket(memory.MemoryFileSystem):
  """The objects lie in `store`, by path."""

  protocol, cachable = ('gs', 'gcs'), False
  store, pseudo_dirs = {}, ['']

  @classmethod
  def _strip_protocol(cls, path):
    return '/' + path.removeprefix('gs://').strip('/')

  def _open(self, path, mode='rb', **options):
    return RangeFile(self, path, mode) if mode == 'rb' else super()._open(path, mode, **options)


def use(monkeypatch) -> str:
  """Puts an empty bucket in place of all others; its address."""
  monkeypatch.setattr(type(backend.fsspec_backend), 'fs', lambda self, path: Bucket())
  for kind, name, empty in ((Bucket, 'store', {}), (Bucket, 'pseudo_dirs', ['']), (RangeFile, 'ranges', [])):
    monkeypatch.setattr(kind, name, empty)
  return 'gs://bucket'
