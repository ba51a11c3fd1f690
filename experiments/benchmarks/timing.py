"""Timing of competitors in turns, so that a machine's moods hit all alike; the memory that a process took."""

import ctypes
import math
import os
import pathlib
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


class Timing(NamedTuple):
  """Medians over the rounds: seconds on the clock, and seconds of all processors together."""

  wall: float
  processor: float
  rounds: int


def interleaved(
    runs: Mapping[str, Callable[[], object]], *, rounds: int, patience: float = math.inf
) -> dict[str, Timing]:
  """Times every run once a round, A B A B, after one untimed run each (compilation). A run returns when it is done.

  Args:
    patience: seconds; a run whose first call took longer stands by that call alone, as a single round.
  """
  firsts = {name: _timed(run) for name, run in runs.items()}
  seconds = {name: [first] if first[0] > patience else [] for name, first in firsts.items()}
  patient = [name for name in runs if not seconds[name]]
  for _ in range(rounds):
    for name in patient:
      seconds[name].append(_timed(runs[name]))
  return {name: Timing(*map(statistics.median, zip(*rows)), len(rows)) for name, rows in seconds.items()}


def keep_memory():
  """Has this process keep what it frees for its next allocation; MALLOC_MMAP_MAX_ in the environment leaves it alone.

  malloc maps what is large, and unmaps it when it is freed. On a virtual machine the host takes such pages back while
  another side has its turn, and seconds of a step go into finding them again, the more the larger its temporaries are.
  To be called before there are threads, and where models are small: large arrays leave holes. With glibc alone.
  """
  if 'MALLOC_MMAP_MAX_' in os.environ or platform.libc_ver()[0] != 'glibc':
    return
  # One arena: that of a further thread maps what does not fit it, whatever the limit.
  for parameter, value in ((_MMAP_MAX, 0), (_ARENA_MAX, 1), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 * 2**20)):
    ctypes.CDLL(None).mallopt(parameter, value)


def _timed(run: Callable[[], object]) -> tuple[float, float]:
  """Seconds on the clock and of all processors that a call takes."""
  wall, processor = time.perf_counter(), time.process_time()
  run()
  return time.perf_counter() - wall, time.process_time() - processor


def peak_memory() -> int:
  """Most bytes that this process held so far (Linux; what getrusage says may be the parent's)."""
  return 1024 * int(re.search(r'VmHWM:\s*(\d+)', pathlib.Path('/proc/self/status').read_text())[1])
