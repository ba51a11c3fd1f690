"""Numbers that change: their values step by step, alike where the step is traced, and errors that name the key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.recipes import schedules
from srm_jax.schema import ConfigError

BY_HAND = [  # (config, {step: number})
    (0.5, {0: 0.5, 7: 0.5}),
    (2, {0: 2.0}),
    (dict(name='linear', start=1.0, end=0.0, steps=4), {0: 1.0, 1: 0.75, 3: 0.25, 4: 0.0, 9: 0.0}),
    (dict(name='linear', start=0, end=2, steps=2, delay=3), {0: 0.0, 3: 0.0, 4: 1.0, 5: 2.0, 6: 2.0}),
    (dict(name='cosine', start=1.0, end=3.0, steps=4), {0: 1.0, 1: 2 - 0.5**0.5, 2: 2, 3: 2 + 0.5**0.5, 4: 3, 8: 3}),
    (dict(name='cosine', start=3.0, end=1.0, steps=2, delay=1), {0: 3.0, 1: 3.0, 2: 2.0, 3: 1.0}),
    (dict(name='switch', start=0.2, end=0.8, steps=3), {0: 0.2, 2: 0.2, 3: 0.8, 50: 0.8}),
]


@pytest.mark.parametrize('config, expected', BY_HAND)
def test_values_by_hand_and_of_traced_steps(config, expected):
  schedule = schedules.schedule(config, 'here')
  steps = jnp.array(list(expected))
  traced = jax.jit(jax.vmap(lambda step: jnp.float32(schedule(step))))(steps)
  np.testing.assert_allclose(traced, list(expected.values()), rtol=1e-6, atol=1e-6)
  for step, number in expected.items():
    assert float(schedule(step)) == pytest.approx(number, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize('name', schedules.SCHEDULES)
def test_every_schedule_goes_from_end_to_end_and_stays_between(name):
  assert name in {config['name'] for config, _ in BY_HAND if isinstance(config, dict)}
  config = dict(name=name, start=0.9, end=0.1, steps=5)
  values = np.array([float(schedules.schedule(config, 'here')(step)) for step in range(8)])
  assert schedules.ends(config) == pytest.approx((values[0], values[-1])) == (0.9, 0.1)
  assert np.all(np.diff(values) <= 0) and values[4] > 0.1 + 1e-3  # the last of the 5 steps is not yet the end
  assert schedules.spoken(config) == f'0.9 to 0.1 ({name}, 5 steps)'


def test_a_number_has_two_equal_ends():
  assert schedules.ends(0.25) == (0.25, 0.25) and schedules.spoken(0.25) == '0.25'


LINEAR = dict(name='linear', start=1.0, end=0.0, steps=4)


@pytest.mark.parametrize('value, message', [
    ('high', r"loss\.weight is 'high'; give a number, or a schedule such as"),
    (True, r'loss\.weight is True; give a number'),
    (None, r'loss\.weight is None; give a number'),
    ([1.0], r'loss\.weight is \[1\.0\]; give a number'),
    (float('nan'), r'loss\.weight is nan; give a number'),
    (float('inf'), r'loss\.weight is inf; give a number'),
    (dict(start=1.0, end=0.0, steps=4), r"loss\.weight is \{'start'.*give a number, or a schedule"),
    (LINEAR | dict(name='linera'), r"schedule of loss\.weight 'linera' unknown \(did you mean 'linear'"),
    (LINEAR | dict(stop=3), r"option of schedule of loss\.weight 'linear' 'stop' unknown"),
    (dict(name='switch', start=1, end=0, steps=3, delay=2), r"schedule of loss\.weight 'switch' 'delay' unknown"),
    (dict(name='cosine', start=1.0), r"schedule of loss\.weight 'cosine' needs the options \['end', 'steps'\]"),
    (LINEAR | dict(start='a'), r"loss\.weight\.start is 'a'; expected a number"),
    (LINEAR | dict(end=True), r'loss\.weight\.end is True; expected a number'),
    (LINEAR | dict(end=float('nan')), r'loss\.weight\.end is nan; expected a number'),
    (LINEAR | dict(start=LINEAR), r"loss\.weight\.start is \{'name'.*expected a number"),
    (LINEAR | dict(steps=0), r'loss\.weight\.steps is 0; expected a whole number, at least 1'),
    (LINEAR | dict(steps=1.5), r'loss\.weight\.steps is 1\.5; expected a whole number'),
    (LINEAR | dict(steps=True), r'loss\.weight\.steps is True; expected a whole number'),
    (LINEAR | dict(delay=-1), r'loss\.weight\.delay is -1; expected a whole number, at least 0'),
])
def test_errors_name_the_key(value, message):
  with pytest.raises(ConfigError, match=message):
    schedules.schedule(value, 'loss.weight')
