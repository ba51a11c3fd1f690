"""Meshes, and the way from logical names to shardings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from srm_jax import sharding


@pytest.mark.parametrize('shape, sizes', [((), (1, 8, 1)), ((2, 2, 2), (2, 2, 2)), ((-1, 2, 1), (4, 2, 1))])
def test_make_mesh(shape, sizes):
  mesh = sharding.make_mesh(shape)
  assert mesh.axis_names == sharding.MESH_AXES and tuple(mesh.shape.values()) == sizes
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize('shape, message', [
    ((3, 1, 1), 'there are 8'), ((2, 4), 'has 2 axes'), ((-1, 3, 1), 'there are 8'),
])
def test_make_mesh_refuses(shape, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(shape)


def test_spec_follows_the_rules_where_they_divide():
  mesh = sharding.make_mesh((2, 2, 2))
  assert sharding.spec(('vocab', 'embed'), (6, 4), mesh) == PartitionSpec('tensor', 'fsdp')
  assert sharding.spec(('vocab', 'embed'), (7, 4), mesh) == PartitionSpec(None, 'fsdp')
  assert sharding.spec(('batch', None), (8, 3), mesh) == PartitionSpec(('data', 'fsdp'), None)
  assert sharding.spec(('batch',), (6,), mesh) == PartitionSpec(None)  # 6 rows do not split over 2 x 2
  with pytest.raises(ValueError, match=r"logical axes \['colour'\] unknown; choose from"):
    sharding.spec(('colour',), (2,), mesh)


def test_rules_name_mesh_axes_only():
  for axis in sharding.RULES.values():
    assert axis is None or {axis} <= set(sharding.MESH_AXES) or set(axis) <= set(sharding.MESH_AXES)


def test_constrain_needs_a_mesh_of_several_devices():
  x = jnp.ones((4, 6))
  assert sharding.current_mesh() is None and sharding.constrain(x, 'batch', 'act_mlp') is x
  with jax.set_mesh(sharding.make_mesh((1, 1, 1), jax.devices()[:1])):
    assert sharding.current_mesh() is None
  mesh = sharding.make_mesh((2, 2, 2))
  with jax.set_mesh(mesh):
    placed = jax.jit(lambda x: sharding.constrain(x * 2, 'batch', 'act_mlp'))(x)
  assert placed.addressable_shards[0].data.shape == (1, 3)
  np.testing.assert_array_equal(placed, 2 * np.ones((4, 6)))


def test_optimizer_state_follows_its_parameters():
  mesh = sharding.make_mesh((2, 2, 2))
  params = {'a': {'kernel': jnp.zeros((4, 8))}, 'scale': jnp.zeros(4)}
  names = {'a': {'kernel': PartitionSpec('embed', 'mlp')}, 'scale': PartitionSpec('norm')}
  placed = sharding.shardings(names, params, mesh)
  assert placed['a']['kernel'].spec == PartitionSpec('fsdp', 'tensor') and placed['scale'].spec == PartitionSpec(None)
  state = sharding.like_params(optax.adam(1.0).init(params), params, placed, mesh)
  assert state[0].mu['a']['kernel'] == state[0].nu['a']['kernel'] == placed['a']['kernel']
  assert state[0].count == sharding.replicated(mesh)


def test_shard_rows():
  mesh = sharding.make_mesh((2, 2, 2))
  rows = sharding.shard_rows({'x': np.arange(8).reshape(4, 2), 'odd': np.arange(3), 'n': np.float32(7)}, mesh)
  assert rows['x'].addressable_shards[0].data.shape == (1, 2)
  assert rows['odd'].addressable_shards[0].data.shape == (3,) and rows['n'] == 7
  np.testing.assert_array_equal(rows['x'], np.arange(8).reshape(4, 2))
