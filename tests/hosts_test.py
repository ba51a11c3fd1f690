"""Several hosts are one run: the tokens, rewards and numbers of one process, every completion graded once."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import base
from experiments import runtime
from srm_jax import hosts, metrics
from srm_jax.models import heads
from srm_jax.models.config import TransformerConfig
from srm_jax.train import train
from tests import tiny, two_hosts
from tests.processes import finish, start
from tests.tiny import tiny_tasks  # noqa: F401

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODEL = TransformerConfig(258, 1, 16, 2, 2, 8, 32, max_length=64)


def free_port():
  with socket.socket() as found:
    found.bind(('localhost', 0))
    return str(found.getsockname()[1])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A policy to start from, and a reward model."""
  path = tmp_path_factory.mktemp('hosts')
  tiny.write_model(path / 'start', MODEL, scale=3.0)
  recipe = base.reward_model(tiny.data(), tiny.batch(), target='outcome')
  (path / 'judge').mkdir()
  (path / 'judge' / 'config.json').write_text(json.dumps({'recipe': recipe.to_dict(), 'adapters': {'rank': 0}}))
  head = heads.init_value_head(jax.random.key(3), 16)
  tiny.write_model(path / 'judge', MODEL, seed=1, scale=3.0, extra={'value_head': head})
  return path


@pytest.fixture(scope='module')
def pair(folder):
  """The folder of two processes that have done tests/two_hosts.py, and what each of them found."""
  path, port = folder / 'pair', free_port()
  path.mkdir()
  command = lambda host: [sys.executable, '-m', 'tests.two_hosts', str(host), port, str(path)]
  run = lambda host: subprocess.Popen(
      command(host), cwd=ROOT, env=os.environ | {'PYTHONPATH': str(ROOT)}, stderr=subprocess.PIPE, text=True
  )
  started = [run(0), run(1)]
  try:
    errors = [process.communicate(timeout=400)[1] for process in started]
  finally:
    for process in started:
      process.kill()
  assert [process.returncode for process in started] == [0, 0], '\n'.join(error[-3000:] for error in errors)
  return path, [json.loads((path / f'found{host}.json').read_text()) for host in (0, 1)]


@pytest.fixture(scope='module')
def alone(folder):
  """The whole run in this process: its metrics, its rollouts, and the folder with its grades."""
  path = folder / 'alone'
  path.mkdir()
  with two_hosts.watched(path) as made:
    run = train(two_hosts.config(folder), path / 'run')
  return run, made, path


def grades(folder):
  """[problem, text, host] of every grade, in the order in which they were given."""
  return [json.loads(line) for line in (folder / 'grades.txt').read_text().splitlines()]


def test_one_process_is_all_hosts():
  assert hosts.gather('x') == ['x'] and hosts.first(lambda: 3) == 3
  assert hosts.deal(lambda item: 2 * item, [1, 2, 3]) == [2, 4, 6]
  with pytest.raises(ZeroDivisionError):
    hosts.together(lambda: 1 // 0)


def test_hosts_tell_each_other(pair):
  for found in pair[1]:
    both = [{'host': host, 'number': float(np.float32(0.1)), 'text': 'é' * (1 + 9 * host)} for host in (0, 1)]
    assert found['told'] == {
        'gather': both, 'first': 7, 'deal': [['a', 0], ['b', 1], ['c', 0], ['d', 1], ['e', 0]], 'whole': [0, 0, 1, 1],
    }


def test_rows_of_all_hosts_are_on_the_mesh_however_it_holds_them(pair):
  assert pair[1][0]['rows'] == pair[1][1]['rows']
  for name, rows in pair[1][0]['rows'].items():
    count = int(name.split()[-1])
    assert rows == [*range(count), *range(10, 10 + count)], name


def test_two_hosts_draw_the_tokens_and_rewards_of_one_process(pair, alone):
  path, (_, made, _) = pair[0], alone
  expected = two_hosts.arrays(made)
  assert len({rewards for turn in made for rewards in turn.rewards.tolist()}) > 8  # the judge tells rows apart
  for host in (0, 1):
    found = dict(np.load(path / f'rollouts{host}.npz'))
    assert len(found) == 3 * 3
    for name, array in found.items():
      if name.startswith('rewards'):
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, err_msg=name)
      else:
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_every_completion_is_graded_once(pair, alone):
  found, expected = grades(pair[0]), grades(alone[2])
  assert {host for *_, host in found} == {0, 1} and len(expected) > len(found) >= 3 * 8
  assert sorted(row[:2] for row in found) == sorted(row[:2] for row in expected[: len(found)])


def test_one_process_continues_what_two_hosts_began(pair, alone):
  """With the groups that were carried, the pass rates, and the rollouts of a turn that is half done."""
  path, (whole, made, _) = pair[0], alone
  stopped = metrics.read(path / 'run')
  assert [row['step'] for row in stopped] == [*range(1, two_hosts.STOPPED + 1)]
  with two_hosts.watched(path) as more:
    run = train(two_hosts.config(path.parent), path / 'run')
  np.testing.assert_array_equal(more[0].batch.targets, made[3].batch.targets)
  assert len(more) == 1 and len(made) == 4
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), run.params, whole.params)
  for row, expected in zip(run.metrics, whole.metrics, strict=True):
    assert row.keys() == expected.keys()
    for name in row.keys() - {'seconds_per_step'}:
      assert row[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5, nan_ok=True), name


def test_a_reward_that_fails_on_one_host_counts_the_same_on_all(pair):
  for found in pair[1]:
    assert found['valid'] == [1, 1, 1, 1, 0, 0, 0, 0]  # the second host grades the second group


def test_the_same_command_on_two_hosts_is_one_run(folder):
  """experiments.train with --hosts, a device each, against one process; and what a user's slips say."""
  command = [
      '-m', 'experiments.train', f'--config=configs/rl/grpo.py:start={folder}/start,smoke', '--config.progress=False',
      '--config.model.embed_dim=16', '--config.model.num_layers=1', '--config.model.num_heads=2',
      '--config.model.num_kv_heads=2', '--config.model.head_dim=8', '--config.model.mlp_dim=32',
      '--config.model.max_length=64', '--config.recipe.rollouts.length=56', '--config.recipe.rollouts.max_new_tokens=8',
      '--config.recipe.rollouts.cut=learn', '--config.recipe.data.task=running_sums', '--config.log_every=1',
      '--workdir={workdir}',
  ]
  port = free_port()
  for process in [start([*command, f'--hosts=localhost:{port},2,{host}'], folder / 'two') for host in (0, 1)]:
    finish(process)
  finish(start(command, folder / 'one'))
  two, one = metrics.read(folder / 'two'), metrics.read(folder / 'one')
  assert [row['step'] for row in two] == [1, 2]
  for name in ('loss', 'reward', 'grad_norm', 'completion_tokens', 'flops'):
    assert [row[name] for row in two] == pytest.approx([row[name] for row in one], rel=1e-3, abs=1e-6), name
  for slip in ('two', 'localhost:1,2,2', 'localhost,2,0'):
    with pytest.raises(ValueError, match='INDEX from 0 to COUNT - 1'):
      runtime.join_hosts(slip)


def test_an_error_of_one_host_ends_all(pair):
  first, second = (found['ended'] for found in pair[1])
  assert second == 'OSError: no such verifier here'
  assert first == 'HostError: host 1 of 2 raised OSError: no such verifier here; the log of that host says where'
