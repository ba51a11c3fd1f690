"""Several optimizer steps on one batch of rollouts: what the trainer says of it first, then epochs of minibatches.

  turn, place = divmod(step, epochs * minibatches)

A turn samples with the parameters at its start; each of its epochs goes through all rows in an order of its own. What
is left of a turn is part of the state, so that a run stopped in the middle of one continues it.
"""

import base64
import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from srm_jax import sharding
from srm_jax.types import Batch, Outcomes, Params, Rollouts, Source


@dataclasses.dataclass(frozen=True)
class UpdatesConfig:
  """epochs over the rows of a turn, each in `minibatches` steps."""

  epochs: int
  minibatches: int

  def __post_init__(self):
    if self.epochs < 1 or self.minibatches < 1:
      raise ValueError(f'{self} is out of range: epochs and minibatches start at 1')


def repeated(
    inner: Source, config: UpdatesConfig, seed: int, *, group: int = 1, finish: Callable[[Params, Rollouts], Rollouts],
) -> Source:
  """A source whose batches are this host's rows of the minibatches of inner's rollouts, which every host has whole.

  group: rows that follow each other and stay together.
  finish: (params, rollouts) -> rollouts, once a turn: log-probabilities and values of the trainer, advantages.
  """
  steps = config.epochs * config.minibatches
  now: dict[str, Any] = {'turn': -1, 'held': None}

  def next_part(params, step: int) -> Rollouts:
    turn, place = divmod(step, steps)
    if now['turn'] != turn:
      now.update(turn=turn, held=finish(params, inner.next(params, turn)))
    held = now['held']
    if place + 1 == steps:  # nothing of it is left to keep
      now.update(turn=-1, held=None)
    if steps == 1:
      return sharding.own_rows(held)
    epoch, part = divmod(place, config.minibatches)
    order = np.random.default_rng((seed, turn, epoch)).permutation(len(held.rewards) // group)
    rows = (order[part :: config.minibatches, None] * group + np.arange(group)).reshape(-1)
    return sharding.own_rows(jax.tree.map(lambda x: x[rows], held))

  def set_state(state):
    inner.set_state(state['inner'])
    now.update(turn=state['turn'], held=unpacked(state['held']))

  return Source(
      next_part, lambda: {'inner': inner.get_state(), 'turn': now['turn'], 'held': packed(now['held'])}, set_state,
  )


def packed(tree: Any) -> Any:
  """Rollouts on the host as JSON, bit for bit."""
  if tree is None:
    return None
  if isinstance(tree, tuple(_RECORDS.values())):
    return {'record': type(tree).__name__, 'fields': packed(tree._asdict())}
  if isinstance(tree, Mapping):
    return {'mapping': {name: packed(value) for name, value in tree.items()}}
  if isinstance(tree, tuple):
    return {'tuple': [packed(value) for value in tree]}
  array = np.ascontiguousarray(tree)
  data = base64.b64encode(zlib.compress(array.tobytes(), 1)).decode()
  return {'dtype': array.dtype.str, 'shape': array.shape, 'data': data}


def unpacked(found: Any) -> Any:
  """Inverse of `packed`."""
  if found is None:
    return None
  if 'record' in found:
    return _RECORDS[found['record']](**unpacked(found['fields']))
  if 'mapping' in found:
    return {name: unpacked(value) for name, value in found['mapping'].items()}
  if 'tuple' in found:
    return tuple(unpacked(value) for value in found['tuple'])
  data = zlib.decompress(base64.b64decode(found['data']))
  return np.frombuffer(data, np.dtype(found['dtype'])).reshape(found['shape']).copy()


_RECORDS = {record.__name__: record for record in (Rollouts, Batch, Outcomes)}
