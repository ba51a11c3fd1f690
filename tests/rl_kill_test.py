"""Runs that sample are killed at random moments, begun again by the same command, and end in the bits of an undisturbed
one: plain groups, carried groups and several epochs over a batch, with problems by pass rate and by level.

As a script: python -m tests.rl_kill_test NAME WORKDIR
"""

import random
import sys

import numpy as np
import pytest

from configs import base
from srm_jax import checkpoints, metrics
from srm_jax.train import train
from tests import tiny
from tests.processes import kill_at, start
from tests.tiny import one_device, tiny_tasks  # noqa: F401

STEPS = 16
SOURCES = {
    'plain groups': {},
    'carried groups, by pass rate': dict(rollouts=dict(
        dynamic=dict(prompts=6, rounds=2), order='pass_rates', order_options=dict(memory=0.0, floor=0.001)
    )),
    'epochs, by level': dict(
        rollouts=dict(order='levels', order_options=dict(advance=0.3, window=16)),
        choices=dict(epochs=2, minibatches=2),
    ),
}


def config(name):
  """Two steps a checkpoint: half of the kills cost a step, and checkpoints fall into the middle of epochs."""
  options = SOURCES[name]
  rollouts = tiny.rollouts(**options.get('rollouts', {}))
  recipe = base.policy_gradient(tiny.data('parity'), rollouts, **options.get('choices', {}))
  return tiny.train(recipe, num_steps=STEPS, checkpoint_every=2)


def history(run):
  return [{**row, 'seconds_per_step': 0} for row in run.metrics]


@pytest.mark.slow
@pytest.mark.parametrize('name', SOURCES)
def test_a_killed_run_continues_to_the_same_bits(name, tmp_path):
  seed = random.SystemRandom().randrange(1 << 30)
  draws = random.Random(seed)
  whole, torn = train(config(name), tmp_path / 'whole'), tmp_path / 'torn'
  for step in sorted(draws.sample(range(3, STEPS - 4), 2)):
    kill_at(start(['-m', 'tests.rl_kill_test', name, '{workdir}'], torn), torn, step, later=draws.uniform(0, 0.05))
    assert metrics.read(torn)[-1]['step'] < STEPS, seed
  again = train(config(name), torn)
  assert checkpoints.fingerprint(again.params) == checkpoints.fingerprint(whole.params), seed
  np.testing.assert_equal(history(again), history(whole), err_msg=f'seed {seed}')


if __name__ == '__main__':
  tiny.register()
  train(config(sys.argv[1]), sys.argv[2])
