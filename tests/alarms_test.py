"""Each alarm rings on the series that it is for, and not on one that only looks like it."""

import math
import random
import re

import pytest

from configs import base
from srm_jax import alarms
from tests import tiny

ROWS = 60


def ramp(first, last):
  return lambda i: first + (last - first) * i / (ROWS - 1)


def points(*values, otherwise=math.nan):
  """Evaluations at equal distances; `otherwise` in the rows between."""
  every = ROWS // len(values)
  return lambda i: values[i // every] if i % every == 0 and i // every < len(values) else otherwise


def jumps(places, value, otherwise):
  return lambda i: value if i in places else otherwise


def noise(middle, width):
  draws = [random.Random(i).uniform(-width, width) for i in range(ROWS)]
  return lambda i: middle + draws[i]


HEALTHY = {
    'reward': ramp(0.2, 0.6), 'entropy': ramp(1.0, 0.5), 'completion_tokens': ramp(100, 130), 'kl': ramp(0.0, 0.05),
    'zero_advantage': ramp(0.5, 0.3), 'unscorable': ramp(0.02, 0.02), 'truncated': ramp(0.1, 0.05),
    'grad_norm': noise(1.0, 0.5), 'sampler_gap': ramp(1e-5, 1e-5), 'accuracy': points(0.2, 0.3, 0.35, 0.4, 0.45, 0.5),
}


def history(log_every=10, **series):
  """Rows of a healthy run with some series in another's place; None leaves a metric out."""
  series = {**HEALTHY, **series}
  made = []
  for i in range(ROWS):
    row = {name: value(i) for name, value in series.items() if value is not None}
    if math.isnan(row.get('accuracy', 0.0)):
      del row['accuracy']
    made.append({'step': (i + 1) * log_every, **row})
  return made


FLAT = dict(reward=noise(0.3, 0.05), entropy=noise(1.0, 0.05), completion_tokens=noise(100, 5), kl=ramp(0.0, 1e-5))
FALLING = points(0.2, 0.3, 0.5, 0.5, 0.5, 0.5, 0.4, 0.4, 0.35, 0.35)
CASES = {  # name: (series that ring, series that must not)
    'entropy_collapse': (dict(entropy=ramp(1.0, 0.001)), [
        dict(entropy=ramp(1.0, 0.3)), dict(entropy=ramp(0.08, 0.05)),  # low, but it always was
        dict(entropy=jumps(range(58, 60), 0.0, 1.0)),  # two rows are no median of five
    ]),
    'length_collapse': (dict(completion_tokens=ramp(100, 10), reward=noise(0.3, 0.02)), [
        dict(completion_tokens=ramp(100, 10)),  # shorter, and better
        dict(completion_tokens=ramp(100, 60), reward=ramp(0.3, 0.2)),
    ]),
    'length_explosion': (dict(completion_tokens=ramp(100, 400), reward=ramp(0.4, 0.2)), [
        dict(completion_tokens=ramp(100, 400)),  # longer, and better
        dict(completion_tokens=ramp(100, 150), reward=ramp(0.4, 0.2)),
    ]),
    'kl_blow_up': (dict(kl=lambda i: 0.01 if i < 55 else 0.5), [
        dict(kl=ramp(0.0, 0.5)), dict(kl=jumps([57], 90.0, 0.01)),
    ]),
    'reward_hacking': (dict(accuracy=FALLING), [
        dict(accuracy=FALLING, reward=lambda i: HEALTHY['reward'](min(i, 30))),  # both stopped rising
        dict(accuracy=points(0.2, 0.3, 0.5, 0.5, 0.5, 0.5, 0.48, 0.49, 0.47, 0.48)),
        dict(accuracy=points(0.2, 0.3, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.1)),
    ]),
    'no_variance': (dict(zero_advantage=lambda i: float(i > 40)), [
        dict(zero_advantage=lambda i: 1.0 if i > 40 and i != 55 else 0.9), dict(zero_advantage=ramp(0.9, 0.99)),
    ]),
    'unscorable': (dict(unscorable=ramp(0.0, 0.4)), [dict(unscorable=ramp(0.0, 0.15)), dict(unscorable=ramp(0.9, 0))]),
    'truncated': (dict(truncated=ramp(0.0, 0.5)), [dict(truncated=ramp(0.6, 0.1))]),
    'gradient_spikes': (dict(grad_norm=jumps([51, 54, 58], 40.0, 1.0)), [
        dict(grad_norm=jumps([54], 40.0, 1.0)), dict(grad_norm=jumps([51, 54, 58], 5.0, 1.0)),
        dict(grad_norm=lambda i: 40.0),  # large, but it always was
    ]),
    'sampler_gap': (dict(sampler_gap=lambda i: 0.08), [dict(sampler_gap=lambda i: 0.02)]),
    'not_moving': (FLAT, [
        {**FLAT, 'entropy': ramp(1.0, 0.8)}, {**FLAT, 'kl': ramp(0.0, 0.02)}, {**FLAT, 'reward': ramp(0.2, 0.4)},
    ]),
}


def names(found):
  return [alarm.name for alarm in found]


def test_every_alarm_has_its_cases():
  assert CASES.keys() == alarms.ALARMS.keys()


def test_a_healthy_run_rings_nothing():
  assert alarms.ringing(history()) == [] and alarms.replay(history()) == []


@pytest.mark.parametrize('name', CASES)
def test_an_alarm_rings_alone_and_says_why(name):
  rows = history(**CASES[name][0])
  alarm, = alarms.ringing(rows)
  assert alarm.name == name and alarm.step == rows[-1]['step']
  assert re.search(r'\d', alarm.seen) and 'step' in alarm.seen and alarm.cause and 'config.' in alarm.fix
  assert name in alarms.message(alarm) and alarm.fix in alarms.message(alarm)


@pytest.mark.parametrize('name, quiet', [(name, quiet) for name, (_, others) in CASES.items() for quiet in others])
def test_what_only_looks_like_it_is_let_pass(name, quiet):
  assert name not in names(alarms.ringing(history(**quiet)))


@pytest.mark.parametrize('name', CASES)
def test_short_histories_holes_and_infinities_ring_nothing(name):
  rows = history(**CASES[name][0])
  for end in range(2 * alarms.WINDOW):
    assert alarms.ringing(rows[len(rows) - end :]) == []
  assert alarms.ALARMS[name]([]) is None
  keys = {key for row in rows for key in row} - {'step'}
  assert alarms.ALARMS[name]([{'step': row['step'], **dict.fromkeys(keys, math.nan)} for row in rows]) is None
  assert alarms.ALARMS[name]([{'step': row['step'], **dict.fromkeys(keys)} for row in rows]) is None


@pytest.mark.parametrize('name', CASES)
def test_single_rows_that_are_not_finite_change_nothing(name):
  rows = history(**CASES[name][0])
  bad = {key: math.nan for row in rows for key in row if key not in ('step', 'accuracy')}
  holes = [row if i % 20 else {'step': row['step'], **bad, 'grad_norm': math.inf} for i, row in enumerate(rows, 1)]
  assert names(alarms.ringing(holes[:-1])) == [name]


def test_figures_are_medians_of_the_steps_named():
  alarm, = alarms.ringing(history(entropy=lambda i: 1.0 if i < 30 else 0.01 * (i % 2)))
  assert alarm.seen == 'entropy 1 (median, steps 10 to 50), then entropy 0.01 (median, steps 560 to 600)'


def test_the_advice_for_groups_without_variance_follows_the_reward():
  """A source asks this of its own steps."""
  steps = [{'step': i, 'zero_advantage': 1.0, 'reward': 0.0} for i in range(10)]
  assert alarms.no_variance(steps[:9]) is None
  hard = alarms.no_variance(steps)
  assert 'too hard' in hard.cause and 'easier' in hard.fix and 'steps 0 to 9' in hard.seen
  easy = alarms.no_variance([{**row, 'reward': 1.0} for row in steps])
  assert 'too easy' in easy.cause and 'harder' in easy.fix
  assert 'too hard' in alarms.no_variance([{'step': i, 'zero_advantage': 1.0} for i in range(10)]).cause


def test_only_runs_with_a_reward_are_watched():
  assert alarms.ringing(history(entropy=ramp(1.0, 0.001), reward=None)) == [] == alarms.ringing([])


def test_a_watcher_says_each_alarm_once():
  rows = history(entropy=ramp(1.0, 0.001), unscorable=ramp(0.0, 0.4))
  watch = alarms.watcher(rows[:20])
  said = [(alarm.name, row['step']) for row in rows[20:] for alarm in watch(row)]
  assert [name for name, _ in said] == ['unscorable', 'entropy_collapse']
  assert [(alarm.name, alarm.step) for alarm in alarms.replay(rows)] == said


def test_a_replay_of_many_rows_finds_what_rang_in_between():
  rows = [{'step': i, 'reward': 0.3, 'unscorable': 0.5 if 300 <= i < 400 else 0.0} for i in range(1000)]
  assert alarms.ringing(rows) == [] and names(alarms.replay(rows)) == ['unscorable']


def test_the_keys_of_the_advice_exist():
  config = tiny.train(base.grpo(tiny.data(), tiny.rollouts()))
  keys = {
      key for name, (ring, _) in CASES.items() for alarm in alarms.ringing(history(**ring))
      for key in re.findall(r'config(\.[a-z_.]+[a-z_])', alarm.fix)
  }
  assert len(keys) > 10
  for key in keys:
    owner = config
    for part in key.strip('.').split('.'):
      assert part in owner, key
      owner = owner[part]
