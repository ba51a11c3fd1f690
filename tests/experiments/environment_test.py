"""experiments/environment.sh with interpreters that only pretend, in a folder that has nothing else on its PATH."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOOLS = ['bash', 'cat', 'cksum', 'cp', 'grep', 'ls', 'mkdir', 'rm', 'sed', 'tail', 'tee']

# Answers what environment.sh asks of a Python, and writes down what it is told to install.
PRETENDER = """#!/usr/bin/env bash
case "$*" in
  *'sys.version_info'*) echo {version} ;;
  *'import ensurepip, venv'*) exit {without_venv} ;;
  -V) echo Python {version}.0 ;;
  '-m venv --clear '*) rm -rf "$4"; mkdir -p "$4/bin"; : >"$4/pyvenv.cfg"; cp "$0" "$4/bin/python" ;;
  '-m pip --version') ;;
  *sysconfig*) echo "$SITE" ;;
  '-m pip install'*pycosat) exit "${{NO_COMPILER:-0}}" ;;
  '-m pip install'*) echo "$*" >>"$LOG"; exit "${{PIP_FAILS:-0}}" ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
  """A repository with the two files that are hashed, a PATH with a few tools, and an empty home."""
  for folder in ('bin', 'home', 'repository/experiments', 'site'):
    (tmp_path / folder).mkdir(parents=True)
  for tool in [*TOOLS, 'env']:
    (tmp_path / 'bin' / tool).symlink_to(shutil.which(tool))
  for name in ('setup.py', 'experiments/constraints.txt', 'experiments/environment.sh'):
    shutil.copy(ROOT / name, tmp_path / 'repository' / name)
  return tmp_path


def pretend(path, version, *, without_venv=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(PRETENDER.format(version=version, without_venv=without_venv))
  path.chmod(0o755)


def prepare(machine, *extras, **environment):
  """-> (exit code, what it said, what pip was told)."""
  log = machine / 'log'
  log.write_text('')
  script = 'set -euo pipefail; . experiments/environment.sh; prepare_environment "$@"; echo "use $venv_python"'
  places = {'PATH': machine / 'bin', 'HOME': machine / 'home', 'LOG': log, 'SITE': machine / 'site'}
  done = subprocess.run(
    ['bash', '-c', script, 'prepare', *extras], cwd=machine / 'repository', capture_output=True, text=True, check=False,
    timeout=60, env={name: str(place) for name, place in places.items()} | environment)
  return done.returncode, done.stdout + done.stderr, log.read_text()


def version_used(machine):
  return subprocess.run(
    [machine / 'repository/.venv/bin/python', '-c', 'sys.version_info'], capture_output=True, text=True, check=True,
    env={'PATH': str(machine / 'bin')}).stdout.strip()


def test_newest_python_wins_even_off_the_path(machine):
  pretend(machine / 'bin/python3', '3.11')
  pretend(machine / 'home/.pyenv/versions/3.12.1/bin/python3', '3.12')
  pretend(machine / 'home/.pyenv/versions/3.10.0/bin/python3', '3.10')
  code, said, told = prepare(machine, 'test')
  assert code == 0 and 'use .venv/bin/python' in said
  assert version_used(machine) == '3.12'
  assert '-c experiments/constraints.txt -e .[test]' in told


def test_untested_python_is_taken_only_before_the_one_without_new_jax(machine):
  pretend(machine / 'bin/python3.14', '3.14')
  pretend(machine / 'bin/python3.11', '3.11')
  assert prepare(machine)[0] == 0 and version_used(machine) == '3.14'
  pretend(machine / 'bin/python3.12', '3.12')
  shutil.rmtree(machine / 'repository/.venv')
  assert prepare(machine)[0] == 0 and version_used(machine) == '3.12'


def test_no_python_names_one_command(machine):
  pretend(machine / 'bin/python3', '3.10')
  code, said, told = prepare(machine)
  assert code != 0 and 'uv python install 3.13' in said and not told
  assert not (machine / 'repository/.venv').exists()


def test_python_without_venv_is_passed_over_then_explained(machine):
  pretend(machine / 'bin/python3.13', '3.13', without_venv=1)
  code, said, _ = prepare(machine)
  assert code != 0 and 'apt-get install -y python3.13-venv' in said
  pretend(machine / 'bin/python3', '3.11')
  assert prepare(machine)[0] == 0 and version_used(machine) == '3.11'


def test_installs_once_and_keeps_earlier_extras(machine):
  pretend(machine / 'bin/python3', '3.13')
  assert '.[test]' in prepare(machine, 'test')[2]
  assert prepare(machine, 'test')[2] == ''
  assert prepare(machine)[2] == ''
  assert '.[test,notebooks]' in prepare(machine, 'notebooks')[2]
  (machine / 'repository/setup.py').write_text('# another requirement\n')
  assert '.[test,notebooks]' in prepare(machine, 'test')[2]


def test_no_extra_asks_pip_for_none(machine):
  pretend(machine / 'bin/python3', '3.13')
  told = prepare(machine)[2].split()
  assert told[-2:] == ['-e', '.']
  assert prepare(machine)[2] == ''


def test_interrupted_or_failed_install_is_done_afresh(machine):
  pretend(machine / 'bin/python3', '3.13')
  code, said, _ = prepare(machine, PIP_FAILS='1')
  assert code != 0 and 'installing failed' in said
  (machine / 'repository/.venv/half').touch()
  code, said, told = prepare(machine)
  assert code == 0 and 'making .venv' in said and told
  assert not (machine / 'repository/.venv/half').exists()


def test_chosen_python(machine):
  pretend(machine / 'bin/python3', '3.13')
  pretend(machine / 'elsewhere/python', '3.11')
  pretend(machine / 'elsewhere/old', '3.9')
  assert prepare(machine)[0] == 0 and version_used(machine) == '3.13'
  assert prepare(machine, PYTHON=str(machine / 'elsewhere/python'))[0] == 0 and version_used(machine) == '3.11'
  code, said, _ = prepare(machine, PYTHON=str(machine / 'elsewhere/old'))
  assert code != 0 and 'not a Python of a supported version' in said


def test_never_clears_a_folder_that_is_no_environment(machine):
  pretend(machine / 'bin/python3', '3.13')
  (machine / 'mine').mkdir()
  (machine / 'mine/thesis.txt').write_text('x')
  code, said, _ = prepare(machine, SRM_VENV=str(machine / 'mine'))
  assert code != 0 and 'no virtual environment' in said
  assert (machine / 'mine/thesis.txt').exists()


def test_stand_in_where_nothing_compiles(machine):
  pretend(machine / 'bin/python3', '3.13')
  code, said, _ = prepare(machine, NO_COMPILER='1')
  assert code == 0 and 'no C compiler that works' in said
  assert (machine / 'site/pycosat-0.6.6.dist-info/METADATA').exists()
  namespace = {}
  exec((machine / 'site/pycosat.py').read_text(), namespace)
  with pytest.raises(ImportError, match='C compiler'):
    namespace['itersolve']([[1]])


def test_scripts_parse():
  for script in ('experiments/environment.sh', 'experiments/quickstart.sh', 'tests/run.sh', '.ci/run'):
    subprocess.run(['bash', '-n', ROOT / script], check=True)
    assert script.endswith('environment.sh') or os.access(ROOT / script, os.X_OK)
