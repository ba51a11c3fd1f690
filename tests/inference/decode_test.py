"""Decoding with a cache is the full forward pass, and its log-probabilities are the trainer's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.inference import decode
from srm_jax.inference import logits as sampler
from srm_jax.models import adapters, transformer
from srm_jax.models.transformer import Transformer
from srm_jax.types import SamplingParams
from tests.inference import models

PROMPTS = [[5, 9, 7], [11], [3, 4, 5, 6, 7, 8, 9, 10, 2], [40, 41, 42, 43]]
KEYS = sampler.row_keys(3, ((str(i), 0) for i in range(4)))


@pytest.fixture(scope='module', autouse=True)
def exact_products():
  with jax.default_matmul_precision('highest'):
    yield


@pytest.fixture(scope='module')
def prepared():
  return decode.prepare(models.CONFIG, models.params())


def _complete(prepared, prompts=PROMPTS, keys=KEYS, *, end_ids=(-1,), batch_size=4, steps=8, progress=None, **sampling):
  return decode.complete(
      models.CONFIG, prepared, prompts, range(len(prompts)), keys, SamplingParams(**sampling), end_ids=end_ids,
      batch_size=batch_size, steps=steps, progress=progress,
  )


def _trainer_logprobs(prompt, tokens, temperature):
  logits = models.full_logits(models.params(), [*prompt, *tokens])
  logprobs = jax.nn.log_softmax(logits / temperature, axis=-1)
  return np.asarray(logprobs)[np.arange(len(tokens)) + len(prompt) - 1, tokens]


def test_sampler_logprobs_are_the_trainers_across_cache_sizes(prepared):
  tokens, logprobs = _complete(prepared, max_new_tokens=32, temperature=0.7)  # slots grow from 24 to 32 and 48
  for prompt, row, row_logprobs in zip(PROMPTS, tokens, logprobs, strict=True):
    assert len(row) == 32
    np.testing.assert_allclose(row_logprobs, _trainer_logprobs(prompt, row, 0.7), atol=1e-4)
  assert len({tuple(row) for row in tokens}) == 4


def test_greedy_is_the_argmax_of_repeated_full_forwards(prepared):
  tokens, logprobs = _complete(prepared, max_new_tokens=12, temperature=0.0)
  for prompt, row, row_logprobs in zip(PROMPTS, tokens, logprobs, strict=True):
    sequence = list(prompt)
    for token in row:
      assert token == models.full_logits(models.params(), sequence)[-1].argmax()
      sequence.append(token)
    np.testing.assert_allclose(row_logprobs, _trainer_logprobs(prompt, row, 1.0), atol=1e-4)


def test_growth_and_call_length_change_nothing(prepared):
  once = _complete(prepared, max_new_tokens=32, steps=32)
  often = _complete(prepared, max_new_tokens=32, steps=8)
  assert once[0] == often[0]
  np.testing.assert_allclose(once[1], often[1], atol=1e-5)


def test_a_row_ends_with_its_first_end_of_text_and_the_rest_go_on(prepared):
  free, logprobs = _complete(prepared, max_new_tokens=24)
  eos = free[1][10]
  stopped, stopped_logprobs = _complete(prepared, max_new_tokens=24, end_ids=(eos,))
  for row, whole, row_logprobs, whole_logprobs in zip(stopped, free, stopped_logprobs, logprobs, strict=True):
    end = whole.index(eos) + 1 if eos in whole else 24
    assert row == whole[:end]
    np.testing.assert_allclose(row_logprobs, whole_logprobs[:end], atol=1e-4)
  assert stopped[1].count(eos) == 1


def test_whatever_ends_a_text_ends_a_row(prepared):
  """Chat models end a turn with one token and a text with another."""
  free, _ = _complete(prepared, max_new_tokens=24)
  ends = (free[0][5], free[1][9])
  stopped, _ = _complete(prepared, max_new_tokens=24, end_ids=ends)
  for row, whole in zip(stopped, free, strict=True):
    places = [whole.index(end) + 1 for end in ends if end in whole]
    assert row == whole[: min(places, default=24)]
  assert stopped[0][-1] in ends and stopped[1][-1] in ends


def test_smaller_batches_take_over_when_rows_finish(prepared):
  free, logprobs = _complete(prepared, max_new_tokens=24, batch_size=4)
  eos = next(token for token in free[2] if token in free[0][:8] + free[1][:8])  # ends a row in the first call
  ends = [row.index(eos) + 1 if eos in row else 24 for row in free]
  assert sum(end > 8 for end in ends) <= 2 and max(ends) > 8
  stopped, stopped_logprobs = _complete(prepared, max_new_tokens=24, batch_size=4, end_ids=(eos,))
  assert stopped == [row[:end] for row, end in zip(free, ends, strict=True)]


def test_decoding_stops_when_all_rows_are_done(prepared):
  tokens, lengths = decode.pad_left(PROMPTS, 4)
  state = decode.prefill(models.CONFIG, prepared, tokens, lengths, np.arange(4), KEYS, size=32)
  start = int(state.cache.index)
  first = decode.decode(models.CONFIG, prepared, state, 1.0, np.array([-1]), 16, top_k=1, top_p=1.0, steps=16)[1]
  assert (np.asarray(first) >= 0).all()
  state = decode.prefill(models.CONFIG, prepared, tokens, lengths, np.arange(4), KEYS, size=32)
  state = state._replace(done=jnp.array([True, True, False, True]))
  eos = int(first[2, 5])
  steps = first[2].tolist().index(eos) + 1
  state, emitted, logprobs, done = decode.decode(
      models.CONFIG, prepared, state, 1.0, np.array([eos]), 16, top_k=1, top_p=1.0, steps=16
  )
  assert int(state.cache.index) == start + steps and done.all()
  assert emitted[2, :steps].tolist() == first[2, :steps].tolist()
  others = np.array([0, 1, 3])
  assert (emitted[2, steps:] == decode.NOT_EMITTED).all() and (emitted[others] == decode.NOT_EMITTED).all()
  assert (logprobs[others] == 0).all()


def test_new_parameters_and_temperatures_compile_nothing(prepared):
  _complete(prepared, max_new_tokens=8)
  before = decode.decode._cache_size(), decode.prefill._cache_size()
  other = decode.prepare(models.CONFIG, models.params(1))
  first, _ = _complete(other, max_new_tokens=8, temperature=1.3)
  assert (decode.decode._cache_size(), decode.prefill._cache_size()) == before
  assert first != _complete(prepared, max_new_tokens=8, temperature=1.3)[0]


def test_progress_counts_every_token_once(prepared):
  reported = []
  tokens, _ = _complete(prepared, max_new_tokens=20, end_ids=(7,), progress=reported.append)
  assert sum(reported) == sum(map(len, tokens))


@pytest.mark.parametrize('length, size', [
    (1, 16), (16, 16), (17, 24), (25, 32), (33, 48), (49, 64), (65, 96), (97, 128),
])
def test_buckets(length, size):
  assert decode.bucket(length) == size


@pytest.mark.parametrize('rows, size', [(1, 16), (16, 16), (17, 32), (33, 64), (64, 64)])
def test_batch_buckets(rows, size):
  assert decode.batch_bucket(rows, 64) == size


def test_odd_batches_are_not_halved():
  assert decode.batch_bucket(1, 6) == 3 and decode.batch_bucket(4, 6) == 6 and decode.batch_bucket(1, 7) == 7


def test_adapters_are_merged_and_quantised_matrices_made_whole():
  """Greedy log-probabilities of the prepared copy are those of the adapters inside the block."""
  adapter = adapters.AdapterConfig(2, 8.0, ('attention/[qo]*', '1/mlp/up'))
  base = jax.jit(lambda params: adapters.quantize(models.CONFIG, params, 'int8', ('attention/*',)))(models.params())
  tree = jax.jit(lambda: adapters.init_adapters(models.CONFIG, adapter, jax.random.key(0)))()
  joined = adapters.join(models.CONFIG, adapter, base, jax.tree.map(lambda leaf: leaf + 0.2, tree))
  copy = decode.prepare(models.CONFIG, joined)
  assert jax.tree.structure(copy) == jax.tree.structure(decode.prepare(models.CONFIG, models.params()))
  tokens, logprobs = _complete(copy, PROMPTS[:2], KEYS[:2], temperature=0.0, max_new_tokens=6)
  for prompt, completion, found in zip(PROMPTS, tokens, logprobs):
    rows, inputs = np.arange(len(completion)) + len(prompt) - 1, jnp.asarray([[*prompt, *completion]])
    logits = jax.jit(Transformer(models.CONFIG).apply)(transformer.variables(joined), inputs).logits[0]
    inside = jax.nn.log_softmax(logits)[rows, np.asarray(completion)]
    np.testing.assert_allclose(found, inside, atol=1e-4)
    assert np.max(np.abs(inside - _trainer_logprobs(prompt, completion, 1.0))) > 0.1
