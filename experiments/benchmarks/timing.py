"""Timing of competitors in turns, so that a machine's moods hit all alike; the memory that a process took."""

import math
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple


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


def _timed(run: Callable[[], object]) -> tuple[float, float]:
  """Seconds on the clock and of all processors that a call takes."""
  wall, processor = time.perf_counter(), time.process_time()
  run()
  return time.perf_counter() - wall, time.process_time() - processor


def peak_memory() -> int:
  """Most bytes that this process held so far (Linux; what getrusage says may be the parent's)."""
  return 1024 * int(re.search(r'VmHWM:\s*(\d+)', pathlib.Path('/proc/self/status').read_text())[1])
