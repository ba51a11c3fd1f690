import subprocess

import pytest

from experiments.benchmarks import tunix_environment as place
from srm_jax import schema


def test_both_sides_compile_with_one_jax_and_one_libtpu():
  pins = place.requirements()
  assert pins[0] == 'google-tunix==0.1.7'
  assert {pin.split('==')[0] for pin in pins[2:]} == {'flax', 'jax', 'jaxlib', 'libtpu', 'optax'}
  constraints = (place.ROOT / 'experiments' / 'constraints.txt').read_text().splitlines()
  assert set(pins[2:]) <= set(constraints)


def _commands(monkeypatch, *, fails=''):
  """What `environment` runs; a command that has the word `fails` in it goes wrong."""
  seen = []

  def run(words, **options):
    seen.append([str(word) for word in words])
    wrong = fails in seen[-1]
    said = 'WARNING: Retrying\nERROR: No matching distribution found\nWARNING: later' if wrong else ''
    return subprocess.CompletedProcess(words, int(wrong), '', said)

  monkeypatch.setattr(place.subprocess, 'run', run)
  return seen


def test_the_environment_is_made_once(monkeypatch, tmp_path):
  seen = _commands(monkeypatch)
  assert place.environment(tmp_path) == tmp_path / 'bin' / 'python'
  assert [words[2] for words in seen] == ['venv', 'pip'] and 'google-tunix==0.1.7' in seen[1]
  place.environment(tmp_path)
  assert len(seen) == 2
  monkeypatch.setattr(place, 'TUNIX', ('google-tunix==0.1.8',))
  place.environment(tmp_path)
  assert len(seen) == 4  # another version: made anew


def test_without_network_the_message_says_so_and_nothing_counts_as_made(monkeypatch, tmp_path):
  _commands(monkeypatch, fails='pip')
  with pytest.raises(schema.ConfigError, match='needs the package index: ERROR: No matching.*--sides=ours'):
    place.environment(tmp_path)
  seen = _commands(monkeypatch)
  place.environment(tmp_path)
  assert len(seen) == 2


def test_the_folder_is_outside_the_repository(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert place.cache() == tmp_path / 'srm_jax' / 'tunix'
  monkeypatch.delenv('XDG_CACHE_HOME')
  assert place.cache().parts[-3:] == ('.cache', 'srm_jax', 'tunix') and '~' not in str(place.cache())
