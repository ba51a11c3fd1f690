"""Shares that follow the student: golden values, what is held out, and runs that measure, resume and refuse."""

import jax
import numpy as np
import pytest

from configs import base
from srm_jax import schema
from srm_jax.data import packing
from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import adaptive
from srm_jax.train import train
from tests import tiny
from tests.tiny import one_device, tiny_tasks  # noqa: F401

MODEL = TransformerConfig(258, 1, 16, 2, 2, 8, 32)


def config(**options):
  return adaptive.AdaptiveConfig(**{'every': 2, 'held_out': 3, 'smoothing': 0.0, **options})


def test_golden_shares():
  """Perplexities of 2 and 3 times the teacher's: softmax(2, 3) = (0.26894, 0.73106)."""
  student, teacher = np.log([4.0, 9.0]), np.log([2.0, 3.0])
  np.testing.assert_allclose(adaptive.gap_shares(student, teacher, smoothing=0.0), [0.268941, 0.731059], atol=1e-6)
  np.testing.assert_allclose(adaptive.gap_shares(student, teacher, smoothing=0.5), [0.384471, 0.615529], atol=1e-6)
  np.testing.assert_allclose(adaptive.gap_shares(student, teacher, smoothing=1.0), [0.5, 0.5])
  np.testing.assert_allclose(adaptive.gap_shares([800.0, 0.0], [799.0, 1.0], smoothing=0.0).sum(), 1.0)


@pytest.mark.parametrize('options', [dict(every=0), dict(held_out=0), dict(smoothing=1.5), dict(smoothing=-0.1)])
def test_options_out_of_range(options):
  with pytest.raises(ValueError, match='out of range'):
    config(**options)


def examples(count, token):
  return [packing.from_prompt_completion(f'{token}{i}', [token], [token, i], 0) for i in range(count)]


def test_held_out_examples_are_not_learnt():
  parts = {'a': examples(8, 5), 'b': examples(5, 6)}
  learnt, measured = adaptive.hold_out(parts, 3, seed=1)
  for name, part in parts.items():
    assert len(measured[name]) == 3
    assert sorted(e.id for e in [*learnt[name], *measured[name]]) == sorted(e.id for e in part)
  with pytest.raises(schema.ConfigError, match='data.mix.b has 5 examples'):
    adaptive.hold_out(parts, 5, seed=1)


def test_shares_are_measured_every_so_often():
  """And are those of cross-entropies that were found apart."""
  params = [jax.jit(transformer.init_params, static_argnums=0)(MODEL, jax.random.key(seed)) for seed in (0, 1, 2)]
  _, measured = adaptive.hold_out({'a': examples(8, 5), 'b': examples(8, 200)}, 3, seed=1)
  at = adaptive.shares(
      config(every=3), measured, length=8, student=MODEL, teacher=MODEL, teacher_params=params[0],
  )
  mean = adaptive.cross_entropy(MODEL)
  losses = [[float(mean(one, packing.pad_batch(measured[name], 8))) for name in 'ab'] for one in params]
  found = at({'model': params[1]}, 0, [0.5, 0.5])
  np.testing.assert_allclose(found, adaptive.gap_shares(losses[1], losses[0], smoothing=0.0), rtol=1e-6)
  assert at({'model': params[2]}, 1, found) is found
  np.testing.assert_allclose(
      at({'model': params[2]}, 3, found), adaptive.gap_shares(losses[2], losses[0], smoothing=0.0), rtol=1e-6)
  assert abs(found[0] - 0.5) > 1e-3


def recipe(teacher, **options):
  data = base.mix(sums=(1.0, tiny.data()), parity=(1.0, tiny.data('parity', seed=2)))
  return base.distill(teacher, data, tiny.batch(), base.distillation(), adaptive=base.adaptive(
      **{'every': 2, 'held_out': 2, **options}))


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
  shape = TransformerConfig(258, 1, 16, 2, 2, 8, 32, max_length=64)
  return tiny.write_model(tmp_path_factory.mktemp('teacher'), shape, seed=3, scale=3.0)


def test_a_stopped_run_continues_bit_for_bit(teacher, tmp_path):
  """After a step between two measurements: the shares of the last one are in the checkpoint."""
  config = tiny.train(recipe(teacher, every=3), num_steps=6)
  expected = train(config, tmp_path / 'whole')
  with tiny.stopped_after(4):
    train(config, tmp_path / 'stopped')
  run = train(config, tmp_path / 'stopped')
  jax.tree.map(np.testing.assert_array_equal, run.params, expected.params)
  assert run.metrics[-1]['loss'] == expected.metrics[-1]['loss']


@pytest.mark.parametrize('change, message', [
    (lambda section: section.update(data=tiny.data()), 'sets the shares of a mix'),
    (lambda section: section.data.update(count=4), 'sets the shares of a mix'),
])
def test_adaptive_shares_need_a_mix_that_is_drawn_row_by_row(teacher, tmp_path, change, message):
  section = recipe(teacher)
  change(section)
  with pytest.raises(schema.ConfigError, match=message):
    train(tiny.train(section), tmp_path)
