"""Inner epochs: every row once an epoch, the trainer asked once a turn, and a turn that survives a restart."""

import json

import jax
import numpy as np
import pytest

from srm_jax import schema
from srm_jax.recipes import updates
from srm_jax.rollout import outcomes
from srm_jax.types import Source
from tests import tiny
from tests.rollout_test import groups  # noqa: F401


def numbered(turn):
  """Rollouts whose rewards tell the turn and the row."""
  made = tiny.random_rollouts(turn)
  return made._replace(rewards=np.arange(8, dtype=np.float32) + 100 * turn)


class Inner:
  """A source that counts what it is asked."""

  def __init__(self):
    self.asked, self.state = [], {}

  def next(self, params, step):
    self.asked.append((params, step))
    return numbered(step)

  def source(self):
    return Source(self.next, lambda: {'asked': len(self.asked)}, self.state.update)


def make(epochs, minibatches, finish=lambda params, rollouts: rollouts, group=1):
  inner = Inner()
  config = schema.parse(updates.UpdatesConfig, dict(epochs=epochs, minibatches=minibatches), 'updates')
  return inner, updates.repeated(inner.source(), config, 1, group=group, finish=finish)


def test_one_update_hands_the_rollouts_through():
  inner, source = make(1, 1)
  assert source.next('a', 3).rewards.tolist() == numbered(3).rewards.tolist()
  assert inner.asked == [('a', 3)] and source.get_state()['held'] is None


def test_every_row_comes_once_an_epoch_in_an_order_of_its_own():
  inner, source = make(2, 4)
  drawn = [source.next(step, step) for step in range(16)]
  assert inner.asked == [(0, 0), (8, 1)]
  for turn in range(2):
    epochs = [np.concatenate([drawn[8 * turn + 4 * epoch + i].rewards for i in range(4)]) for epoch in range(2)]
    for rows in epochs:
      assert sorted(rows) == list(100 * turn + np.arange(8.0))
    assert not np.array_equal(*epochs)
  for part in drawn:
    assert part.batch.inputs.shape[0] == 2
    rows = part.rewards.astype(int) % 100
    np.testing.assert_array_equal(part.batch.inputs, numbered(int(part.rewards[0]) // 100).batch.inputs[rows])


def test_groups_stay_together():
  _, source = make(2, 2, group=2)
  parts = [source.next('params', step).rewards.astype(int) for step in range(4)]
  for epoch in (parts[:2], parts[2:]):
    assert sorted(np.concatenate(epoch)) == list(range(8))
  for part in parts:
    assert part.shape == (4,) and (part[::2] % 2 == 0).all() and (part[1::2] == part[::2] + 1).all()
  assert not np.array_equal(np.concatenate(parts[:2]), np.concatenate(parts[2:]))


def test_the_trainer_is_asked_once_a_turn_with_the_parameters_at_its_start():
  asked = []

  def finish(params, rollouts):
    asked.append(params)
    return rollouts._replace(old_logprobs=rollouts.sampler_logprobs + params)

  _, source = make(1, 2, finish)
  first, second = source.next(1.0, 0), source.next(2.0, 1)
  assert asked == [1.0]
  for part in (first, second):
    np.testing.assert_array_equal(part.old_logprobs, part.sampler_logprobs + 1.0)


@pytest.mark.parametrize('stopped', [1, 2, 3, 4])
def test_a_turn_goes_on_after_a_restart(stopped):
  inner, source = make(2, 2)
  expected = [source.next('params', step) for step in range(6)]
  _, source = make(2, 2)
  for step in range(stopped):
    source.next('params', step)
  state = json.loads(json.dumps(source.get_state()))
  inner, resumed = make(2, 2)
  resumed.set_state(state)
  for step in range(stopped, 6):
    jax.tree.map(np.testing.assert_array_equal, resumed.next('other', step), expected[step])
  assert [step for _, step in inner.asked] == ([1] if stopped else [0, 1])


def test_packed_rollouts_are_the_same_bits(groups):  # noqa: F811
  made = tiny.random_rollouts()
  half = [np.float32(np.pi), np.float32(-0.0), np.float32(np.inf)]
  facts = outcomes([one for group in groups for one in group])._replace(
      parts={'length': (np.array(half), np.ones(3, np.float32))}
  )
  made = made._replace(outcomes=facts, old_logprobs=None)
  again = updates.unpacked(json.loads(json.dumps(updates.packed(made))))
  assert jax.tree.structure(again) == jax.tree.structure(made)
  for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(made), strict=True):
    assert ours.dtype == theirs.dtype and ours.tobytes() == np.asarray(theirs).tobytes()
  assert updates.unpacked(updates.packed(None)) is None


@pytest.mark.parametrize('epochs, minibatches', [(0, 1), (1, 0)])
def test_impossible_numbers_are_refused(epochs, minibatches):
  with pytest.raises(schema.ConfigError, match='epochs and minibatches start at 1'):
    make(epochs, minibatches)
