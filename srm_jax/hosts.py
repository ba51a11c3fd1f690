"""What the hosts of a run tell one another: work that is dealt out, files that one of them writes, errors that end all.

A host is one process of `jax.distributed`. All hosts run the same programs in the same order, and what is told passes
through such programs: these functions are called by every host, at the same place.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class HostError(RuntimeError):
  """Another host raised an exception, which ends this one too."""


def together(work: Callable[[], Any]) -> list:
  """What work() gives on every host, in their order: JSON where there are several.

  Raises:
    Exception: what work raised on this host.
    HostError: it raised on another host and not on this one.
  """
  if jax.process_count() == 1:
    return [work()]
  raised, text = None, b''
  try:
    text = json.dumps({'found': work()}, default=float).encode()
  except Exception as error:  # whatever it is, the other hosts must hear of it before it ends this one
    raised, text = error, json.dumps({'raised': f'{type(error).__name__}: {error}'}).encode()
  told = _exchange(text)
  if raised is not None:
    raise raised
  failed = [f'host {host} of {len(told)} raised {one["raised"]}' for host, one in enumerate(told) if 'raised' in one]
  if failed:
    raise HostError(f'{"; ".join(failed)}; the log of that host says where')
  return [one['found'] for one in told]


def gather(value: Any) -> list:
  """The value of every host, in their order."""
  return together(lambda: value)


def first(work: Callable[[], Any]):
  """What work() gives on the first host, which alone runs it; the others wait for it."""
  return together(lambda: work() if jax.process_index() == 0 else None)[0]


def deal(work: Callable[[Any], Any], items: Sequence[Any]) -> list:
  """[work(item), ...], each by one of the hosts in turn and known to all of them.

  Raises:
    Exception: as `together`.
  """
  found = together(lambda: [work(item) for item in items[jax.process_index() :: jax.process_count()]])
  return [found[place % len(found)][place // len(found)] for place in range(len(items))]


def whole(array) -> np.ndarray:
  """All of an array whose shards lie on several hosts, or of what each of them has, end to end."""
  return multihost_utils.process_allgather(array, tiled=True)


def _exchange(text: bytes) -> list:
  """The JSON of all hosts. Blanks, which mean nothing there, fill it up to a power of two: few shapes, few programs."""
  longest = int(multihost_utils.process_allgather(np.int32(len(text))).max())
  padded = np.frombuffer(text.ljust(1 << (longest - 1).bit_length()), np.uint8)
  return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]
