"""Runs before any test is imported: eight virtual CPU devices, no silent broadcasting, one place for compiled programs.

Most of the suite's time is the compiler's. It does not optimise here; XLA_FLAGS=--xla_backend_optimization_level=3 has
it do as in a run.

All of it stands in environment variables, so that processes which tests start inherit it.
"""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments import runtime  # noqa: E402

if 'jax' in sys.modules:
  raise RuntimeError('jax was imported before tests/conftest.py: its devices can no longer be set')
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.jax_cache'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
runtime.set_virtual_devices(8)
runtime.compile_hastily()


def pytest_configure(config):
  config.addinivalue_line('markers', 'slow: minutes rather than seconds; only bash tests/run.sh --all runs it')
  # Tests mirror the library, so two folders may hold files of one name; only this mode tells them apart.
  config.option.importmode = 'importlib'


def pytest_collection_modifyitems(items):
  """Files with slow tests come first: a long one that begins last leaves the other process without work."""
  slow = {item.path for item in items if item.get_closest_marker('slow')}
  items.sort(key=lambda item: item.path not in slow)
