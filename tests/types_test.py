"""Records that cross borders: pytrees where they hold arrays, plain and comparable where they do not."""

import ast
import dataclasses
import inspect

import jax
import numpy as np
import pytest

from srm_jax import types


def test_records_of_arrays_are_pytrees_and_unused_fields_vanish():
  batch = types.Batch(*(np.full((2, 3), i) for i in range(5)))
  rollouts = types.Rollouts(batch, np.zeros((2, 3)), rewards=np.ones(2))
  assert len(jax.tree.leaves(rollouts)) == 5 + 2
  doubled = jax.tree.map(lambda x: 2 * x, rollouts)
  assert doubled.advantages is None and doubled.batch.segment_ids[0, 0] == 8 and doubled.rewards[0] == 2


def test_a_train_state_without_average_has_no_such_leaf():
  state = types.TrainState(np.zeros(()), {'model': np.ones(2)}, ())
  assert state.ema is None and len(jax.tree.leaves(state)) == 2


def test_records_of_the_host_cannot_change():
  problem = types.Problem('1', '2+2', '4')
  with pytest.raises(dataclasses.FrozenInstanceError):
    problem.answer = '5'
  assert problem.metadata is not types.Problem('2', '', '').metadata


def test_sampling_defaults_take_the_whole_distribution_once():
  sampling = types.SamplingParams()
  assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.samples) == (1.0, 0, 1.0, 1)
  assert hash(sampling) == hash(types.SamplingParams())


def test_a_completion_costs_nothing_until_someone_counts():
  completion = types.Completion(types.Prompt('a', 'b'), 0, 'text', (1,), (2, 3), (-0.1, -0.2), True)
  assert completion.spent == types.Spent(0, 0, 0)


def test_floor_zero_imports_no_jax():
  """Graders run in processes that never start jax."""
  tree = ast.parse(inspect.getsource(types))
  imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
  imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
  assert not any(name.split('.')[0] in ('jax', 'flax', 'numpy') for name in imported)
