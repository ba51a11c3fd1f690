"""Mixtures of teachers: plain sums of probabilities, routing, and a vocabulary that is split over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from srm_jax import sharding
from srm_jax.losses.teacher_mixture import mixture_logprobs

RNG = np.random.default_rng(0)
LOGITS = tuple(RNG.normal(size=(5, 16)).astype(np.float32) for _ in range(3))
WEIGHTS = RNG.uniform(0.1, 2.0, (5, 3)).astype(np.float32)


def plain(weights):
  shares = weights / weights.sum(-1, keepdims=True)
  return sum(shares[:, k : k + 1] * jax.nn.softmax(one) for k, one in enumerate(LOGITS))


def test_a_mixture_is_a_sum_of_probabilities():
  np.testing.assert_allclose(jnp.exp(mixture_logprobs(LOGITS, WEIGHTS)), plain(WEIGHTS), rtol=1e-5)


def test_as_logits_it_stays_what_it_is():
  found = mixture_logprobs(LOGITS, WEIGHTS)
  np.testing.assert_allclose(jax.nn.log_softmax(found), found, atol=1e-6)


def test_two_tokens_by_hand():
  """Halves of (1/2, 1/2) and (1, 0) are (3/4, 1/4)."""
  even, sure = np.zeros((1, 2), np.float32), np.array([[0.0, -1e9]], np.float32)
  np.testing.assert_allclose(jnp.exp(mixture_logprobs((even, sure), np.ones((1, 2)))), [[0.75, 0.25]], rtol=1e-6)


def test_weights_of_zero_and_one_route():
  """And leave a teacher out entirely, values and gradient."""
  broken = LOGITS[1].copy()
  broken[0] = np.nan
  route = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 2]]
  logits = (LOGITS[0], broken, LOGITS[2])
  found, pull = jax.vjp(lambda given: mixture_logprobs(given, route), logits)
  expected = [jax.nn.log_softmax(LOGITS[k][i]) for i, k in enumerate([0, 1, 2, 0, 2])]
  np.testing.assert_allclose(found, np.stack(expected), rtol=1e-5)
  (gradient,) = pull(jnp.ones_like(found))
  assert np.all(np.isfinite(gradient[0])) and np.all(gradient[0][1] == 0) and np.all(gradient[1][0] == 0)


def test_a_split_vocabulary_changes_nothing():
  mesh = sharding.make_mesh((1, 1, 8))
  split = jax.shard_map(
      lambda logits, weights: mixture_logprobs(logits, weights, axis_name='tensor'), mesh=mesh,
      in_specs=(PartitionSpec(None, 'tensor'), PartitionSpec()), out_specs=PartitionSpec(None, 'tensor'),
  )
  np.testing.assert_allclose(jax.jit(split)(LOGITS, WEIGHTS), mixture_logprobs(LOGITS, WEIGHTS), rtol=1e-5)


def test_every_teacher_has_a_weight():
  with pytest.raises(ValueError, match='3 weights for 2 teachers'):
    mixture_logprobs(LOGITS[:2], WEIGHTS)
