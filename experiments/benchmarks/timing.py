"""Timing of competitors in turns, so that a machine's moods hit all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Timing(NamedTuple):
  """Medians over the rounds: seconds on the clock, and seconds of all processors together."""

  wall: float
  processor: float


def interleaved(runs: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, Timing]:
  """Times every run once a round, A B A B, after one untimed run each (compilation). A run returns when it is done."""
  for run in runs.values():
    run()
  seconds = {name: [] for name in runs}
  for _ in range(rounds):
    for name, run in runs.items():
      wall, processor = time.perf_counter(), time.process_time()
      run()
      seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
  return {name: Timing(*map(statistics.median, zip(*rows))) for name, rows in seconds.items()}
