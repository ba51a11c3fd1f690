import json

import pytest

from experiments import sweep
from srm_jax import report, schema, stages

CONFIG = '''
from ml_collections import ConfigDict

def get_config(arg=''):
  given = dict(part.split('=') for part in arg.split(',') if part)
  seed, size = int(given.get('seed', 0)), int(given.get('size', 1))
  return ConfigDict(dict(order=('prepare', 'train', 'score'), stages=dict(
      prepare=dict(run='tokenizer', config=dict(size=size)),
      train=dict(run='train', config=dict(tokenizer='{prepare}', seed=seed, rate=1.0)),
      score=dict(run='evaluate', config=dict(model='{train}', strategies=dict(greedy={}, vote={}), problems=seed)),
  )))
'''
PLAIN = '''
from ml_collections import ConfigDict

def get_config(arg=''):
  return ConfigDict(dict(recipe=dict(name='x'), seed=0, rate=1.0))
'''


@pytest.fixture
def ran(monkeypatch):
  """Names of the stages that were run, by runners that write what real ones do; a rate of 13 fails."""
  names = []

  def prepare(config, workdir, done):
    workdir.mkdir(parents=True)
    names.append('prepare')
    return workdir, {'size': config['size']}

  def train(config, workdir, done):
    if config['rate'] == 13:
      raise RuntimeError('unlucky')
    workdir.mkdir(parents=True)
    (workdir / 'rate').write_text(str(config['rate']))
    names.append('train')
    return workdir, {'loss': config['rate'] + config['seed'], 'step': 1}

  def score(config, workdir, done):
    workdir.mkdir(parents=True)
    names.append('score')
    right = 50 if float((done['train'].workdir / 'rate').read_text()) == 1 else 90
    rows = {'greedy': [1] * right + [0] * (100 - right), 'vote': [1] * 95 + [0] * 5}
    found = {name: {'accuracy': sum(c) / 100, 'n': 100, 'correct': c, 'interval': [0, 1]} for name, c in rows.items()}
    (workdir / 'results.json').write_text(json.dumps(found))
    for number, name in enumerate(rows):
      lines = (
          {'row': name, 'id': f'{config["problems"]}/{i}', 'text': '', 'prompt': '', 'reward': 0} for i in range(100)
      )
      (workdir / f'completions_{number}.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return workdir, {}

  fake = {'tokenizer': prepare, 'train': train, 'evaluate': score}
  monkeypatch.setattr(stages, 'RUNNERS', fake)
  monkeypatch.setattr(stages, 'CHECKS', {name: lambda config, where: None for name in fake})
  return names


@pytest.fixture
def config(tmp_path):
  path = tmp_path / 'line.py'
  path.write_text(CONFIG)
  return str(path)


def _results(workdir):
  return json.loads((workdir / 'results.json').read_text())


def test_a_sweep_shares_stages_skips_finished_cells_and_tests_what_it_found(config, ran, tmp_path, monkeypatch):
  settings, workdir = ['stages.train.config.rate=1,2'], tmp_path / 'sweep'
  assert sweep.sweep(config, settings, '3', ['score.vote:score.greedy'], workdir) == 0
  assert [ran.count(name) for name in ('prepare', 'train', 'score')] == [1, 6, 6]
  results = _results(workdir)
  assert [(cell['settings'], cell['seed']) for cell in results['cells'][:3]] == [
      ({'stages.train.config.rate': '1'}, 1), ({'stages.train.config.rate': '2'}, 1),
      ({'stages.train.config.rate': '1'}, 2),
  ]
  assert report.unpack(results['cells'][0]['rows']['score.greedy']['correct']).sum() == 50
  tests = {(test['a'], test['b']): test for test in results['tests']}
  assert tests['score.greedy [rate=2]', 'score.greedy [rate=1]']['difference'] == pytest.approx(0.4)
  assert tests['score.greedy [rate=2]', 'score.greedy [rate=1]']['seeds_above'] == 3
  assert tests['score.vote [rate=1]', 'score.greedy [rate=1]']['difference'] == pytest.approx(0.45)
  assert '| rate=2 | score.greedy | 90.0% | 0.0% | 3 | 300 |' in (workdir / 'table.md').read_text()
  monkeypatch.setattr(stages, 'run_stages', lambda *args, **options: pytest.fail('a finished cell was run again'))
  sweep.sweep(config, settings, '3', [], workdir)
  assert _results(workdir)['cells'] == results['cells']


def test_a_failing_cell_is_reported_and_the_others_go_on(config, ran, tmp_path, capsys):
  assert sweep.sweep(config, ['stages.train.config.rate=13,2'], '1', [], tmp_path / 'sweep') == 1
  results = _results(tmp_path / 'sweep')
  assert [cell['settings'] for cell in results['cells']] == [{'stages.train.config.rate': '2'}]
  assert results['failed'][0]['error'] == 'RuntimeError: unlucky'
  assert 'rate=13, seed 1 failed' in capsys.readouterr().err


def test_an_interrupted_sweep_continues(config, ran, tmp_path, monkeypatch):
  score, calls = stages.RUNNERS['evaluate'], []

  def interrupted(*args):
    calls.append(1)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return score(*args)

  monkeypatch.setitem(stages.RUNNERS, 'evaluate', interrupted)
  with pytest.raises(KeyboardInterrupt):
    sweep.sweep(config, [], '7,9', [], tmp_path / 'sweep')
  assert sweep.sweep(config, [], '7,9', [], tmp_path / 'sweep') == 0
  assert [cell['seed'] for cell in _results(tmp_path / 'sweep')['cells']] == [7, 9]
  assert [ran.count(name) for name in ('prepare', 'train', 'score')] == [1, 2, 2]


def test_arguments_of_get_config_can_be_swept(config):
  line = sweep.cell_config(f'{config}:size=5', {'arg.size': '7'}, 4)
  assert line.stages.prepare.config.size == 7 and line.stages.train.config.seed == 4


def test_a_plain_config_is_a_line_of_one_stage_with_its_own_seed(ran, tmp_path):
  path = tmp_path / 'plain.py'
  path.write_text(PLAIN)
  assert sweep.sweep(str(path), ['rate=1,2'], '2', [], tmp_path / 'sweep') == 0
  assert [cell['metrics']['train']['loss'] for cell in _results(tmp_path / 'sweep')['cells']] == [2.0, 3.0, 3.0, 4.0]
  assert '| rate=2 | train | loss | 3.5 |' in (tmp_path / 'sweep' / 'table.md').read_text()


def test_misspelt_names_stop_a_sweep_before_anything_runs(config, ran, tmp_path):
  with pytest.raises(schema.ConfigError, match="did you mean 'rate'"):
    sweep.sweep(config, ['stages.train.config.rat=1'], '2', [], tmp_path / 'sweep')
  with pytest.raises(schema.ConfigError, match="did you mean 'score.greedy'"):
    sweep.sweep(config, [], '2', ['score.vote:score.greed'], tmp_path / 'sweep')
  assert not ran


@pytest.mark.parametrize('text, expected', [
    ('3', [1, 2, 3]), ('7,9', [7, 9]), ('7,', None), ('0', None), ('x', None), ('2,2', None),
])
def test_seeds_are_a_number_or_a_list(text, expected):
  if expected is None and text != '7,':
    with pytest.raises(schema.ConfigError, match='--seeds'):
      sweep.seeds(text)
  else:
    assert sweep.seeds(text) == (expected or [7])
