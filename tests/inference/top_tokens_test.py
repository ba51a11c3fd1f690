"""The k likeliest tokens are those of the dense logits, for any chunk and mesh, only where a target is supervised."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from scipy import special

from srm_jax import sharding
from srm_jax.inference import top_tokens
from srm_jax.losses import top_k
from srm_jax.models import transformer
from srm_jax.recipes.context import forward
from tests import tiny
from tests.inference import models

ROWS = 90  # of 96: what lies behind pads the vocabulary


@functools.cache
def _params():
  return models.params()


def batch():
  return tiny.random_batch(3, rows=8, length=12, vocab=90)


def opened(**options):
  return top_tokens.make_top_tokens(models.CONFIG, _params(), **{'vocab_size': ROWS, 'k': 5, **options})


@functools.cache
def dense():
  """float64 [n, ROWS] logits at the supervised positions, by one forward pass."""
  made = batch()
  hidden = np.asarray(forward(models.CONFIG, _params(), made).hidden, np.float64)
  return (hidden @ np.asarray(_params()['head'], np.float64))[made.loss_mask > 0][:, :ROWS]


def assert_top(found, k, temperature=1.0):
  exact = special.log_softmax(dense() / temperature, axis=1)
  ids, logprobs = found
  assert ids.shape == logprobs.shape == (len(exact), k) and ids.max() < ROWS
  assert (ids.dtype, logprobs.dtype) == (np.int32, np.float32)
  np.testing.assert_allclose(logprobs, -np.sort(-exact, axis=1)[:, :k], atol=2e-5)
  np.testing.assert_allclose(np.take_along_axis(exact, ids, axis=1), logprobs, atol=2e-5)


@pytest.mark.parametrize('options', [
    dict(), dict(chunk=7), dict(chunk=1), dict(chunk=500), dict(k=ROWS), dict(k=1, temperature=0.5, chunk=16)])
def test_the_highest_of_the_dense_logits(options):
  with jax.default_matmul_precision('highest'):
    found = opened(**options).top(batch())
  assert_top(found, options.get('k', 5), options.get('temperature', 1.0))


@pytest.mark.parametrize('mesh', [(2, 2, 2), (8, 1, 1), (1, 1, 8)])
def test_any_mesh_finds_the_same(mesh):
  with jax.set_mesh(sharding.make_mesh(mesh)), jax.default_matmul_precision('highest'):
    params = jax.device_put(
        _params(), sharding.shardings(transformer.param_names(models.CONFIG), _params(), jax.sharding.get_mesh()))
    found = top_tokens.make_top_tokens(models.CONFIG, params, vocab_size=ROWS, k=5, chunk=3)
    assert_top(found.top(batch()), 5)
    np.testing.assert_allclose(found.logits(batch(), 11), dense()[:11], atol=1e-4)


def test_logits_of_the_first_positions():
  for count in (1, 11, 10_000):
    found = opened().logits(batch(), count)
    np.testing.assert_allclose(found, dense()[:count], atol=1e-4)
  assert found.shape == dense().shape


def test_positions_without_loss_cost_no_logits(monkeypatch):
  """As many chunks are taken as the supervised positions fill, and none where there are none."""
  calls = []

  def counting(logits, **options):
    jax.debug.callback(lambda: calls.append(1))
    return truncate(logits, **options)

  truncate = top_k.truncate
  monkeypatch.setattr(top_k, 'truncate', counting)
  made = batch()
  for mask in (made.loss_mask, np.zeros_like(made.loss_mask), np.eye(8, 12, dtype=np.float32)):
    calls.clear()
    ids, _ = opened(k=4, chunk=8).top(made._replace(loss_mask=mask))
    jax.effects_barrier()
    assert len(ids) == mask.sum() and len(calls) == -(-int(mask.sum()) // 8)


def test_the_compute_dtype_is_the_models():
  half = dataclasses.replace(models.CONFIG, dtype='bfloat16')
  ids, logprobs = top_tokens.make_top_tokens(half, _params(), vocab_size=ROWS, k=3).top(batch())
  exact = np.take_along_axis(special.log_softmax(dense(), axis=1), ids, axis=1)
  assert logprobs.dtype == np.float32
  assert 1e-4 < np.abs(exact - logprobs).max() < 0.3


def test_a_k_beyond_the_vocabulary_is_refused():
  with pytest.raises(ValueError, match=f'k {ROWS + 1} of truncate is not between 1 and the {ROWS} tokens'):
    opened(k=ROWS + 1).top(batch())
