"""Mixes: exact shares beforehand, shares that change row by row, and a source that resumes exactly."""

import collections
import json

import numpy as np
import pytest

from srm_jax.data import mixing, packing

EOS = 1
OPTIONS = dict(batch_size=4, length=16, seed=3)


def examples(name, count, token):
  """Examples whose tokens say which part they are from."""
  return [packing.from_prompt_completion(f'{name}{i}', [token], [token] * (1 + i % 5), EOS) for i in range(count)]


PARTS = {'long': examples('l', 7, 50), 'short': examples('s', 30, 60)}


def shares_of(*values):
  return lambda params, step, last: values


@pytest.mark.parametrize('ratios, size, counts', [
    ({'long': 1, 'short': 4}, 20, {'l': 4, 's': 16}),
    ({'long': 0.2, 'short': 0.8}, 21, {'l': 4, 's': 17}),  # 4.2 and 16.8
    ({'long': 0, 'short': 2}, 5, {'s': 5}),
    ({'long': 1, 'short': 1}, 30, {'l': 15, 's': 15}),  # more than there are
    ({'long': 0, 'short': 0.5}, 90, {'s': 90}),
])
def test_a_mixture_has_exact_shares(ratios, size, counts):
  mixed = mixing.mixture(PARTS, ratios, size=size, seed=1)
  assert collections.Counter(example.id[0] for example in mixed) == counts
  assert {example.source for example in mixed if example.id[0] == 's'} == {1}
  often = collections.Counter(example.id for example in mixed)
  for letter, part in (('l', 'long'), ('s', 'short')):
    if counts.get(letter):
      times = [often[example.id] for example in PARTS[part]]
      assert max(times) - min(times) <= 1
  assert [e.id for e in mixing.mixture(PARTS, ratios, size=size, seed=1)] == [e.id for e in mixed]


@pytest.mark.parametrize('parts, ratios, message', [
    (PARTS, {'long': 1}, 'name each part once'), (PARTS, {'long': -1, 'short': 2}, 'must be non-negative'),
    (PARTS, {'long': 0, 'short': 0}, 'one positive'), ({'a': []}, {'a': 1}, "part 'a' is empty"),
])
def test_mixtures_that_cannot_be_are_refused(parts, ratios, message):
  with pytest.raises(ValueError, match=message):
    mixing.mixture(parts, ratios, size=4, seed=1)


@pytest.mark.parametrize('exact, whole', [([1.5, 2.5], [2, 2]), ([0.2, 0.3, 3.5], [0, 0, 4]), ([3, 0], [3, 0])])
def test_rounding_keeps_the_sum(exact, whole):
  assert mixing.rounded(exact).tolist() == whole


def rows_of(batch):
  """How many rows each part has; a row is of one part."""
  for inputs, sources, segments in zip(batch.inputs, batch.sources, batch.segment_ids):
    inside = segments > 0
    assert len(set(sources[inside])) == 1 and set(inputs[inside]) <= {50 + 10 * sources[inside][0], EOS}
  return [int((batch.sources.max(axis=1) == source).sum()) for source in (0, 1)]


def test_rows_follow_the_shares_exactly_over_a_run():
  source = mixing.shared_source(PARTS, shares_of(0.3, 0.7), **OPTIONS)
  taken = np.cumsum([rows_of(source.next(None, step)) for step in range(50)], axis=0)
  assert np.all(np.abs(taken[:, 0] - 0.3 * 4 * np.arange(1, 51)) < 1)
  assert taken[-1].tolist() == [60, 140]


def test_no_example_is_left_out_of_an_epoch():
  source, seen = mixing.shared_source(PARTS, shares_of(1, 0), **OPTIONS), []
  lengths = sorted(len(example.tokens) for example in PARTS['long'])
  while sum(seen) < sum(lengths):
    batch = source.next(None, len(seen))
    seen.append(int((batch.segment_ids > 0).sum()))
  assert len(seen) <= len(PARTS['long'])


def test_shares_may_change_and_see_the_last():
  asked = []

  def changing(params, step, last):
    asked.append((params, step, tuple(last)))
    return (1, 0) if step < 2 else (0, 5)

  source = mixing.shared_source(PARTS, changing, **OPTIONS)
  assert [rows_of(source.next('params', step)) for step in range(4)] == [[4, 0], [4, 0], [0, 4], [0, 4]]
  assert asked == [
      ('params', 0, (0.5, 0.5)), ('params', 1, (1.0, 0.0)), ('params', 2, (1.0, 0.0)), ('params', 3, (0.0, 1.0)),
  ]


def test_a_stopped_run_goes_on_exactly():
  make = lambda: mixing.shared_source(PARTS, shares_of(0.45, 0.55), **OPTIONS)
  whole, first = make(), make()
  batches = [whole.next(None, step) for step in range(12)]
  for step in range(5):
    first.next(None, step)
  second = make()
  second.set_state(json.loads(json.dumps(first.get_state())))
  for step in range(5, 12):
    for ours, theirs in zip(second.next(None, step), batches[step], strict=True):
      np.testing.assert_array_equal(ours, theirs)


def test_hosts_share_the_rows_of_one_process():
  whole = mixing.shared_source(PARTS, shares_of(1, 1), **OPTIONS)
  hosts = [mixing.shared_source(PARTS, shares_of(1, 1), **OPTIONS, process_index=i, process_count=2) for i in (0, 1)]
  for step in range(3):
    expected, parts = whole.next(None, step), [host.next(None, step) for host in hosts]
    for name in expected._fields:
      np.testing.assert_array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(expected, name))


@pytest.mark.parametrize('shares', [(1,), (-1, 2), (0, 0), (float('nan'), 1)])
def test_shares_that_are_none_are_refused(shares):
  with pytest.raises(ValueError, match='expected non-negative numbers, one of them positive'):
    mixing.shared_source(PARTS, shares_of(*shares), **OPTIONS).next(None, 0)


def test_a_state_of_other_data_is_refused():
  state = mixing.shared_source({'long': PARTS['long']}, shares_of(1), **OPTIONS).get_state()
  with pytest.raises(ValueError, match='the state to resume from has data_hash'):
    mixing.shared_source(PARTS, shares_of(1, 1), **OPTIONS).set_state(state)
  with pytest.raises(ValueError, match='does not divide over 3 hosts'):
    mixing.shared_source(PARTS, shares_of(1, 1), **OPTIONS, process_count=3)
