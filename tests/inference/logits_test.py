"""Sampling follows the distribution it reports, and the truncations keep the sets that they define."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.inference import logits as sampler
from srm_jax.types import SamplingParams

PROBABILITIES = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625], np.float32)


def _logits(rows=1):
  return jnp.broadcast_to(jnp.log(PROBABILITIES)[None], (rows, 5))


def _support(logits):
  return set(np.flatnonzero(np.isfinite(np.asarray(logits)[0])).tolist())


@pytest.mark.parametrize('k, kept', [
    (0, {0, 1, 2, 3, 4}), (1, {0}), (3, {0, 1, 2}), (4, {0, 1, 2, 3, 4}), (9, {0, 1, 2, 3, 4}),
])
def test_top_k_support(k, kept):
  assert _support(sampler.keep_top_k(_logits(), k)) == kept  # the 4th and 5th tie


@pytest.mark.parametrize('p, kept', [(1.0, 5), (0.95, 5), (0.8, 3), (0.75, 2), (0.5, 1), (0.01, 1)])
def test_top_p_support(p, kept):
  assert _support(sampler.keep_top_p(_logits(), p)) == set(range(kept))


def test_top_p_is_blind_to_order():
  order = np.array([3, 0, 4, 2, 1])
  shuffled = jnp.log(PROBABILITIES[order])[None]
  assert _support(sampler.keep_top_p(shuffled, 0.8)) == {1, 3, 4}


@pytest.mark.parametrize('vocab', [5, 64, 65, 200])
def test_inversion_matches_a_plain_cumulative_sum(vocab):
  rng = np.random.default_rng(vocab)
  logits = rng.normal(size=(1, vocab)).astype(np.float32) * 2
  logits[0, :: 3] = -np.inf
  uniform = rng.random(2000).astype(np.float32)
  tokens = jax.jit(sampler.invert_cdf)(jnp.tile(logits, (2000, 1)), uniform)
  weights = np.exp(logits[0].astype(np.float64))
  cumulative = np.cumsum(weights) / weights.sum()
  expected = np.searchsorted(cumulative, uniform, side='right')
  assert np.mean(np.asarray(tokens) != expected) < 0.002  # float32 sums move a border by 1e-7
  assert not np.isin(np.asarray(tokens), np.arange(0, vocab, 3)).any()


def test_ends_of_the_unit_interval_stay_on_possible_tokens():
  logits = jnp.array([[-jnp.inf, 0.0, 0.0, -jnp.inf]] * 2)
  ends = jnp.array([0.0, np.nextafter(np.float32(1), np.float32(0))])
  assert sampler.invert_cdf(logits, ends).tolist() == [1, 2]
  assert sampler.invert_cdf(logits, jnp.array([1.0, 1.0])).tolist() == [2, 2]  # where rounding reaches the end


@pytest.mark.parametrize('temperature', [1.0, 0.5])
def test_sampler_follows_its_distribution(temperature):
  count = 20_000
  keys = sampler.row_keys(7, ((f'p{i}', i % 3) for i in range(count)))
  uniform = jax.jit(sampler.uniforms)(keys, jnp.arange(count) % 50)
  tokens, logprobs = sampler.sample(_logits(count), uniform, temperature=temperature)
  expected = PROBABILITIES ** (1 / temperature) / np.sum(PROBABILITIES ** (1 / temperature))
  observed = np.bincount(np.asarray(tokens), minlength=5)
  chi_square = np.sum((observed - count * expected) ** 2 / (count * expected))
  assert chi_square < 18.5  # 4 degrees of freedom: p = .001
  np.testing.assert_allclose(np.exp(logprobs), expected[np.asarray(tokens)], rtol=1e-5)


def test_logprob_is_taken_before_truncation():
  uniform = jnp.linspace(0, 0.999, 64)
  tokens, logprobs = sampler.sample(_logits(64), uniform, temperature=1.0, top_k=2, top_p=0.7)
  assert set(np.asarray(tokens).tolist()) == {0, 1}
  np.testing.assert_allclose(np.exp(logprobs), PROBABILITIES[np.asarray(tokens)], rtol=1e-5)


def test_top_p_acts_on_what_top_k_left():
  truncated = sampler.keep_top_p(sampler.keep_top_k(_logits(), 2), 0.6)  # 2/3 and 1/3 after top-k
  assert _support(truncated) == {0}


def test_greedy_takes_the_first_maximum_with_its_logprob_at_temperature_one():
  temperature, top_k, top_p = sampler.greedy_or_given(SamplingParams(temperature=0.0, top_k=5, top_p=0.5))
  tokens, logprobs = sampler.sample(
      jnp.array([[0.0, 1.0, 1.0]]), jnp.array([0.99]), temperature=temperature, top_k=top_k, top_p=top_p
  )
  assert tokens.tolist() == [1]
  np.testing.assert_allclose(logprobs, [1 - np.log(1 + 2 * np.e)], rtol=1e-5)


def test_keys_depend_on_seed_prompt_and_sample_alone():
  rows = [('a', 0), ('a', 1), ('b', 0)]
  keys = sampler.row_keys(0, rows)
  assert len(np.unique(keys, axis=0)) == 3
  np.testing.assert_array_equal(sampler.row_keys(0, rows[::-1]), keys[::-1])
  assert not np.array_equal(sampler.row_keys(1, rows), keys)
  draws = sampler.uniforms(keys[[0, 0, 1]], jnp.array([5, 6, 5]))
  assert len(set(np.asarray(draws).tolist())) == 3
  assert sampler.row_keys(0, []).shape == (0, 2)


@pytest.mark.parametrize('field, value', [
    ('temperature', -0.1), ('top_k', -1), ('top_p', 0.0), ('top_p', 1.5), ('max_new_tokens', 0), ('samples', 0)
])
def test_impossible_sampling_is_named(field, value):
  with pytest.raises(ValueError, match=f'{field}={value}'):
    sampler.check(SamplingParams(**{field: value}))
