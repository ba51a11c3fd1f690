"""The environment of its own that benchmarks beside Tunix give it, with the JAX of experiments/constraints.txt.

In $XDG_CACHE_HOME/srm_jax/tunix or ~/.cache/srm_jax/tunix (2 GB), made on the first call from the package index.
"""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
TUNIX = ('google-tunix==0.1.7', 'qwix==0.1.8')
SHARED = ('flax', 'jax', 'jaxlib', 'libtpu', 'optax')  # of the versions that both sides compile with


def requirements() -> list[str]:
  pins = (ROOT / 'experiments' / 'constraints.txt').read_text(encoding='utf-8').splitlines()
  return [*TUNIX, *(pin for pin in pins if pin.split('==')[0] in SHARED)]


def cache() -> pathlib.Path:
  return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'srm_jax', 'tunix').expanduser()


def environment(folder: pathlib.Path) -> pathlib.Path:
  """The interpreter of Tunix's environment, which is made where it is not there or half made.

  Raises:
    ConfigError: it could not be installed.
  """
  python, done = folder / 'bin' / 'python', folder / 'installed'
  wanted = '\n'.join([sys.version, *requirements()])
  if done.exists() and done.read_text(encoding='utf-8') == wanted:
    return python
  print(f'installing Tunix into {folder}, once', file=sys.stderr)
  pip = [python, '-m', 'pip', 'install', '--quiet', '--no-compile', '--disable-pip-version-check', *requirements()]
  for step in ([sys.executable, '-m', 'venv', '--clear', folder], pip):
    made = subprocess.run(step, capture_output=True, text=True)
    if made.returncode:
      raise _not_installed(folder, made.stderr or made.stdout)
  done.write_text(wanted, encoding='utf-8')
  return python


def _not_installed(folder, said: str):
  from srm_jax.schema import ConfigError

  errors = [line for line in said.strip().splitlines() if 'WARNING' not in line] or ['nothing']
  return ConfigError(
      f'Tunix could not be installed into {folder}, which needs the package index: {errors[-1].strip()}. '
      'Fix: run this once with network, or compare --sides=ours alone'
  )
