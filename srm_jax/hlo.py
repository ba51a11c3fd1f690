"""Reads compiled XLA programs as text: collectives, memory traffic, loops multiplied by their trip counts.

XLA's own cost analysis counts the body of a loop once; a scan over layers makes that wrong by their number.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jax.extend.core import jaxprs_in_params

_BYTES = {
    'pred': 1, 's8': 1, 'u8': 1, 'f8e4m3fn': 1, 'f8e5m2': 1, 's16': 2, 'u16': 2, 'f16': 2, 'bf16': 2,
    's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8,
}
_SHAPE = re.compile(r'\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.-]+) \(.*\{$')
_NAME = re.compile(r'^\s+(ROOT )?%?([\w.-]+) = ')
_CALLED = re.compile(r'\b(calls|body|condition|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.-]+)')
_KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute', 'ragged-all-to-all')
# Names for values, not work: they move nothing by themselves.
_FREE = {
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'call', 'conditional', 'iota',
    'after-all', 'partition-id', 'replica-id', 'copy-done', 'opt-barrier', 'async-done', 'async-update',
}


class Instruction(NamedTuple):
  """One line: name, result type as text, opcode, what stands in its parentheses, the attributes behind, and what it
  calls.
  """

  name: str
  type: str
  opcode: str
  arguments: str
  attributes: str
  called: Mapping[str, tuple[str, ...]]
  root: bool

  @property
  def operands(self) -> list[str]:
    return re.findall(r'%([\w.-]+)', self.arguments)


Computation = Mapping[str, Instruction]


class Program(NamedTuple):
  """Computations by name; `entry` runs first."""

  computations: Mapping[str, Computation]
  entry: str


class Traffic(NamedTuple):
  """Collectives of one kind in one step: how many, bytes of their whole arrays, and bytes that each chip sends over
  rings.
  """

  count: int
  bytes: float
  moved: float


def parse(text: str) -> Program:
  """A compiled module's text, `compiled.as_text()`, as a Program.

  Raises:
    ValueError: there is no entry computation.
  """
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif line.startswith('}'):
      current = None
    elif current is not None and _NAME.match(line):
      instruction = _instruction(line)
      current[instruction.name] = instruction
  if entry is None:
    raise ValueError('the text has no ENTRY computation; pass compiled.as_text()')
  return Program(computations, entry)


def _instruction(line: str) -> Instruction:
  name = _NAME.match(line)
  kind, rest = _take(line[name.end() :])
  opcode, _, rest = rest.lstrip().partition('(')
  arguments, attributes = _take('(' + rest)
  called = {key: tuple(re.findall(r'[\w.-]+', names)) for key, names in _CALLED.findall(attributes)}
  return Instruction(name[2], kind, opcode, arguments[1:-1], attributes, called, bool(name[1]))


def _take(text: str) -> tuple[str, str]:
  """Splits a balanced '(...)' or a word off the front."""
  if not text.startswith('('):
    head, _, tail = text.partition(' ')
    return head, tail
  depth = 0
  for place, letter in enumerate(text):
    depth += (letter == '(') - (letter == ')')
    if depth == 0:
      return text[: place + 1], text[place + 1 :]
  return text, ''


def _sizes(kind: str, *, memory: str = '') -> list[int]:
  """Bytes of every array in a type; with memory='hbm', those that the layout puts elsewhere (S(n)) are 0."""
  found = []
  for dtype, dims, layout in _SHAPE.findall(kind):
    elements = math.prod(int(size) for size in dims.split(',') if size)
    found.append(0 if memory == 'hbm' and 'S(' in layout else elements * _BYTES.get(dtype, 0))
  return found


def trip_count(program: Program, loop: Instruction) -> int:
  """Iterations of a while loop: as annotated, or from a condition `i < constant` (a scan counts from 0); 1 if
  unknown.
  """
  known = re.search(r'known_trip_count\W+n\W+(\d+)', loop.attributes)
  if known:
    return int(known[1])
  condition = program.computations[loop.called['condition'][0]]
  limits = [one for one in condition.values() if one.opcode == 'constant' and one.type.startswith('s32[]')]
  return int(limits[0].arguments) if len(limits) == 1 else 1


def executed(program: Program) -> Iterator[tuple[Computation, int]]:
  """(computation, how often it runs in one step), for all that is not inside a fusion or a reduction's body."""
  waiting = [(program.entry, 1)]
  while waiting:
    name, times = waiting.pop()
    yield program.computations[name], times
    for one in program.computations[name].values():
      if one.opcode == 'while':
        waiting.append((one.called['body'][0], times * trip_count(program, one)))
      elif one.opcode in ('call', 'conditional', 'async-start'):
        waiting += [(callee, times) for names in one.called.values() for callee in names]


def _fused(program: Program, one: Instruction) -> Computation:
  return program.computations[one.called['calls'][0]] if one.opcode == 'fusion' and 'calls' in one.called else {}


def collectives(program: Program) -> dict[str, Traffic]:
  """{kind: Traffic} of one step.

  An asynchronous collective stands in several fusions of one loop under one channel: it counts once.
  """
  found: dict[str, Traffic] = {}
  for computation, times in executed(program):
    seen = set()
    for outer in computation.values():
      for one in (outer, *_fused(program, outer).values()):
        kind = one.opcode.removesuffix('-start')
        channel = re.search(r'channel_id=(\d+)', one.attributes)
        key = (kind, channel[1] if channel else one.name)
        if kind in _KINDS and key not in seen:
          seen.add(key)
          kind, size, moved = _traffic(kind, one, _scatters(program, outer))
          before = found.get(kind, Traffic(0, 0.0, 0.0))
          found[kind] = Traffic(before.count + times, before.bytes + times * size, before.moved + times * moved)
  return found


def _scatters(program, outer) -> bool:
  """The TPU compiler writes a reduce-scatter as a fusion of that name around an all-reduce."""
  return outer.opcode == 'fusion' and 'all-reduce-scatter' in ' '.join(outer.called.get('calls', ()))


def _traffic(kind: str, one: Instruction, scatters: bool) -> tuple[str, float, float]:
  """(kind, bytes of the whole array, bytes that a chip sends) of one execution."""
  chips = group_size(one.attributes)
  sizes = _sizes(one.type)
  size = float(max(sizes) if one.opcode.endswith('-start') else sum(sizes))
  if kind == 'reduce-scatter':
    size *= chips
  if kind == 'all-reduce' and scatters:
    kind = 'reduce-scatter'
  rounds = {'all-reduce': 2.0, 'collective-permute': chips / max(chips - 1, 1)}.get(kind, 1.0)
  return kind, size, size * rounds * (chips - 1) / chips


def group_size(attributes: str) -> int:
  """Chips that take part in each group of a collective; 2 where no groups are written (a permutation)."""
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
  if mesh:
    sizes = dict(re.findall(r"'([\w.]+)'=(\d+)", mesh[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([\w.]+)'", mesh[2]))
  tiled = re.search(r'replica_groups=\[(?:\d+,)*(\d+)\]<=', attributes)
  if tiled:
    return int(tiled[1])
  listed = re.search(r'replica_groups=\{\{([\d,]+)\}', attributes)
  return len(listed[1].split(',')) if listed else 2


def hbm_bytes(program: Program) -> float:
  """Bytes read from and written to HBM in one step, every operation reading its operands and writing its result once.

  A slice reads its part only; arrays that the compiler keeps in on-chip memory count nothing. Tile padding is left out.
  """
  total = 0.0
  for computation, times in executed(program):
    total += times * sum(_moved(program, computation, one) for one in computation.values() if one.opcode not in _FREE)
  return total


def _moved(program, computation, one: Instruction) -> float:
  def size(name):
    return sum(_sizes(computation[name].type, memory='hbm')) if name in computation else 0

  written, operands = sum(_sizes(one.type, memory='hbm')), one.operands
  if one.opcode in ('dynamic-slice', 'gather', 'slice'):
    return 2 * written
  if one.opcode in ('dynamic-update-slice', 'scatter'):
    return 2 * size(operands[-1 if one.opcode == 'scatter' else 1])
  if one.opcode.endswith('-start'):  # a copy or slice between memories: its result names source and target
    return max(_sizes(one.type, memory='hbm'), default=0)
  inner = _fused(program, one)
  parts = {int(p.arguments): p for p in inner.values() if p.opcode == 'parameter'}
  read = sum(min(size(name), _read(inner, parts.get(place))) for place, name in enumerate(operands))
  updates = [u for u in inner.values() if u.root and u.opcode == 'dynamic-update-slice']
  if updates:
    written = min(written, sum(_sizes(inner[updates[0].operands[1]].type)))
  return read + written


def _read(inner: Computation, parameter: Instruction | None) -> float:
  """Bytes of a fusion's parameter that are read: its slices where only slices are taken, none where it is updated in
  place.
  """
  if parameter is None:
    return math.inf
  users = [one for one in inner.values() if parameter.name in one.operands]
  in_place = [one for one in users if one.opcode == 'dynamic-update-slice' and one.operands[0] == parameter.name]
  slices = [one for one in users if one.opcode == 'dynamic-slice']
  if not users or len(slices) + len(in_place) < len(users):
    return math.inf
  return sum(sum(_sizes(one.type)) for one in slices)


def jaxpr_flops(jaxpr) -> float:
  """Matrix-product FLOPs of a traced program over all chips: loops times their length, recomputation included."""
  total = 0.0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      total += _dot_flops(equation)
    times = equation.params.get('length', 1) if equation.primitive.name == 'scan' else 1
    if equation.primitive.name == 'shard_map':
      times = equation.params['mesh'].size
    inner = [jaxpr_flops(sub) for sub in jaxprs_in_params(equation.params)]
    if inner:
      total += times * (max(inner) if equation.primitive.name == 'cond' else sum(inner))
  return total


def _dot_flops(equation) -> float:
  (contracted, _), _ = equation.params['dimension_numbers']
  left = equation.invars[0].aval.shape
  return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
