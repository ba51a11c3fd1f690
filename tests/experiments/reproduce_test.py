"""The registry says what the repository holds, and nothing that it does not."""

import importlib
import json
import subprocess

import pytest

from configs.studies import distillation_ablation, logits_or_hidden
from experiments import reproduce
from srm_jax import schema


def verdict(claim, word='supported', mean=0.5, seeds=2):
  one = {'mean': mean, 'low': 0.25, 'high': 0.75, 'by_seed': [0.4] * seeds, 'p': None, 'n': None}
  return {'claim': claim, 'verdict': word, 'evidence': {'sums': one}, 'needed': {}}


@pytest.fixture
def entry(tmp_path, monkeypatch):
  """An entry of two claims whose results lie in a folder of the test."""
  monkeypatch.setattr(reproduce, 'ROOT', tmp_path)
  made = reproduce.Entry('title', 'arXiv:1', ('a > 0', 'b > 0'), 'configs/x.py', 'results.json', module='x', claims='X')

  def write(*verdicts, section='x'):
    (tmp_path / 'results.json').write_text(json.dumps({section: {'verdicts': verdicts}}))

  return made, write


@pytest.mark.parametrize('identifier', reproduce.ENTRIES)
def test_every_entry_points_at_what_is_there(identifier):
  entry = reproduce.ENTRIES[identifier]
  assert (reproduce.ROOT / entry.config).exists() and bool(entry.script) != bool(entry.module)
  assert not entry.published or (reproduce.ROOT / entry.published).exists()
  text = (reproduce.ROOT / entry.config).read_text()
  if entry.script:
    assert (reproduce.ROOT / entry.script).exists() and f'bash {entry.script}' in text
  else:
    study = importlib.import_module(entry.place).STUDY
    assert study.config == entry.config and f'--run={identifier} ' in text
    folders = reproduce.STUDIES, reproduce.RL_STUDIES
    assert entry.results in [f'{folder}/{identifier}/results.json' for folder in folders]


@pytest.mark.parametrize('identifier', reproduce.ENTRIES)
def test_every_recorded_verdict_has_its_expectation(identifier):
  entry = reproduce.ENTRIES[identifier]
  verdicts = reproduce.recorded(entry)
  assert verdicts is None or len(verdicts) == len(entry.expected)
  assert (reproduce.NOT_RUN in reproduce.describe(identifier, entry)) == (verdicts is None)


@pytest.mark.parametrize('identifier', reproduce.ENTRIES)
def test_what_is_recorded_is_of_the_seeds_of_the_rule(identifier):
  entry = reproduce.ENTRIES[identifier]
  verdicts = reproduce.recorded(entry) or []
  counts = {len(one['by_seed']) for verdict in verdicts for one in verdict['evidence'].values()}
  assert counts <= {len(reproduce.seeds(entry.seeds))}
  if entry.module and verdicts:
    (section,) = json.loads((reproduce.ROOT / entry.results).read_text()).values()
    assert section['seeds'] == reproduce.seeds(entry.seeds)


@pytest.mark.parametrize('identifier, config', [
    ('ablation', distillation_ablation), ('S1', distillation_ablation), ('S3', logits_or_hidden),
])
def test_claims_of_a_shared_config_are_found_by_how_they_begin(identifier, config):
  entry = reproduce.ENTRIES[identifier]
  own = [claim['text'] for claim in config.CLAIMS if claim['text'].startswith(entry.claims)]
  assert len(own) == len(entry.expected)


def test_a_study_without_results_is_not_run(entry):
  made, write = entry
  assert reproduce.describe('X', made).count('not run') == 2
  write(section='another')
  assert reproduce.recorded(made) is None


def test_what_came_out_stands_beside_what_was_expected(entry):
  made, write = entry
  write(verdict('X one'), verdict('Y, of another study'), verdict('X two', 'contradicted', -0.5))
  lines = reproduce.describe('X', made).splitlines()
  assert lines[-2].endswith('a > 0  ->  supported: +0.500 [0.250, 0.750] over 2 seeds')
  assert lines[-1].endswith('b > 0  ->  contradicted: -0.500 [0.250, 0.750] over 2 seeds')


def test_results_that_do_not_fit_the_registry_are_no_silent_list(entry):
  made, write = entry
  write(verdict('X one'))
  with pytest.raises(ValueError):
    reproduce.describe('X', made)


@pytest.mark.parametrize('identifier', ['S2', 'S3'])
@pytest.mark.parametrize('smoke, seeds', [(True, ''), (False, '901,'), (False, '3')])
def test_only_a_whole_run_is_recorded(identifier, smoke, seeds, tmp_path, monkeypatch):
  monkeypatch.setattr(subprocess, 'run', lambda *_, **__: pytest.fail('it was run'))
  with pytest.raises(schema.ConfigError, match='full size with --seeds=.*; fix: --record without --smoke and --seeds'):
    reproduce.run(identifier, str(tmp_path), smoke=smoke, seeds_text=seeds, record=True)


def test_an_unknown_study_is_refused(tmp_path):
  with pytest.raises(schema.ConfigError, match="study 'S9' unknown"):
    reproduce.run('S9', str(tmp_path), smoke=True, seeds_text='1', record=False)


def test_a_study_with_a_script_is_run_by_it_and_recorded_only_when_asked_to(tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(subprocess, 'run', lambda command, check: calls.append((command, check)))
  reproduce.run('S3', str(tmp_path), smoke=True, seeds_text='', record=False)
  reproduce.run('S3', str(tmp_path), smoke=False, seeds_text='', record=True)
  start = ['bash', str(reproduce.ROOT / reproduce.ENTRIES['S3'].script), f'--workdir={tmp_path}']
  assert calls[0] == ([*start, f'--out={tmp_path}/report', '--seeds=1,', '--smoke'], True)
  assert calls[1] == ([*start, f'--out={reproduce.ABLATION}', '--seeds=1,2,3,4,5,'], True)


@pytest.mark.slow
@pytest.mark.parametrize('identifier', [name for name, entry in reproduce.ENTRIES.items() if entry.module])
def test_the_smallest_form_of_a_study_runs_and_continues(identifier, tmp_path, capsys):
  for _ in range(2):
    reproduce.run(identifier, str(tmp_path), smoke=True, seeds_text='1', record=False)
  out = capsys.readouterr().out
  entry = reproduce.ENTRIES[identifier]
  assert out.count('| claim |') == 2 and out.count(f'{identifier}, seed 1: ') == len(list(tmp_path.glob('*/done.json')))
  assert (tmp_path / 'figure.png').stat().st_size > 1000
  (section,) = json.loads((tmp_path / 'results.json').read_text()).values()
  assert [one['verdict'] for one in section['verdicts']] == ['inconclusive'] * len(entry.expected)  # of one seed
