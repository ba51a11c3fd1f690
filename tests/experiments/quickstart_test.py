"""The quickstart's numbers, tables and page on a line that was never trained, and its start, restart and budget."""

import json
import re
import shutil
import xml.etree.ElementTree

import numpy as np
import pytest
import rich.console

from configs import quickstart
from experiments.quickstart import __main__ as main
from experiments.quickstart import calibrate, cases, estimate, findings, page, record, reference, sentences, table
from srm_jax import schema, stages, statistics
from tests import browser
from tests.experiments import synthetic_line

COUNT = 90


@pytest.fixture(scope='module')
def line(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('line')
  return workdir, synthetic_line.make(workdir, count=COUNT)


@pytest.fixture(scope='module')
def found(line):
  return findings.collect(line[1])


@pytest.fixture(scope='module')
def known(tmp_path_factory, line):
  """A reference of three seeds, the first of them the line itself."""
  runs = [line[1], *(synthetic_line.make(tmp_path_factory.mktemp('seed'), count=COUNT, seed=100 * s) for s in (1, 2))]
  about = dict(command='', task='arithmetic_mix', size='full', steps=1.0, dtype='float32', seeds=[1, 2, 3])
  path = tmp_path_factory.mktemp('reference') / 'reference.json'
  path.write_text(json.dumps(reference.summarize(runs, about)))
  return reference.read(path)


def _correct(line, stage, row='greedy'):
  return np.array(findings.results(line[1][stage])[row]['correct'])


def test_rows_hold_the_scores_and_tests_of_the_stages(line, found):
  control, small = _correct(line, 'test_sft_gold'), _correct(line, 'test_sft_small')
  row = found.rows['sft_gold']
  assert row.score.accuracy == pytest.approx(control.mean()) and row.score.n == COUNT
  assert (row.score.low, row.score.high) == pytest.approx(statistics.wilson_interval(control.sum(), COUNT))
  assert row.compared == findings.Compared('sft_small', statistics.paired_test(control, small))
  assert row.retention == pytest.approx(control.mean() / _correct(line, 'test_teacher').mean())
  assert row.hard.accuracy == pytest.approx(_correct(line, 'hard_sft_gold').mean())
  assert sum(n for _, n in row.by_steps.values()) == COUNT
  assert sum(right for right, _ in row.by_steps.values()) == control.sum()


def test_rl_is_compared_with_the_arm_that_dev_chose(line, found):
  assert found.best == 'on_policy' and found.rows['rl'].compared.against == 'on_policy'
  test = statistics.paired_test(_correct(line, 'test_rl'), _correct(line, 'test_on_policy'))
  assert found.rows['rl'].compared.test == test


def test_flops_add_up_along_the_line(line, found):
  own = {name: findings.spent(line[1][name]) for name in ('teacher', 'base', 'logits', 'on_policy', 'rl', 'annotate')}
  taught = own['teacher'] + own['annotate']
  assert found.rows['logits'].flops == own['base'] + own['logits']
  assert found.rows['logits'].flops_with_teacher == found.rows['logits'].flops + taught
  assert found.rows['sft_gold'].flops_with_teacher == found.rows['sft_gold'].flops
  assert found.rows['rl'].flops == own['base'] + own['on_policy'] + own['rl']
  assert found.rows['rl'].flops_with_teacher == found.rows['rl'].flops + own['teacher']


def test_strategies_count_all_samples_and_what_the_teacher_reads(found):
  spent = {name: (row.sampled, row.scored) for name, row in found.strategies.items()}
  assert spent == {
      'direct': (30, 0), 'greedy': (30, 0), 'sample': (30, 0), 'majority': (240, 0), 'best_of_n': (240, 336)
  }
  assert found.strategies['majority'].compared.against == 'sample'
  assert found.strategies['best_of_n'].compared.against == 'majority'
  assert found.strategies['best_of_n'].flops > found.strategies['majority'].flops


@pytest.mark.parametrize('task', ['arithmetic_mix', 'gsm8k'])
def test_steps_are_what_the_config_trains(task):
  made = schema.resolve(quickstart.get_config(f'task={task},size=smoke'))['stages']
  for name, step in findings.STEPS.items():
    config = made[name]['config']
    start = {'teacher': '', 'base': '', 'rl': findings.BEST}.get(name, '{base}')
    assert f'test_{name}' in made and config['init_from'] == start and step.trained[-1] == name
    helped = {part for part, mark in (('teacher', '{teacher}'), ('annotate', 'completion'))
              if mark in json.dumps(config['recipe']).replace('max_new_tokens', '')}
    if 'completion' in json.dumps(config['recipe']):
      helped.add('teacher')
    assert set(step.helped) - {findings.BEST} == helped, name
  assert set(findings.STRATEGIES) == set(made['strategies']['config']['strategies'])
  assert set(made['best']['config']['candidates']) == set(findings.STEPS) - {'teacher', 'base', 'rl'}


def test_an_unfinished_line_is_named(line):
  part = {name: stage for name, stage in line[1].items() if name != 'test_rl'}
  with pytest.raises(schema.ConfigError, match='test_rl'):
    findings.collect(part)


@pytest.mark.parametrize('value, text', [(0.0004, '< .001'), (0.0321, '.032'), (0.1, '.10'), (1.0, '1.00')])
def test_probability(value, text):
  assert table.probability(value) == text


@pytest.mark.parametrize('value, text', [(0, '0'), (1.24e13, '1.2·10¹³'), (9.97e8, '1.0·10⁹'), (5.0, '5.0·10⁰')])
def test_quantity(value, text):
  assert table.quantity(value) == text


@pytest.mark.parametrize('width', [80, 100, 200])
def test_terminal_table_fits(found, width):
  console = rich.console.Console(width=width, record=True, file=open('/dev/null', 'w'))
  table.show(found, console)
  text = console.export_text()
  assert '…' not in text and max(map(len, text.splitlines())) <= width
  assert all(step.title in text for step in findings.STEPS.values())
  assert ('FLOPs/answer' in text) == (width == 200)


def test_markdown_has_a_line_a_row(found):
  text = table.markdown(found)
  lines = [line for line in text.splitlines() if line.startswith('|')]
  assert len(lines) == 4 + len(findings.STEPS) + len(findings.STRATEGIES)
  assert table.points(found.rows['logits'].compared.test.difference) in text


def test_cases_are_of_their_kind(line, found):
  gained, failed = cases.find(line[1], found)
  answers = {name: _correct(line, f'test_{name}') for name in findings.STEPS}
  expected = answers['teacher'] & ~answers['sft_gold'].astype(bool) & answers[found.best_distilled]
  assert gained.matching == expected.sum() and [one.right for one in gained.tries] == [True, False, True]
  wrong = gained.tries[1]
  assert wrong.lines[wrong.wrong] != gained.solution.splitlines()[wrong.wrong]
  assert wrong.lines[: wrong.wrong] == gained.solution.splitlines()[: wrong.wrong]
  assert failed.matching == (sum(answers.values()) == 0).sum() and not any(one.right for one in failed.tries)


def test_prediction_interval_golden():
  # s is the binomial spread, 0.05; t(4) = 2.776445; 2.776445 * 0.05 * sqrt(6 / 5) = 0.152073
  assert reference.prediction_interval([0.5] * 5, 100) == pytest.approx((0.347927, 0.652073), abs=1e-6)
  # s = 0.1 of (0.4, 0.5, 0.6) is wider than it; t(2) = 4.302653; 4.302653 * 0.1 * sqrt(4 / 3) = 0.496828
  assert reference.prediction_interval([0.4, 0.5, 0.6], 1000) == pytest.approx((0.003172, 0.996828), abs=1e-5)


def test_prediction_interval_covers_new_runs():
  rng = np.random.default_rng(0)
  runs = rng.normal(0.5, 0.05, (1500, 6))
  ends = np.array([reference.prediction_interval(row[:5], 10**6) for row in runs])
  assert np.mean((ends[:, 0] <= runs[:, 5]) & (runs[:, 5] <= ends[:, 1])) == pytest.approx(0.95, abs=0.02)


def test_reference_pools_seeds(known, found):
  logits = next(one for one in known.comparisons if (one['row'], one['against']) == ('logits', 'sft_gold'))
  assert logits['seeds'] == 3 and logits['gains'] == sum(gain > 0 for gain in logits['by_seed'])
  assert logits['by_seed'][0] == pytest.approx(found.rows['logits'].compared.test.difference)
  assert known.bands['rl'].low < known.bands['rl'].mean < known.bands['rl'].high
  assert {one['row'] for one in known.comparisons} == {
      name for name, step in findings.STEPS.items() if step.against} | {'majority', 'best_of_n'}


def test_the_table_of_the_reference_has_every_row_with_its_pooled_test(line, known):
  runs = [line[1], line[1]]
  content = json.loads(json.dumps(reference.summarize(runs, {})))
  lines = reference.markdown(content).splitlines()
  assert [row.split('|')[1].strip() for row in lines if row.startswith('| ')] == [
      'Step', *(step.title for step in findings.STEPS.values()),
      'Strategy', *(row.title for row in findings.collect(line[1]).strategies.values()),
  ]
  rl, accuracy = next(row for row in lines if row.startswith('| RL')), _correct(line, 'test_rl').mean()
  assert f'| {100 * accuracy:.1f} | {100 * accuracy:.1f}–{100 * accuracy:.1f} |' in rl and 'over best arm' in rl
  assert {row.count('|') for row in lines if row} == {7}


def test_a_row_outside_its_band_is_flagged(found, known):
  assert sentences.against_reference(found, known, synthetic_line.SETTINGS)[0] == []
  moved = known._replace(bands=known.bands | {'hidden': reference.Band(0.1, 0.1, 0.1, 0.0, 0.2)})
  outside, text = sentences.against_reference(found, moved, synthetic_line.SETTINGS)
  assert outside == ['hidden'] and findings.STEPS['hidden'].title in text


@pytest.mark.parametrize('change', [{'size': 'smoke'}, {'task': 'gsm8k'}, {'steps': 0.5}])
def test_a_reference_of_another_setting_draws_no_band(found, known, change):
  settings = synthetic_line.dataclasses.replace(synthetic_line.SETTINGS, **change)
  outside, text = sentences.against_reference(found, known, settings)
  assert outside == [] and next(iter(change)) in text and 'no band' in text


@pytest.mark.parametrize(('size', 'wrong'), [('full', False), ('smoke', True)])
def test_a_line_that_learns_from_wrong_annotations_says_so(tmp_path, size, wrong):
  settings = synthetic_line.dataclasses.replace(synthetic_line.SETTINGS, size=size)
  stages = synthetic_line.make(tmp_path, count=50, settings=settings)
  assert findings.learns_from_wrong(stages) == wrong
  found = findings.collect(stages)
  assert (sentences.UNFILTERED in page.render(page.Report(settings, stages, found, [], None, 0.03))) == wrong


def _page(line, found, known, **change):
  settings = synthetic_line.dataclasses.replace(synthetic_line.SETTINGS, **change)
  return page.render(page.Report(settings, line[1], found, cases.find(line[1], found), known, 0.03))


@pytest.fixture(scope='module')
def rendered(line, found, known):
  moved = known._replace(bands=known.bands | {'hidden': reference.Band(0.1, 0.1, 0.1, 0.0, 0.2)})
  return _page(line, found, moved)


def test_page_is_self_contained(rendered):
  text = rendered.replace('http://www.w3.org/', '')
  assert not re.search(r'https?:|<link|<script|src=|@import|url\((?!#)', text)


def test_page_says_what_it_must(rendered):
  for text in ('What this does not show', 'outside its band', 'chance 3.0 %', 'first wrong step', 'Majority of 8'):
    assert text in rendered, text
  assert 'seed 1234' in rendered and all(step.title in rendered for step in findings.STEPS.values())


def test_pictures_are_well_formed_and_share_no_id(rendered):
  pictures = re.findall(r'<svg .*?</svg>', rendered, flags=re.DOTALL)
  assert len(pictures) == 5
  ids = []
  for picture in pictures:
    root = xml.etree.ElementTree.fromstring(picture)
    ids.append({element.get('id') for element in root.iter()} - {None})
  assert len(set.union(*ids)) == sum(map(len, ids))


def test_human_written_problems_come_with_their_sentence(line, found):
  assert 'near zero' in _page(line, found, None, task='gsm8k') and 'near zero' not in _page(line, found, None)


def test_a_line_that_never_is_right_has_a_page_too(line, found):
  nothing = findings.Score(0.0, 1e-18, 0.04, COUNT)
  rows = {
      name: row._replace(score=nothing, retention=float('nan'), by_steps={1: (0, 7)}, hard=None)
      for name, row in found.rows.items()
  }
  strategies = {name: row._replace(score=nothing) for name, row in found.strategies.items()}
  never = found._replace(rows=rows, strategies=strategies)
  text = page.render(page.Report(synthetic_line.SETTINGS, line[1], never, [], None, 0.03))
  assert '0.0 (0.0–4.0)' in text and not re.search(r'\bnan\b', text, flags=re.IGNORECASE)


def test_completions_are_escaped():
  case = cases.Case('kind', 'Is 1 < 2?', '#### <b>', [cases.Try('Teacher', ['<script>'], False, 0)], 1, 2)
  text = page._case(case)
  assert '<script>' not in text and '&lt;script&gt;' in text and '#### <b>' not in text


@pytest.mark.parametrize('width', [500, 1280])
def test_page_does_not_overflow_in_a_browser(rendered, tmp_path, width):
  sizes = '[document.documentElement.scrollWidth, innerWidth].join()'
  wide, there = map(int, browser.evaluate(rendered, sizes, tmp_path, width=width).split(','))
  assert wide <= there


def test_record_survives_a_move(line, tmp_path):
  shutil.copytree(line[0], tmp_path / 'moved')
  settings, moved = record.load(tmp_path / 'moved')
  assert settings == synthetic_line.SETTINGS and findings.collect(moved) == findings.collect(line[1])
  assert all(str(tmp_path) in str(stage.target) for stage in moved.values())


def test_record_refuses(tmp_path):
  with pytest.raises(schema.ConfigError, match='no quickstart'):
    record.load(tmp_path)
  (tmp_path / record.FILE).write_text('{')
  with pytest.raises(schema.ConfigError, match='damaged'):
    record.read(tmp_path)


def test_fresh_seeds_are_neither_development_nor_reference():
  seeds = {record.fresh_seed() for _ in range(200)}
  assert len(seeds) > 100 and not seeds & {*record.DEVELOPMENT, *record.REFERENCE}


SPEED = calibrate.Speed('float32', {'teacher': 4e-5, 'student': 1e-5}, {'teacher': 8e-5, 'student': 2e-5}, 3.0, {}, 0.0)


def _make(steps):
  return quickstart.get_config(f'size=full,steps={steps:g}')


def test_estimate_fits_the_budget_as_tightly_as_it_can():
  whole = sum(estimate.seconds(_make(1.0), SPEED).values())
  assert estimate.fit(_make, SPEED, whole + 1)[0] == 1.0
  factor, seconds = estimate.fit(_make, SPEED, 0.8 * whole)
  assert 0.05 < factor < 1 and sum(seconds.values()) <= 0.8 * whole + 2
  assert sum(estimate.seconds(_make(factor + 0.03), SPEED).values()) > 0.8 * whole


def test_what_was_shortened_is_said():
  settings = synthetic_line.dataclasses.replace(synthetic_line.SETTINGS, steps=0.4, calibration={'whole': 1800.0})
  assert sentences.shortened(synthetic_line.SETTINGS) == ''
  said = sentences.shortened(settings)
  assert '30 minutes' in said and '40% of its steps, to fit 12' in said


def test_estimate_counts_the_teacher_and_the_sampling():
  seconds = estimate.seconds(_make(1.0), SPEED)
  assert seconds['teacher'] > seconds['base'] and seconds['logits'] > seconds['sft_annotations']
  assert set(seconds) == set(_make(1.0).order) and seconds['best'] == 0
  double = SPEED._replace(decode={name: 2 * value for name, value in SPEED.decode.items()})
  more = estimate.seconds(_make(1.0), double)
  assert more['rl'] > seconds['rl'] and more['logits'] == seconds['logits'] and more['annotate'] > seconds['annotate']


def test_calibration_without_time_extrapolates_from_products():
  config = quickstart.get_config('size=smoke')
  speed = calibrate.calibrate(config, limit=0.0)
  assert speed.dtype == calibrate.choose(speed.products, {}) and speed.compile == 0
  assert 0 < speed.train['student'] < speed.train['teacher'] and 0 < speed.decode['student'] < speed.decode['teacher']


def test_bfloat16_must_be_clearly_faster():
  rates = {'float32': 1.0, 'bfloat16': 5.0}
  assert calibrate.choose(rates, {}) == 'bfloat16'
  assert calibrate.choose({'float32': 1.0, 'bfloat16': 1.5}, {}) == 'float32'
  assert calibrate.choose(rates, {'float32': 1.0, 'bfloat16': 0.95}) == 'float32'
  assert calibrate.choose(rates, {'float32': 1.0, 'bfloat16': 0.5}) == 'bfloat16'


def test_machine_names_nobody():
  text = json.dumps(calibrate.machine())
  assert 'jax' in text and '/' not in text


def test_a_second_start_continues_the_first(tmp_path, monkeypatch, line):
  asked = []

  def run_stages(config, workdir, *, report):
    asked.append(schema.resolve(config))
    for stage in line[1].values():
      (stage.workdir / 'done.json').write_text('{}')
      report(stage)
    raise KeyboardInterrupt

  monkeypatch.setattr(stages, 'run_stages', run_stages)
  speed = SPEED._replace(dtype='bfloat16', products={'float32': 1e9})
  monkeypatch.setattr(calibrate, 'calibrate', lambda config, *, limit: speed)
  console = rich.console.Console(file=open('/dev/null', 'w'))
  for minutes in (1.0, 500.0):  # what the first start chose holds, whatever the second is told
    with pytest.raises(KeyboardInterrupt):
      main.run('arithmetic_mix', 'full', None, minutes, tmp_path / 'run', console)
  assert asked[0] == asked[1]
  settings = record.read(tmp_path / 'run')
  assert settings.dtype == 'bfloat16' and settings.steps == estimate.SMALLEST
  assert 'still leaves' in sentences.shortened(settings)  # of one minute, evaluation alone takes more
  with pytest.raises(schema.ConfigError, match='another --workdir'):
    main.run('arithmetic_mix', 'full', settings.seed + 1, 12.0, tmp_path / 'run', console)


def test_finish_writes_report_and_table(line, tmp_path):
  shutil.copytree(line[0], tmp_path / 'run')
  with open('/dev/null', 'w') as nowhere:
    path = main.finish(tmp_path / 'run', rich.console.Console(file=nowhere, width=100))
  assert path.read_text().startswith('<!doctype html>')
  assert (tmp_path / 'run' / 'table.md').read_text().startswith('| Step')
