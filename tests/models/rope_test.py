"""Rotary embedding by hand; every way of stretching it against its formula, and at its limits."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.models import rope
from srm_jax.models.config import ROPE_SCALINGS, RopeScaling, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=8, num_layers=1, embed_dim=8, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8, rope_base=50.0
)


def _angles(positions, config=CONFIG, kind='g', segments=None):
  positions = jnp.asarray([positions])
  segments = jnp.ones_like(positions) if segments is None else jnp.asarray([segments])
  return rope.angles(config, positions, segments, kind)


def _scaled(**options):
  return dataclasses.replace(CONFIG, rope_scaling=RopeScaling(**options))


def _frequencies(config, width=8, base=50.0):
  plain = rope.plain_frequencies(width, base)
  return rope.SCALINGS[config.rope_scaling.kind](config.rope_scaling, plain, base)


def test_coordinate_i_turns_with_i_plus_half():
  config = dataclasses.replace(CONFIG, head_dim=4, rope_base=100.0)
  x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4) * jnp.ones((1, 2, 1, 1))
  y = rope.rotate(x, _angles([0, 3], config))[0, :, 0]
  slow = 3 * 100**-0.5
  expected = [
      np.cos(3) - 3 * np.sin(3), 2 * np.cos(slow) - 4 * np.sin(slow), 3 * np.cos(3) + np.sin(3),
      4 * np.cos(slow) + 2 * np.sin(slow),
  ]
  np.testing.assert_allclose(y[0], [1, 2, 3, 4])
  np.testing.assert_allclose(y[1], expected, rtol=1e-5)


def test_products_depend_on_distance_alone():
  q, k = (jnp.asarray(np.random.default_rng(seed).normal(size=(1, 1, 1, 8))) for seed in (0, 1))

  def score(at, of):
    return float(jnp.sum(rope.rotate(q, _angles([at])) * rope.rotate(k, _angles([of]))))

  assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
  assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)


def test_part_of_a_head_is_left_alone():
  config = dataclasses.replace(CONFIG, rope_dim=4)
  x = jnp.arange(8.0).reshape(1, 1, 1, 8) + 1
  y = rope.rotate(x, _angles([3], config))[0, 0, 0]
  np.testing.assert_array_equal(y[4:], x[0, 0, 0, 4:])
  alone = rope.rotate(x[..., :4], _angles([3], dataclasses.replace(CONFIG, head_dim=4)))[0, 0, 0]
  np.testing.assert_allclose(y[:4], alone, rtol=1e-6)


def test_layers_without_positions_and_layers_with_their_own_base():
  assert _angles([3], kind='n') is None
  x = jnp.ones((1, 1, 1, 8))
  assert rope.rotate(x, None) is x
  config = dataclasses.replace(
      CONFIG, pattern='l', window=4, local_rope_base=7.0, rope_scaling=RopeScaling('linear', factor=2.0)
  )
  np.testing.assert_array_equal(
      _angles([3], config, 'l')[0], _angles([3], dataclasses.replace(CONFIG, rope_base=7.0))[0]
  )


def test_every_scaling_is_known_to_the_config():
  assert set(rope.SCALINGS) == set(ROPE_SCALINGS)


def test_linear_divides_positions():
  np.testing.assert_allclose(
      _angles([12], _scaled(kind='linear', factor=4.0))[1], _angles([3])[1], rtol=1e-5
  )


def test_llama3_keeps_short_wavelengths_and_divides_long_ones():
  scaling = dict(kind='llama3', factor=8.0, original_length=64, low_freq_factor=1.0, high_freq_factor=4.0)
  plain, found = rope.plain_frequencies(8, 50.0), _frequencies(_scaled(**scaling))
  for before, after in zip(plain, found, strict=True):
    turns = 64 * before / (2 * math.pi)
    kept = min(1.0, max(0.0, (turns - 1) / 3))
    assert after == pytest.approx((1 - kept) * before / 8 + kept * before, rel=1e-6)
  assert found[0] == plain[0] and found[-1] == pytest.approx(plain[-1] / 8)
  assert plain[1] > found[1] > plain[1] / 8 or plain[2] > found[2] > plain[2] / 8  # the ramp is met


def test_yarn_by_hand():
  plain, found = rope.plain_frequencies(8, 50.0), _frequencies(_scaled(kind='yarn', factor=4.0, original_length=64))

  def coordinate(turns):
    return 8 * math.log(64 / (turns * 2 * math.pi)) / (2 * math.log(50.0))

  low, high = max(math.floor(coordinate(32)), 0), min(math.ceil(coordinate(1)), 7)
  for i, (before, after) in enumerate(zip(plain, found, strict=True)):
    kept = 1 - min(1.0, max(0.0, (i - low) / (high - low)))
    assert after == pytest.approx((1 - kept) * before / 4 + kept * before, rel=1e-6)
  assert found[0] == plain[0] and found[2] < plain[2]


def test_yarn_without_truncation_has_other_ends():
  options = dict(kind='yarn', factor=4.0, original_length=64)
  assert not np.array_equal(_frequencies(_scaled(**options)), _frequencies(_scaled(**options, truncate=False)))


def test_attention_factors():
  assert rope.yarn_attention_factor(4.0, 32, {}) == pytest.approx(0.1 * math.log(4) + 1)
  assert rope.yarn_attention_factor(1.0, 32, {}) == 1.0
  both = {'mscale': 1.0, 'mscale_all_dim': 0.5}
  assert rope.yarn_attention_factor(4.0, 32, both) == pytest.approx((0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1))
  assert rope.longrope_attention_factor(32.0, 4096, {}) == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
  assert rope.longrope_attention_factor(1.0, 4096, {}) == 1.0
  cos, _ = _angles([0], _scaled(kind='linear', factor=2.0, attention_factor=1.25))
  np.testing.assert_allclose(cos, 1.25)


LONG = dict(kind='longrope', original_length=4, short_factor=(1.0,) * 4, long_factor=(1.0, 2.0, 3.0, 4.0))


def test_longrope_chooses_by_the_length_of_the_text():
  config = _scaled(**LONG)
  short, long = _angles([0, 1, 2, 3], config), _angles([0, 1, 2, 3, 4], config)
  np.testing.assert_array_equal(short[1], _angles([0, 1, 2, 3])[1])
  plain = rope.plain_frequencies(8, 50.0)
  np.testing.assert_allclose(long[1][0, 1], np.sin(plain / [1, 2, 3, 4]), rtol=1e-5)


def test_longrope_of_packed_texts_is_that_of_each_alone():
  config = _scaled(**LONG)
  packed = _angles([0, 1, 2, 3, 4, 0, 1, 2], config, segments=[1, 1, 1, 1, 1, 2, 2, 2])
  np.testing.assert_array_equal(packed[0][:, :5], _angles([0, 1, 2, 3, 4], config)[0])
  np.testing.assert_array_equal(packed[0][:, 5:], _angles([0, 1, 2], config)[0])


@pytest.mark.parametrize('options, message', [
    (dict(kind='dynamic'), "'dynamic' unknown; choose from"),
    (dict(kind='yarn', factor=2.0), 'needs original_length'),
])
def test_config_refuses(options, message):
  with pytest.raises(ValueError, match=message):
    RopeScaling(**options)


def test_longrope_with_too_few_factors():
  with pytest.raises(ValueError, match='4 short and long factors'):
    _angles([0], _scaled(**LONG | dict(short_factor=(1.0,), long_factor=(1.0,))))
