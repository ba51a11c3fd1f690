"""Mesh axes and the one table from logical axis names to mesh axes.

Parameters carry logical names (`nn.with_logical_partitioning`), activations call `constrain`. Nothing else in the
library names a mesh axis, apart from the lm head, which runs inside `shard_map`.
"""

import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from srm_jax import hosts

MESH_AXES = ('data', 'fsdp', 'tensor')
TOKEN_AXES = ('data', 'fsdp')  # tokens of a batch are split over both

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    # parameters
    'vocab': 'tensor',
    'embed': 'fsdp',
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'head_dim': None,
    'mlp': 'tensor',
    'norm': None,
    'layers': None,
    'experts': None,  # their products are ragged: a split axis would be gathered first
    'adapter_rank': None,
    # activations
    'batch': TOKEN_AXES,
    'time': None,
    'features': None,
    'act_heads': 'tensor',
    'act_mlp': 'tensor',
}


def make_mesh(shape: Sequence[int] = (), devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Mesh over ('data', 'fsdp', 'tensor') with Auto axes; one entry of shape may be -1 (what is left).

  Args:
    shape: sizes of the three axes; empty means all devices on 'fsdp'.
    devices: which devices; all of them by default.

  Raises:
    ValueError: the product of shape is not the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = tuple(shape) or (1, -1, 1)
  if len(sizes) != len(MESH_AXES):
    raise ValueError(f'mesh {sizes} has {len(sizes)} axes; give sizes for {MESH_AXES}')
  if sizes.count(-1) == 1:
    rest = math.prod(size for size in sizes if size != -1)
    sizes = tuple(len(devices) // rest if size == -1 else size for size in sizes)
  if math.prod(sizes) != len(devices):
    raise ValueError(f'mesh {sizes} over {MESH_AXES} needs {math.prod(sizes)} devices; there are {len(devices)}')
  return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def current_mesh():
  """The mesh set by `jax.set_mesh`, or None where there is none or it has one device."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 else mesh


def spec(names: Sequence[str | None], shape: Sequence[int], mesh) -> PartitionSpec:
  """PartitionSpec of an array with these logical names; an axis that does not divide evenly stays whole.

  Raises:
    ValueError: a name is not in RULES.
  """
  unknown = [name for name in names if name is not None and name not in RULES]
  if unknown:
    raise ValueError(f'logical axes {unknown} unknown; choose from {sorted(RULES)}')
  axes = [None if name is None else RULES[name] for name in names]
  return PartitionSpec(*(axis if _divides(axis, size, mesh) else None for axis, size in zip(axes, shape, strict=True)))


def _divides(axis, size, mesh) -> bool:
  if axis is None:
    return False
  parts = math.prod(mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis))
  return size % parts == 0


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """`with_sharding_constraint` by logical names under the current mesh; the identity without one."""
  mesh = current_mesh()
  return x if mesh is None else jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh))


def rows_together(group: int, rows: int) -> int:
  """How many rows of a group are side by side on one device, where `rows` rows in groups of `group` are split over the
  current mesh: the largest such divisor of the group.
  """
  mesh = current_mesh()
  devices = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in TOKEN_AXES)
  return math.gcd(group, rows if rows % devices else rows // devices)


def logical_names(boxed):
  """Tree of logical name tuples (as PartitionSpec) from a boxed (abstract) parameter tree."""
  return nn.get_partition_spec(boxed)


def shardings(names, abstract, mesh: Mesh):
  """NamedShardings by RULES.

  Args:
    names: tree of PartitionSpecs of logical names, one a leaf; shorter than the leaf's rank means whole axes.
    abstract: tree of arrays or ShapeDtypeStructs.
    mesh: the mesh.
  """

  def one(axes, leaf):
    padded = tuple(axes) + (None,) * (leaf.ndim - len(axes))
    return NamedSharding(mesh, spec(padded, leaf.shape, mesh))

  return jax.tree.map(one, names, abstract, is_leaf=lambda x: isinstance(x, PartitionSpec))


def like_params(tree, params, params_shardings, mesh: Mesh):
  """NamedShardings of an optimizer state: a leaf whose path ends with a parameter's path and has its shape follows
  it.
  """
  leaves = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(params_shardings), strict=True)
  known = {(path, leaf.shape): sharding for (path, leaf), sharding in leaves}

  def one(path, leaf):
    found = (known.get((path[start:], leaf.shape)) for start in range(len(path)))
    return next((sharding for sharding in found if sharding is not None), replicated(mesh))

  return jax.tree_util.tree_map_with_path(one, tree)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def shard_rows(tree, mesh: Mesh):
  """Puts every host's arrays [B / hosts, ...] on the mesh as [B, ...] with rows split over the token axes (whole where
  they do not divide). Which host's rows come first is left to the mesh.
  """

  def put(x):
    shape = (x.shape[0] * jax.process_count(), *x.shape[1:]) if x.ndim else ()
    placed = _by_rows(shape, mesh)
    if x.ndim and _rows_here(placed, shape) != x.shape[0]:  # devices of several hosts hold the same rows
      return shard_whole(hosts.whole(x), mesh)
    return jax.make_array_from_process_local_data(placed, x)

  return jax.tree.map(put, tree)


def shard_whole(tree, mesh: Mesh):
  """`shard_rows` of arrays [B, ...] that every host has, in their order."""
  put = lambda x: jax.make_array_from_callback(x.shape, _by_rows(x.shape, mesh), lambda index: x[index])
  return jax.tree.map(put, tree)


def own_rows(tree):
  """This host's part [B / hosts, ...], for `shard_rows`, of arrays [B, ...] that every host has.

  Raises:
    ValueError: the rows do not divide over the hosts.
  """
  count, rows = jax.process_count(), len(jax.tree.leaves(tree)[0])
  if rows % count:
    raise ValueError(f'{rows} rows of a step do not divide over {count} hosts; choose a multiple of it')
  share = rows // count
  return jax.tree.map(lambda x: x[jax.process_index() * share :][:share], tree)


def _by_rows(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, spec(('batch',) * min(len(shape), 1) + (None,) * (len(shape) - 1), shape, mesh))


def _rows_here(placed: NamedSharding, shape: Sequence[int]) -> int:
  """How many rows this host's devices hold."""
  found = {index[0].indices(shape[0])[:2] for index in placed.addressable_devices_indices_map(tuple(shape)).values()}
  return sum(stop - start for start, stop in found)
