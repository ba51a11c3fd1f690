"""What travels in the lm head, by shape and mesh, and in the compiled program."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from srm_jax import sharding
from srm_jax.losses import cross_entropy, distillation
from srm_jax.losses.head_layout import Layout, choose
from srm_jax.losses.lm_head import Head, reduced

ROWS = ('data', 'fsdp')


@pytest.mark.parametrize('shape, tokens, kernels, expected', [
    ((2, 2, 2), (4, 8), [(8, 16)], Layout(ROWS, (None,), ('fsdp', 'tensor'), 'fsdp')),  # 16 tokens, 8 entries
    ((2, 2, 2), (4, 8), [(8, 12)], Layout(ROWS, ('fsdp',), ('tensor',))),  # 6 entries
    ((1, 8, 1), (8, 4), [(8, 16)], Layout(ROWS, (None,), ('fsdp',), 'fsdp')),
    ((1, 8, 1), (8, 4), [(8, 32), (16, 8)], Layout(ROWS, ('fsdp', 'fsdp'))),  # the teacher's vocabulary is smaller
    ((1, 8, 1), (8, 4), [(8, 32), (9, 40)], Layout(ROWS, (None, None), ('fsdp',), 'fsdp')),  # its features are whole
    ((1, 8, 1), (8, 4), [(8, 33)], Layout(ROWS, ('fsdp',))),  # the vocabulary does not divide
    ((1, 8, 1), (8, 4), [(9, 32)], Layout(ROWS, (None,))),
    ((1, 8, 1), (7, 4), [(8, 32)], Layout((), (None,))),
    ((8, 1, 1), (8, 4), [(8, 32)], Layout(ROWS, (None,))),
    ((1, 1, 8), (8, 4), [(8, 32)], Layout(ROWS, (None,), ('tensor',))),
])
def test_what_travels(shape, tokens, kernels, expected):
  mesh = sharding.make_mesh(shape)
  assert choose(mesh, tokens, *kernels, split=True) == expected
  assert choose(mesh, tokens, *kernels).tokens is None


def test_without_a_mesh_nothing_does():
  assert choose(None, (8, 4), (8, 32), split=True) == Layout((), (None,))
  assert choose(None, (8, 4), (8, 32), split=True).axis_name is None


def test_one_axis_has_a_name_and_two_have_a_tuple():
  assert Layout(ROWS, (None,), ('fsdp',)).axis_name == 'fsdp'
  assert Layout(ROWS, (None,), ('fsdp', 'tensor')).axis_name == ('fsdp', 'tensor')


def test_loop_has_no_bulk_collective():
  rows, time, features, entries, chunk = 8, 96, 48, 80, 17
  text = _compiled_on_mesh(rows, time, features, entries, chunk)
  inside, outside = _collectives(text)
  assert inside and all(size <= chunk for size in inside), inside
  # What left the loop is there once: W gathered, dW scattered, dhidden summed.
  assert features * entries // 2 in outside and features * entries // 4 in outside
  assert rows * time * features // 4 in outside


def test_where_tokens_travel_no_device_holds_the_unembedding():
  rows, time, features, entries, chunk = 8, 12, 48, 512, 32
  inside, outside = _collectives(_compiled_on_mesh(rows, time, features, entries, chunk, split=True))
  assert set(inside) == {chunk, chunk * features, chunk * features // 2}  # numbers, states, their gradient
  assert max(outside) == features * entries // 4  # W and dW change hands; half of them would be a gather over 'fsdp'


def forward_kl(student, teacher, targets, *, axis_name):
  loss = distillation.forward_kl(student, teacher, axis_name=axis_name)
  return loss, {'nll': cross_entropy.cross_entropy(student, targets, axis_name=axis_name)}


def _compiled_on_mesh(rows, time, features, entries, chunk, split=False):
  mesh = sharding.make_mesh((2, 2, 2))
  place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
  tokens, head = place(sharding.TOKEN_AXES), Head(place(sharding.TOKEN_AXES), place('fsdp', 'tensor'))

  def gradient(student, teacher, targets, weights):
    loss = lambda s: reduced(
        forward_kl, s, targets, weights, teacher=teacher, chunk=chunk, mesh=mesh, split=split
    )
    return jax.grad(loss, has_aux=True)(student)[0]

  shape = lambda size, dtype=jnp.float32: jax.ShapeDtypeStruct(size, dtype)
  heads = Head(shape((rows, time, features)), shape((features, entries)))
  arguments = (heads, heads, shape((rows, time), jnp.int32), shape((rows, time)))
  jitted = jax.jit(gradient, in_shardings=(head, head, tokens, tokens), out_shardings=head)
  return jitted.lower(*arguments).compile().as_text()


def _collectives(text):
  """Element counts of the results of collectives (inside while loops, elsewhere) in optimised HLO."""
  computations = {}
  for line in text.splitlines():
    if started := re.match(r'(?:ENTRY )?%?([\w.\-]+) \(.*\{$', line):
      name = started.group(1)
    elif '=' in line and line.startswith(' '):
      computations.setdefault(name, []).append(line)
  called = lambda lines: re.findall(r'(?:body|condition|to_apply|calls)=%?([\w.\-]+)', '\n'.join(lines))
  looping, queue = set(), re.findall(r'(?:body|condition)=%?([\w.\-]+)', text)
  while queue:
    name = queue.pop()
    if name not in looping:
      looping.add(name)
      queue += called(computations.get(name, []))
  sizes = lambda names: [size for name in names for line in computations[name] for size in _collective_sizes(line)]
  return sizes(looping & set(computations)), sizes(set(computations) - looping)


def _collective_sizes(line):
  kinds = 'all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute'
  found = re.search(rf'= (.*?) (?:{kinds})(?:-start)?\(', line)
  shapes = re.findall(r'\w+\[([\d,]*)\]', found.group(1)) if found else []
  return [math.prod(int(size) for size in shape.split(',') if size) for shape in shapes]
