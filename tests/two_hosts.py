"""What tests/hosts_test.py has two processes of four virtual devices do, and partly does itself on one of eight.

python -m tests.two_hosts HOST PORT FOLDER
"""

import contextlib
import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from configs import base
from experiments import runtime
from srm_jax import checkpoints, hosts, schema, sharding
from srm_jax.recipes import on_policy
from srm_jax.recipes.context import Context, DataConfig
from srm_jax.rewards import Grading, Part, grade, make_grade
from srm_jax.tasks import TASKS
from srm_jax.train import train
from tests import tiny

STEPS, STOPPED = 8, 5  # two steps a turn: it stops in the middle of the third


def config(folder):
  """A run that uses whatever hosts must agree on: carried groups, pass rates, scores of three models, held rollouts."""
  recipe = base.policy_gradient(
      tiny.data('parity'), tiny.rollouts(order='pass_rates', dynamic=dict(prompts=2, rounds=3)),
      rewards=dict(task=base.reward('task'), judge=base.reward('model', 0.5, folder=f'{folder}/judge', score='last')),
      truncation=2.0, kl=0.05, estimator='k1', place='reward', reference=f'{folder}/start', epochs=2,
  )
  return tiny.train(recipe, num_steps=STEPS, init_from=f'{folder}/start')


@contextlib.contextmanager
def watched(folder):
  """A context in which every grade is a line of grades.txt, and the rollouts of every turn are kept in a list."""
  made, to_rollouts = [], on_policy.to_rollouts

  def grade(problem, text):
    with open(folder / 'grades.txt', 'a') as file:
      file.write(json.dumps([problem.id, text, jax.process_index()]) + '\n')
    return tiny.PARITY.grade(problem, text)

  def keep(*args, **options):
    made.append(to_rollouts(*args, **options))
    return made[-1]

  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(TASKS, 'parity', dataclasses.replace(tiny.PARITY, grade=grade))
    patch.setattr(on_policy, 'to_rollouts', keep)
    yield made


def arrays(made):
  """{name: array} of the tokens, rewards and validity of a list of rollouts."""
  fields = lambda one: dict(tokens=one.batch.targets * one.batch.loss_mask, rewards=one.rewards, valid=one.valid)
  return {f'{name}{turn}': array for turn, one in enumerate(made) for name, array in fields(one).items()}


def stopped_run(folder):
  """Trains until the second host alone is interrupted."""
  with watched(folder) as made:
    if jax.process_index() == 1:
      with tiny.stopped_after(STOPPED):
        train(config(folder.parent), folder / 'run')
    else:
      with pytest.raises(KeyboardInterrupt, match=f'stopped after step {STOPPED}'):
        train(config(folder.parent), folder / 'run')
  np.savez(folder / f'rollouts{jax.process_index()}.npz', **arrays(made))


def _failing(seen):
  if jax.process_index() == 1:
    raise OSError('no such verifier here')
  return 1.0


def failures(folder):
  """What comes of a reward that raises on the second host: of one that may, and of one that may not."""
  data, rollouts = schema.parse(DataConfig, tiny.data('sums'), 'data'), tiny.rollouts()
  with jax.set_mesh(sharding.make_mesh()):
    model = checkpoints.load_model(f'{folder.parent}/start')
    context = Context(model.config, model.tokenizer, 1, 10)
    source = lambda grading: on_policy.source(
        schema.parse(on_policy.RolloutConfig, rollouts, 'rollouts'), data, context, advantage=None, rewards=grading
    )
    counted = source(Grading(make_grade({'x': Part(1.0, _failing)}))).next({'model': model.params}, 0)
    raises = lambda *group: _failing(group) and grade(*group)
    with pytest.raises((OSError, hosts.HostError)) as ended:
      source(Grading(raises)).next({'model': model.params}, 0)
  return {'valid': counted.valid.tolist(), 'ended': f'{type(ended.value).__name__}: {ended.value}'}


def told():
  """What hosts tell one another."""
  own = jax.process_index()
  return {
      'gather': hosts.gather({'host': own, 'number': np.float32(0.1), 'text': 'é' * (1 + 9 * own)}),
      'first': hosts.first(lambda: own + 7), 'deal': hosts.deal(lambda item: [item, own], 'abcde'),
      'whole': hosts.whole(np.full(2, own)).tolist(),
  }


def placed_rows():
  """{mesh and rows of a host: what is on the mesh, as this host reads it}, of rows that are split, shared or whole."""
  found = {}
  for shape in ((1, 8, 1), (2, 1, 4), (1, 1, 8)):
    for rows in (3, 4):
      x = np.arange(rows) + 10 * jax.process_index()
      found[f'{shape} {rows}'] = hosts.whole(sharding.shard_rows(x, sharding.make_mesh(shape))).tolist()
      everywhere = sharding.shard_whole(np.arange(2 * rows), sharding.make_mesh(shape))
      assert hosts.whole(everywhere).tolist() == [*range(2 * rows)]
      assert sharding.own_rows(np.arange(2 * rows)).tolist() == [*range(2 * rows)][jax.process_index() * rows :][:rows]
  return found


def main(host, port, folder):
  runtime.set_virtual_devices(4)
  jax.distributed.initialize(f'localhost:{port}', 2, int(host))
  tiny.register()
  folder = pathlib.Path(folder)
  found = {'told': told(), 'rows': placed_rows()}
  stopped_run(folder)
  found |= failures(folder)
  (folder / f'found{host}.json').write_text(json.dumps(found))


if __name__ == '__main__':
  main(*sys.argv[1:])
