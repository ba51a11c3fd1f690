import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from srm_jax import hlo, sharding

# A loop of 24 iterations over an asynchronous all-gather in three fusions, as the TPU compiler writes it, with a
# reduce-scatter (a fusion around an all-reduce) and an all-reduce of a tuple after it.
TEXT = """HloModule jit_step, is_scheduled=true

%region_0 (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %add.9 = f32[]{:T(128)} add(%x, %y)
}

%fused_start (p.0: bf16[4,8]) -> (bf16[4,8], bf16[64,8], u32[]) {
  %p.0 = bf16[4,8]{1,0:T(4,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[64,8]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=3, \
replica_groups=mesh['axis_0'=16] {'axis_0'}, dimensions={0}
  ROOT %custom-call = (bf16[4,8]{1,0}, bf16[64,8]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%fused_done (p.1: bf16[4,8]) -> bf16[64,8] {
  %p.1 = bf16[4,8]{1,0:T(4,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[64,8]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=3, \
replica_groups=mesh['axis_0'=16] {'axis_0'}, dimensions={0}
}

%slice_one (p.2: f32[24,100], p.3: s32[]) -> f32[100] {
  %p.2 = f32[24,100]{1,0} parameter(0)
  %p.3 = s32[]{:T(128)} parameter(1)
  ROOT %dynamic-slice = f32[1,100]{1,0} dynamic-slice(%p.2, %p.3), dynamic_slice_sizes={1,100}
}

%all-reduce-scatter.5 (p.4: f32[64,8]) -> f32[4,8] {
  %p.4 = f32[64,8]{1,0} parameter(0)
  ROOT %all-reduce.7 = f32[64,8]{1,0} all-reduce(%p.4), channel_id=9, replica_groups=[1,16]<=[16], to_apply=%region_0
}

%condition (c: (s32[], f32[24,100])) -> pred[] {
  %limit = s32[]{:T(128)} constant(24)
  %c = (s32[]{:T(128)}, f32[24,100]{1,0}) parameter(0)
  %i.0 = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.0, %limit), direction=LT
}

%body (b: (s32[], f32[24,100])) -> (s32[], f32[24,100]) {
  %b = (s32[]{:T(128)}, /*index=1*/f32[24,100]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%b), index=0
  %layers = f32[24,100]{1,0} get-tuple-element(%b), index=1
  %shard = bf16[4,8]{1,0:T(4,128)(2,1)S(1)} custom-call(), custom_call_target="Made"
  %start = (bf16[4,8]{1,0:S(1)}, bf16[64,8]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) fusion(%shard), \
kind=kCustom, calls=%fused_start
  %done = bf16[64,8]{1,0:T(8,128)(2,1)S(1)} fusion(%shard), kind=kCustom, calls=%fused_done
  %one = f32[1,100]{1,0:S(1)} fusion(%layers, %i.1), kind=kLoop, calls=%slice_one
  ROOT %next = (s32[]{:T(128)}, f32[24,100]{1,0}) tuple(%i.1, %layers)
}

ENTRY %main (w: f32[24,100], g: f32[64,8]) -> f32[4,8] {
  %w = f32[24,100]{1,0} parameter(0)
  %g = f32[64,8]{1,0} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %init = (s32[]{:T(128)}, f32[24,100]{1,0}) tuple(%zero, %w)
  %while.1 = (s32[]{:T(128)}, f32[24,100]{1,0}) while(%init), condition=%condition, body=%body, \
metadata={op_name="scan"}
  %pair = (f32[10]{0}, f32[6]{0}) all-reduce(%g, %g), channel_id=11, replica_groups={{0,1,2,3},{4,5,6,7}}, \
to_apply=%region_0
  ROOT %scattered = f32[4,8]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.5
}
"""


def test_collectives_count_once_a_channel_and_times_the_loop():
  found = hlo.collectives(hlo.parse(TEXT))
  whole = 64 * 8 * 2
  assert found['all-gather'] == hlo.Traffic(24, 24 * whole, 24 * whole * 15 / 16)
  assert found['reduce-scatter'] == hlo.Traffic(1, 64 * 8 * 4, 64 * 8 * 4 * 15 / 16)
  assert found['all-reduce'] == hlo.Traffic(1, 64, 2 * 64 * 3 / 4)
  assert set(found) == {'all-gather', 'reduce-scatter', 'all-reduce'}


def test_memory_traffic_counts_slices_as_slices_and_leaves_out_on_chip_arrays():
  # 24 slices of 400 bytes and their index are read; the scatter reads 2048 and writes 128, the all-reduce twice 2048
  # and writes 64.
  assert hlo.hbm_bytes(hlo.parse(TEXT)) == 24 * (400 + 4) + (2048 + 128) + (2 * 2048 + 64)


def test_trip_counts_come_from_annotation_or_condition_and_are_one_otherwise():
  annotated = TEXT.replace('metadata={op_name="scan"}', 'backend_config={"known_trip_count":{"n":"7"}}')
  assert hlo.collectives(hlo.parse(annotated))['all-gather'].count == 7
  unknown = TEXT.replace('constant(24)', 'parameter(1)')
  assert hlo.collectives(hlo.parse(unknown))['all-gather'].count == 1


@pytest.mark.parametrize('groups, size', [
    ("mesh['data'=2,'fsdp'=4,'tensor'=8] {'fsdp','data'}", 8), ('[4,2]<=[8]', 2), ('[2,4]<=[4,2]T(1,0)', 4),
    ('{{0,1,2},{3,4,5}}', 3),
])
def test_group_sizes_in_every_notation(groups, size):
  assert hlo.group_size(f', channel_id=1, replica_groups={groups}, use_global_device_ids=true') == size


def test_text_without_an_entry_is_refused():
  with pytest.raises(ValueError, match='as_text'):
    hlo.parse('nothing')


def test_this_jax_writes_programs_that_are_read():
  mesh = sharding.make_mesh((1, 4, 1), jax.devices()[:4])

  def loss(w, x):
    def layer(x, w):
      return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), PartitionSpec('fsdp')), None

    return jnp.sum(jax.lax.scan(layer, x, w)[0])

  with jax.set_mesh(mesh):
    place = lambda *axes: jax.NamedSharding(mesh, PartitionSpec(*axes))
    w = jax.ShapeDtypeStruct((3, 8, 8), jnp.float32, sharding=place(None, 'fsdp'))
    x = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=place('fsdp'))
    program = hlo.parse(jax.jit(loss).lower(w, x).compile().as_text())
  gathered = hlo.collectives(program)['all-gather']
  assert gathered.bytes == 3 * 8 * 8 * 4 and gathered.count in (1, 3)
  assert hlo.hbm_bytes(program) > 3 * 8 * 8 * 4


def test_flops_count_loops_recomputation_and_all_devices():
  def layer(x, w):
    return jnp.tanh(x @ w), None

  def loss(w, x, remat):
    return jnp.sum(jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, w)[0])

  w, x = jax.ShapeDtypeStruct((3, 8, 8), jnp.float32), jax.ShapeDtypeStruct((16, 8), jnp.float32)
  product = 2 * 16 * 8 * 8
  counted = lambda fn: hlo.jaxpr_flops(jax.make_jaxpr(fn)(w, x))
  assert counted(functools.partial(loss, remat=False)) == 3 * product
  assert counted(jax.grad(functools.partial(loss, remat=False), argnums=(0, 1))) == 9 * product
  assert counted(jax.grad(functools.partial(loss, remat=True), argnums=(0, 1))) == 12 * product
  mesh = sharding.make_mesh((1, 4, 1), jax.devices()[:4])
  rows = jax.shard_map(
      lambda w, x: x @ w[0], mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec('fsdp')),
      out_specs=PartitionSpec('fsdp'),
  )
  assert counted(rows) == product
