"""Benchmarks time their sides in turns; a side that takes minutes is not called again."""

import math

from experiments.benchmarks import timing


def test_peak_memory_does_not_go_down():
  before = timing.peak_memory()
  assert len(b'x' * (100 * 2**20))
  assert timing.peak_memory() >= max(before, 100 * 2**20)


def test_sides_take_turns_after_one_untimed_call_each():
  calls = []
  found = timing.interleaved({'a': lambda: calls.append('a'), 'b': lambda: calls.append('b')}, rounds=2)
  assert ''.join(calls) == 'ab' 'ab' 'ab'
  assert [took.rounds for took in found.values()] == [2, 2]


def test_the_median_round_is_reported_without_the_first_call(monkeypatch):
  lengths = iter([(9.0, 9.0), (3.0, 1.0), (1.0, 4.0), (2.0, 2.0)])
  monkeypatch.setattr(timing, '_timed', lambda run: next(lengths))
  assert timing.interleaved({'a': None}, rounds=3) == {'a': timing.Timing(2.0, 2.0, 3)}


def test_a_side_beyond_patience_stands_by_its_first_call(monkeypatch):
  monkeypatch.setattr(timing, '_timed', lambda run: run())
  calls = []
  runs = {'quick': lambda: (1.0, 1.0), 'slow': lambda: calls.append(1) or (61.0, 100.0)}
  found = timing.interleaved(runs, rounds=5, patience=60.0)
  assert found == {'quick': timing.Timing(1.0, 1.0, 5), 'slow': timing.Timing(61.0, 100.0, 1)}
  assert len(calls) == 1 and timing.interleaved(runs, rounds=2, patience=math.inf)['slow'].rounds == 2
