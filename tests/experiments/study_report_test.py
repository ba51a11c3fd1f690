"""What a report says of made-up cells: numbers by hand, tables, figures, marks in a README."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments.study import cells, report, summary, tables
from srm_jax.schema import ConfigError

CONFIG = '''
from ml_collections import ConfigDict

def get_config(arg=''):
  given = dict(part.split('=') for part in arg.split(',') if part)
  claim = dict(text='b is above a', above=('b_on',), below=('a',), what='accuracy', margin=0.0)
  other = dict(text='b has more entropy', above=('b_on',), below=('b_off',), what='entropy', margin=0.0)
  return ConfigDict(dict(
      task=given['task'], seed=int(given['seed']), arms=('a', 'b_off', 'b_on'), claims=(claim, other), stages={},
  ))
'''
RATES = {'teacher': 0.9, 'base': 0.2, 'a': 0.5, 'b_off': 0.5, 'b_on': 0.8}


def _model(name, seed, n=200):
  rng = np.random.default_rng((seed, len(name)))
  right = rng.random(n) < RATES[name]
  made = {'accuracy': float(right.mean()), 'n': n, 'correct': cells.pack(right)}
  if name == 'teacher':
    return made
  return made | {
      'curve': {'30': 0.25 + seed / 100, '60': 0.5}, 'entropy': 0.1 * len(name) + seed / 1000, 'divergence': 0.3,
      'cka': [0.5, 0.25 * seed], 'flops': 2e9, 'seconds': 3.0,
  }


@pytest.fixture
def workdir(tmp_path):
  """A study with seeds 1 to 3 on one task, and 1, 2 and 4 on the other."""
  path = tmp_path / 'mine.py'
  path.write_text(CONFIG)
  for task, seeds in (('x', (1, 2, 3)), ('y', (1, 2, 4))):
    for seed in seeds:
      config = cells.open_config(f'{path}:task={task}', seed)
      where = cells.path_of(config, tmp_path)
      where.parent.mkdir(exist_ok=True)
      models = {name: _model(name, seed) for name in RATES}
      where.write_text(json.dumps({'task': task, 'seed': seed, 'seconds': 100.0 * seed, 'models': models}))
  return tmp_path


def _configs(workdir):
  return [f'{workdir}/mine.py:task={task}' for task in 'xy']


def test_only_seeds_that_all_tasks_have_count(workdir):
  config, found = report.collect(_configs(workdir), '4', workdir)['mine']
  assert [(cell['task'], cell['seed']) for cell in found] == [('x', 1), ('x', 2), ('y', 1), ('y', 2)]
  assert config.arms == ('a', 'b_off', 'b_on')
  with pytest.raises(ConfigError, match='mine has no seed that is finished for every task'):
    report.collect(_configs(workdir), '3,4', workdir)


def test_a_summary_by_hand(workdir):
  config, found = report.collect(_configs(workdir), '2', workdir)['mine']
  said = summary.summarize(config, found)
  x = said['tasks']['x']
  assert x['seeds'] == [1, 2] and x['seconds'] == 150.0
  rates = [cell['models']['b_on']['accuracy'] for cell in found[:2]]
  over = [cell['models']['a']['accuracy'] for cell in found[:2]]
  teacher = [cell['models']['teacher']['accuracy'] for cell in found[:2]]
  one = x['models']['b_on']
  assert one['accuracy']['mean'] == pytest.approx(np.mean(rates)) and one['accuracy']['by_seed'] == rates
  assert one['retention']['mean'] == pytest.approx(np.mean(np.divide(rates, teacher)), rel=1e-5)
  assert one['gain']['mean'] == pytest.approx(np.mean(rates) - np.mean(over), rel=1e-5) and one['gain']['n'] == 400
  assert [layer['mean'] for layer in one['cka']] == [0.5, 0.375] and one['curve'] == {'30': 0.265, '60': 0.5}
  assert one['entropy']['mean'] == pytest.approx(0.4015)
  assert not {'gain'} & {*x['models']['a'], *x['models']['base']} and 'entropy' not in x['models']['teacher']
  assert [one['claim'] for one in said['verdicts']] == ['b is above a', 'b has more entropy']
  assert said['verdicts'][1]['verdict'] == 'contradicted'  # its name is shorter, so it has less by 0.1
  assert json.loads(json.dumps(said, allow_nan=False)) == said


def test_one_seed_has_no_interval_and_says_so(workdir):
  config, found = report.collect(_configs(workdir), '1', workdir)['mine']
  said = summary.summarize(config, found)
  assert said['tasks']['x']['models']['a']['accuracy']['low'] is None
  assert {one['verdict'] for one in said['verdicts']} == {'inconclusive'}
  assert 'x: at least 5 seeds; y: at least 5 seeds' in tables.verdict_table(said, config.claims)


def test_a_teacher_that_knows_nothing_leaves_no_share(workdir):
  config, found = report.collect(_configs(workdir), '2', workdir)['mine']
  for cell in found:
    cell['models']['teacher']['accuracy'] = 0.0
  said = summary.summarize(config, found)
  nothing = {'mean': None, 'low': None, 'high': None, 'by_seed': [None, None]}
  assert said['tasks']['x']['models']['a']['retention'] == nothing
  (row,) = (line for line in tables.arm_table(said, 'x').splitlines() if line.startswith('| a '))
  assert row.split(' | ')[2] == ''


def test_tables_show_points_where_points_are_meant():
  made = {'mean': 0.0312, 'low': -0.01, 'high': 0.07244, 'by_seed': [], 'p': 0.0123, 'n': 10}
  assert tables.evidence(made, 'accuracy') == '+3.1 [-1.0, 7.2], p = .012'
  assert tables.evidence({**made, 'p': None}, 'entropy') == '+0.031 [-0.010, 0.072]'
  assert tables.interval({**made, 'low': None}, scale=100) == '3.1'
  assert [tables.p_value(p) for p in (1.0, 0.5, 0.0009)] == ['p = 1.000', 'p = .500', 'p < .001']
  assert tables.markdown(['a', 'b', 'c'], [['1', '2', '3']], ['c']) == (
      '| a | b | c |\n| --- | ---: | --- |\n| 1 | 2 | 3 |\n')


def test_marks_keep_the_text_around_them():
  text = 'before\n<!-- results -->\nold\n<!-- /results -->\nafter\n'
  once = tables.put(text, 'results', 'new')
  assert once == 'before\n<!-- results -->\nnew\n<!-- /results -->\nafter\n'
  assert tables.put(once, 'results', 'new\n') == once
  for broken in ('nothing', '<!-- results --> open', '<!-- /results -->'):
    with pytest.raises(ValueError, match='no <!-- results -->'):
      tables.put(broken, 'results', 'new')


def test_a_report_writes_figures_numbers_and_the_readme_twice_alike(workdir):
  out = workdir / 'out'
  out.mkdir()
  (out / 'README.md').write_text('# Mine\n<!-- results -->\n<!-- /results -->\nThe end.\n')
  text = report.write(_configs(workdir), '2', workdir, out)
  read = {path.name: path.read_bytes() for path in out.iterdir()}
  assert set(read) == {'README.md', 'results.json', 'grid.png', 'steps.png', 'cka.png'}
  assert all(content.startswith(b'\x89PNG') and len(content) > 5000 for name, content in read.items() if '.png' in name)
  assert text.strip() in read['README.md'].decode() and read['README.md'].decode().endswith('The end.\n')
  assert '| b is above a |' in text and '`mine`: x: seeds 1, 2, a cell took 150 s' in text and '### `mine`, y' in text
  report.write(_configs(workdir), '2', workdir, out)
  assert {path.name: path.read_bytes() for path in out.iterdir()} == read


def test_claims_may_change_after_a_run_and_nothing_else_may(tmp_path):
  made = dict(task='x', seed=1, arms=('a',), claims=(), measure={'rows': 1}, order=('s',), stages={'s': {'run': 'r'}})
  where = cells.path_of(ConfigDict(made), tmp_path)
  assert cells.path_of(ConfigDict({**made, 'claims': ({'text': 'b'},)}), tmp_path) == where
  for key, value in (('seed', 2), ('measure', {'rows': 2}), ('stages', {'s': {'run': 'q'}}), ('arms', ('b',))):
    assert cells.path_of(ConfigDict({**made, key: value}), tmp_path) != where
