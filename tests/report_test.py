import json

import ml_collections
import numpy as np
import pytest

from srm_jax import report, schema


def _run(folder, rows, **config):
  folder.mkdir(parents=True)
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  (folder / 'config.json').write_text(json.dumps(config))


def _cell(seed, settings=None, problems='same', **rows):
  made = {
      name: {'accuracy': float(np.mean(right)), 'n': len(right), 'correct': report.pack(right), 'problems': problems}
      for name, right in rows.items()
  }
  return {'settings': settings or {}, 'seed': seed, 'rows': made, 'metrics': {'train': {'loss': float(seed)}}}


def test_load_gives_a_row_a_run_and_step_with_the_config_flattened(tmp_path):
  rows = [{'step': 1, 'loss': 2.0}, {'step': 2, 'loss': 1.0}]
  _run(tmp_path / 'x' / 'a', rows, optimizer={'learning_rate': 0.1}, mesh=[])
  _run(tmp_path / 'b', [{'step': 1, 'loss': 3.0}], optimizer={'learning_rate': 0.2}, mesh=[1, 2, 1])
  frame = report.load(tmp_path)
  assert frame['loss'].tolist() == [3.0, 2.0, 1.0]
  assert frame['config.optimizer.learning_rate'].tolist() == [0.2, 0.1, 0.1]
  assert frame['config.mesh'].tolist() == [(1, 2, 1), (), ()]
  assert len(report.load([tmp_path / 'b'])) == 1
  header, rows = report.runs_table(frame, ['loss'])
  assert header == ['run', 'step', 'loss', 'optimizer.learning_rate', 'mesh']
  assert [row[1:4] for row in rows] == [['1', '3', '0.2'], ['2', '1', '0.1']]
  with pytest.raises(schema.ConfigError, match="'los'.*did you mean 'loss'"):
    report.runs_table(frame, ['los'])


def test_alarms_are_those_of_every_run_where_they_rang_first(tmp_path):
  _run(tmp_path / 'rl', [{'step': i, 'reward': 0.0, 'unscorable': 0.3 * (2 <= i < 14)} for i in range(1, 31)])
  _run(tmp_path / 'sft', [{'step': i, 'loss': 0.0, 'unscorable': 1.0} for i in range(1, 31)])
  header, rows = report.alarms_table(report.load(tmp_path))
  assert [dict(zip(header, row))['alarm'] for row in rows] == ['unscorable'] and len(header) == len(rows[0])
  assert rows[0][:2] == [str(tmp_path / 'rl'), '10'] and 'config.recipe.data' in rows[0][-1]


def test_load_says_which_folder_is_missing_or_empty(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere'):
    report.load([tmp_path, tmp_path / 'nowhere'])
  with pytest.raises(FileNotFoundError, match='metrics.jsonl'):
    report.load(tmp_path)


def test_settings_are_split_at_commas_outside_brackets_and_multiplied():
  settings = report.parse_settings(['a.b=1e-3,2', 'mesh=(1,8,1),()', "name='x,y'"])
  assert settings == {'a.b': ['1e-3', '2'], 'mesh': ['(1,8,1)', '()'], 'name': ["'x,y'"]}
  combined = report.product(settings)
  assert len(combined) == 4 and combined[1] == {'a.b': '1e-3', 'mesh': '()', 'name': "'x,y'"}
  assert report.product({}) == [{}]
  for wrong in (['a'], ['a='], ['=1']):
    with pytest.raises(schema.ConfigError, match='KEY=VALUE'):
      report.parse_settings(wrong)
  with pytest.raises(schema.ConfigError, match='twice'):
    report.parse_settings(['a=1', 'a=2'])


def test_assign_keeps_text_where_text_stands_and_names_near_keys():
  config = ml_collections.ConfigDict({'a': {'rate': 1, 'name': 'x', 'chunk': None, 'on': False}, 'mesh': ()})
  for key, text in (('a.rate', '1e-3'), ('a.name', '7'), ('a.chunk', '0'), ('a.on', 'true'), ('mesh', '(1,8,1)')):
    report.assign(config, key, text)
  assert config.to_dict() == {'a': {'rate': 1e-3, 'name': '7', 'chunk': 0, 'on': True}, 'mesh': (1, 8, 1)}
  with pytest.raises(schema.ConfigError, match="a.rat'.*did you mean 'rate'"):
    report.assign(config, 'a.rat', '1')
  with pytest.raises(schema.ConfigError, match='a.rate.x'):
    report.assign(config, 'a.rate.x', '1')


def test_a_plain_config_becomes_a_line_of_one_stage():
  line = report.as_pipeline(ml_collections.ConfigDict({'strategies': {'greedy': {}, 'vote': {}}, 'seed': 1}))
  assert line.order == ('evaluate',) and line.stages.evaluate.config.seed == 1
  assert report.row_names(line) == ['greedy', 'vote']
  longer = {'order': ('t', 'e'), 'stages': {
      't': {'run': 'train'}, 'e': {'run': 'evaluate', 'config': {'strategies': {'greedy': {}}}},
  }}
  assert report.row_names(longer) == ['e.greedy']
  assert report.as_pipeline(ml_collections.ConfigDict(longer)).order == ('t', 'e')
  with pytest.raises(schema.ConfigError, match='recipe'):
    report.as_pipeline(ml_collections.ConfigDict({'nothing': 1}))


def test_grades_survive_packing():
  right = [1.0, 0.0, 0.0, 1.0]
  assert report.pack(right) == '1001'
  assert report.unpack('1001').tolist() == right


def test_a_label_is_short_where_that_is_unambiguous():
  assert report.label({}) == 'as configured'
  assert report.label({'a.rate': '1', 'b.size': '2'}) == 'rate=1, size=2'
  assert report.label({'a.rate': '1', 'b.rate': '2'}) == 'a.rate=1, b.rate=2'


def test_summary_is_the_mean_and_spread_over_seeds():
  cells = [_cell(1, {'a.x': '1', 'b': '0'}, greedy=[1, 1, 0, 0]), _cell(2, {'a.x': '1', 'b': '0'}, greedy=[1, 0, 0, 0])]
  cells += [_cell(2, {'a.x': '2', 'b': '0'}, greedy=[1, 1, 1, 1])]
  first, second = report.summarize(cells)
  assert (first.setting, first.accuracy, first.seeds, first.n) == ('x=1', 0.375, 2, 8)  # b is the same in all
  np.testing.assert_allclose(first.deviation, 0.25 / np.sqrt(2))
  assert (second.setting, second.accuracy, second.seeds) == ('x=2', 1.0, 1) and np.isnan(second.deviation)
  assert report.records([second])[0]['deviation'] is None
  header, rows = report.metrics_table(cells)
  assert rows[0][1:4] == ['train', 'loss', '1.5'] and len(header) == len(rows[0])


def test_settings_are_compared_with_the_first_on_shared_seeds_and_problems():
  low, high = [0] * 40 + [1] * 20, [1] * 30 + [0] * 10 + [1] * 20
  cells = [_cell(seed, {'x': '1'}, greedy=low) for seed in (1, 2, 3)]
  cells += [_cell(seed, {'x': '2'}, greedy=high) for seed in (2, 3, 4)]
  cells += [_cell(1, {'x': '3'}, 'others', greedy=high)]
  test, = report.compare_settings(cells)
  assert (test.a, test.b, test.seeds, test.seeds_above) == ('greedy [x=2]', 'greedy [x=1]', 2, 2)
  assert test.difference == 0.5 and test.p < 1e-3 and test.low > 0.3
  reverse, = report.compare_settings(cells[3:6] + cells[:3])
  assert reverse.difference == -0.5 and reverse.seeds_above == 0
  assert report.compare_settings([]) == []


def test_rows_are_compared_within_each_setting():
  cells = [_cell(seed, base=[0, 1, 0, 1], better=[1, 1, 0, 1]) for seed in (1, 2)]
  test, = report.compare_rows(cells, report.parse_pairs(['better:base'], ['base', 'better']))
  assert (test.difference, test.seeds) == (0.25, 2)
  with pytest.raises(schema.ConfigError, match="'bas'.*did you mean 'base'"):
    report.parse_pairs(['better:bas'], ['base', 'better'])
  with pytest.raises(schema.ConfigError, match='ROW:ROW'):
    report.parse_pairs(['better'], ['base', 'better'])
  other = _cell(1, problems='others', hard=[0, 1])
  cells[0]['rows'] |= other['rows']
  with pytest.raises(schema.ConfigError, match='same problems'):
    report.compare_rows(cells, [('base', 'hard')])


def test_markdown_has_a_line_a_row_and_escapes_bars():
  tests = report.compare_rows([_cell(1, a=[1, 0], b=[0, 0])], [('a', 'b')])
  text = report.markdown(report.comparison_table(tests))
  assert text.splitlines()[1].count('---') == 7 and '+50.0' in text and '1 of 1 seeds' in text
  assert report.markdown((['h'], [['a|b']])).splitlines()[-1] == '| a\\|b |'
