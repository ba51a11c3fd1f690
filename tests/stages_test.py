"""Stages run once each in folders named by what goes into them, and a changed setting never meets an old result."""

import ml_collections
import pytest

from configs import base
from srm_jax import schema, stages
from srm_jax.data import teacher_cache
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes.cached import read_identity
from tests import tiny
from tests.tiny import one_device, tiny_tasks  # noqa: F401

CALLS = []


def _make(config, workdir, done):
  """A stand-in for training: writes what it was given; its outcome is the config's number."""
  CALLS.append(workdir.name)
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / 'seen').write_text(str(config['source']))
  if config['number'] < 0:
    raise RuntimeError('killed')
  return workdir, {'greedy': {'accuracy': config['number']}}


@pytest.fixture(autouse=True)
def runners(monkeypatch):
  """'train' and 'evaluate' are stand-ins; 'select' is the real one."""
  CALLS.clear()
  for name in ('train', 'evaluate'):
    monkeypatch.setitem(stages.RUNNERS, name, _make)
    monkeypatch.setitem(stages.CHECKS, name, lambda config, where: config['number'])


def line(*, teacher=0.0, a=0.1, b=0.2, dev=0, after='{best}'):
  """teacher -> students a and b -> their evaluations -> the better one -> what is trained on it; and a's own test."""
  section = lambda run, number, source='': dict(run=run, config=dict(number=number, source=source))
  return ml_collections.ConfigDict(dict(
      order=('teacher', 'a', 'b', 'dev_a', 'dev_b', 'best', 'rl', 'test_a'),
      stages=dict(
          teacher=section('train', teacher), a=section('train', a, '{teacher}'),
          b=section('train', b, '{teacher}/file'),
          dev_a=section('evaluate', a + dev, '{a}'), dev_b=section('evaluate', b, '{b}'),
          best=dict(run='select', config=dict(candidates=dict(a='{dev_a}', b='{dev_b}'), row='greedy')),
          rl=section('train', 0.5, after), test_a=section('evaluate', 0.6, '{a}'),
      ),
  ))


def run(tmp_path, **options):
  CALLS.clear()
  done = stages.run_stages(line(**options), tmp_path)
  return done, [name.rsplit('-', 1)[0] for name in CALLS]


def test_stages_feed_each_other(tmp_path):
  reported = []
  done = stages.run_stages(line(), tmp_path, report=reported.append)
  assert [stage.name for stage in reported] == list(line().order) == list(done)
  assert (done['a'].target / 'seen').read_text() == str(done['teacher'].workdir)
  assert (done['b'].target / 'seen').read_text() == f'{done["teacher"].workdir}/file'
  assert done['best'].outcome == {'chosen': 'b', 'scores': {'a': 0.1, 'b': 0.2}}
  assert done['best'].target == done['b'].target
  assert (done['rl'].target / 'seen').read_text() == str(done['b'].target)


def test_finished_stages_are_read_back(tmp_path):
  first, _ = run(tmp_path)
  again, calls = run(tmp_path)
  assert calls == [] and again == first


def test_a_stage_that_was_killed_is_the_only_one_to_run_again(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setitem(stages.RUNNERS, 'evaluate', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      run(tmp_path)
  _, calls = run(tmp_path)
  assert calls == ['dev_a', 'dev_b', 'rl', 'test_a']


@pytest.mark.parametrize('options, rerun', [
    (dict(a=0.15), ['a', 'dev_a', 'test_a']),  # b is still chosen: rl stays
    (dict(a=0.3), ['a', 'dev_a', 'rl', 'test_a']),  # a is chosen now
    (dict(dev=0.5), ['dev_a', 'rl']),  # only its evaluation changed, and with it the choice
    (dict(teacher=0.7), ['teacher', 'a', 'b', 'dev_a', 'dev_b', 'rl', 'test_a']),
    (dict(after='{a}'), ['rl']),
])
def test_a_changed_setting_reruns_what_depends_on_it_and_nothing_else(tmp_path, options, rerun):
  before, _ = run(tmp_path)
  done, calls = run(tmp_path, **options)
  assert calls == rerun
  for name in set(before) - set(rerun) - {'best'}:
    assert done[name] == before[name]
  _, calls = run(tmp_path)  # the first line is still there
  assert calls == []


def test_a_moved_pipeline_keeps_its_results(tmp_path):
  first, _ = run(tmp_path / 'here')
  (tmp_path / 'here').rename(tmp_path / 'there')
  moved, calls = run(tmp_path / 'there')
  assert calls == [] and moved['best'].target == tmp_path / 'there' / first['b'].workdir.name


def test_a_folder_behind_a_link_is_one_folder(tmp_path):
  (tmp_path / 'real').mkdir()
  (tmp_path / 'link').symlink_to(tmp_path / 'real')
  first, _ = run(tmp_path / 'link')
  again, calls = run(tmp_path / 'link')
  assert calls == [] and again == first


def changed(path, value):
  config = line()
  *parts, last = path.split('/')
  at = config
  for part in parts:
    at = at[part]
  with at.unlocked():
    at[last] = value
  return config


@pytest.mark.parametrize('path, value, message', [
    ('order', ('teacher', 'aa'), r"stage 'aa' unknown \(did you mean 'a'"),
    ('stages/rl/run', 'trian', r"stages\.rl\.run 'trian' unknown \(did you mean 'train'"),
    ('stages/rl/config/source', '{bets}', r"stages\.rl\.source: stage 'bets' unknown \(did you mean 'best'"),
    ('stages/a/config/source', '{b}', r"stage 'b' unknown; choose from \['teacher'\]"),
    ('stages/best/config/rwo', 'greedy', r"stages\.best\.config\.rwo.*did you mean 'row'"),
])
def test_a_mistake_in_the_last_stage_is_found_before_the_first_runs(tmp_path, path, value, message):
  with pytest.raises(schema.ConfigError, match=message):
    stages.run_stages(changed(path, value), tmp_path)
  assert CALLS == []


def test_select_wants_evaluations_and_their_row(tmp_path):
  with pytest.raises(schema.ConfigError, match="evaluation .* unknown"):
    stages.run_stages(changed('stages/best/config/candidates', dict(a='{a}')), tmp_path)
  with pytest.raises(schema.ConfigError, match="row 'gredy' unknown"):
    stages.run_stages(changed('stages/best/config/row', 'gredy'), tmp_path)


def caching(teacher, **options):
  """A teacher that is there, its cache, and what is trained on that (a stand-in)."""
  cache = base.cache_teacher('{teacher}', tiny.data(), **{'k': 4, 'measured_tokens': 10, **options})
  return ml_collections.ConfigDict(dict(order=('teacher', 'cache', 'student'), stages=dict(
      teacher=dict(run='given', config=dict(folder=teacher)), cache=dict(run='cache', config=cache),
      student=dict(run='train', config=dict(number=0.5, source='{cache}')),
  )))


def test_a_cache_is_a_stage(tmp_path):
  model = TransformerConfig(258, 1, 16, 2, 2, 8, 32, max_length=64)
  teacher = tiny.write_model(tmp_path / 'teacher', model)
  done = stages.run_stages(caching(teacher), tmp_path / 'line')
  folder = (done['student'].target / 'seen').read_text()
  assert teacher_cache.verify(folder).examples == done['cache'].outcome['examples'] == 12
  assert done['cache'].outcome['teacher'] == read_identity(folder).teacher
  CALLS.clear()
  assert stages.run_stages(caching(teacher), tmp_path / 'line') == done and CALLS == []
  other = stages.run_stages(caching(teacher, k=5), tmp_path / 'line')
  assert other['cache'].workdir != done['cache'].workdir and len(CALLS) == 1
  wrong = caching(teacher)
  wrong.stages.cache.config.temprature = 1.0
  with pytest.raises(schema.ConfigError, match=r"stages\.cache\.config\.temprature.*did you mean 'temperature'"):
    stages.run_stages(wrong, tmp_path / 'wrong')
  assert not (tmp_path / 'wrong').exists()


def test_every_runner_has_a_check():
  assert stages.RUNNERS.keys() == stages.CHECKS.keys()
