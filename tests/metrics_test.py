"""Metrics are divided once, merged over steps, and written so that a stopped run continues its file."""

import json
import math
from types import SimpleNamespace

import numpy as np

from srm_jax import metrics
from srm_jax.types import Max, Mean


def test_values_divide_once():
  found = metrics.values({
      'a': Mean(np.float32(6), np.float32(4)), 'b': Max(np.float32(2)), 'c': Mean(np.float32(0), np.float32(0)),
  })
  assert found['a'] == 1.5 and found['b'] == 2.0 and math.isnan(found['c'])


def test_merged_means_weigh_by_their_counts():
  steps = [
      {'a': Mean(np.float32(0), np.float32(1)), 'b': Max(np.float32(5))},
      {'a': Mean(np.float32(3), np.float32(3)), 'b': Max(np.float32(2))},
  ]
  assert metrics.values(metrics.merge(steps)) == {'a': 0.75, 'b': 5.0}
  assert metrics.merge(steps[:1]) == steps[0]


def test_rows_beyond_the_checkpoint_are_written_again(tmp_path):
  writer = metrics.open_writer(tmp_path, step=0)
  for step in (1, 2, 3):
    writer.write(step, {'loss': step / 2})
  writer.close()
  again = metrics.open_writer(tmp_path, step=2)
  again.write(3, {'loss': 9.0})
  again.close()
  assert metrics.read(tmp_path) == [{'step': 1, 'loss': 0.5}, {'step': 2, 'loss': 1.0}, {'step': 3, 'loss': 9.0}]
  assert list((tmp_path / 'tensorboard').glob('events*'))


def test_a_mean_over_nothing_is_no_point_on_the_board(tmp_path):
  writer = metrics.open_writer(tmp_path, step=0)
  drawn = []
  writer._replace(board=SimpleNamespace(add_scalar=lambda *point: drawn.append(point))).write(
      1, {'length_right': math.nan, 'loss': 2.0}
  )
  writer.close()
  assert drawn == [('loss', 2.0, 1)] and math.isnan(metrics.read(tmp_path)[0]['length_right'])


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text(json.dumps({'step': 1}) + '\n{"step": 2, "lo')
  assert metrics.read(tmp_path) == [{'step': 1}]
  metrics.open_writer(tmp_path, step=5).write(6, {})
  assert metrics.read(tmp_path) == [{'step': 1}, {'step': 6}]


def test_no_file_no_rows(tmp_path):
  assert metrics.read(tmp_path) == []


def test_figures_stay_on_the_bar_until_newer_ones():
  with metrics.progress('train', 4, done=1, disable=True) as bar:
    bar.advance(0, loss=0.12345)
    bar.advance(1)
    task = bar.bar.tasks[0]
    assert (task.completed, task.total, task.fields['figures']) == (2, 4, 'loss 0.1235')
