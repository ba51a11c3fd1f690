import dataclasses

import numpy as np
import pytest
from scipy import special

from srm_jax.data import top_k_codec
from srm_jax.data.top_k_codec import Codec, TeacherTokens, reconstruction_kl

WIDE = 151_936


def softmax_logits(tokens, vocab_size, *, seed=0, spread=3.0):
  return (np.random.default_rng(seed).normal(size=(tokens, vocab_size)) * spread).astype(np.float32)


def zipf_logits(tokens, vocab_size, *, seed=0, lead=0.0):
  """Zipf-like next-token logits with noise; lead raises one token above the rest."""
  generator = np.random.default_rng(seed)
  exponents = generator.uniform(1.0, 2.0, (tokens, 1))
  logits = -exponents * np.log(np.arange(1, vocab_size + 1)) + generator.normal(0, 0.3, (tokens, vocab_size))
  logits[:, 0] += lead
  return generator.permuted(logits, axis=1).astype(np.float32)


def top_k(logits, k):
  """ids, log-probabilities, likeliest first."""
  logprobs = special.log_softmax(logits.astype(np.float64), axis=1)
  ids = np.argsort(-logprobs, axis=1)[:, :k]
  return ids.astype(np.int32), np.take_along_axis(logprobs, ids, axis=1).astype(np.float32)


def by_id(ids, values):
  return np.take_along_axis(values, np.argsort(ids, axis=1), axis=1)


@pytest.mark.parametrize('vocab_size, k', [
    (1, 1), (2, 1), (2, 2), (5, 3), (8, 8), (50, 7), (64, 64), (255, 9), (257, 64), (1000, 1), (4099, 33), (2**18, 64),
    (2**18, 16), (2**18, 130),
])  # fmt: skip
def test_ids_come_back_exactly_for_any_vocabulary(vocab_size, k):
  """Log-probabilities to half a step of their code; ids ascending, also the first and the last of the vocabulary."""
  codec, logits = Codec(vocab_size, k), softmax_logits(20, vocab_size)
  logits[0, 0] = logits[0, -1] = 40.0
  ids, logprobs = top_k(logits, k)
  rows = codec.encode(ids, logprobs)
  assert rows.dtype == np.uint8 and rows.shape == (20, codec.bytes_per_token)
  tokens = codec.decode(rows)
  assert [field.dtype for field in tokens] == [np.int32, np.float32, np.float32]
  np.testing.assert_array_equal(tokens.ids, np.sort(ids, axis=1))
  exact = by_id(ids, logprobs)
  top, decoded_top = (values.max(axis=1, keepdims=True) for values in (exact, tokens.logprobs))
  fall, span = top - exact, np.ptp(exact, axis=1)[:, None]
  half_step = np.sqrt(fall * span) / 1023 + span / 1023**2
  assert (np.abs(decoded_top - tokens.logprobs - fall) <= half_step + 1e-5).all()
  np.testing.assert_allclose(decoded_top, top, atol=5e-3)  # all move together, to sum to one
  np.testing.assert_allclose(np.exp(tokens.logprobs, dtype=np.float64).sum(axis=1) + tokens.tail, 1, rtol=3e-7)


def test_bytes_a_token():
  """At k = 64 at most 300 were asked for; the ids cannot take fewer than log2 C(V, k) bits."""
  sizes = {k: Codec(WIDE, k).bytes_per_token for k in (16, 32, 64, 128)}
  assert sizes == {16: 63, 32: 109, 64: 198, 128: 367}
  assert Codec(2**18, 64).bytes_per_token == 204
  assert Codec(8, 1).bytes_per_token == 12 + 3 + 1  # eight places for one bit
  fewest = (special.gammaln(WIDE + 1) - special.gammaln(65) - special.gammaln(WIDE - 63)) / np.log(2) / 8
  assert fewest < sizes[64] - 12 - 80 < 1.06 * fewest


def test_layout_by_hand():
  """One of .2 and seven of .1 leave .1: code 0 and seven times 1023, of which two bits lie in planes of their own."""
  codec = Codec(64, 8)
  assert codec.low_bits == 2 and codec.bytes_per_token == 12 + 10 + 2 + 3
  row = codec.encode([[0, 9, 18, 27, 36, 45, 54, 63]], np.log([[0.2] + [0.1] * 7]))[0]
  np.testing.assert_allclose(row[:12].view('<f4'), [np.log(0.2), np.log(2), 0.1], rtol=1e-6)
  assert row[12:22].tolist() == [0] + [255] * 7 + [0b01111111] * 2
  assert row[22:24].tolist() == [0b01010101, 0b00110011]  # id mod 4 = 0 1 2 3 0 1 2 3
  assert row[24:].tolist() == [0b10010010, 0b01000100, 0b10010010]  # id / 4 + rank = 0 3 6 9 13 16 19 22


def test_the_order_of_the_ids_does_not_matter():
  ids, logprobs = top_k(softmax_logits(10, 300), 20)
  order = np.random.default_rng(1).permuted(np.tile(np.arange(20), (10, 1)), axis=1)
  shuffled = np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprobs, order, axis=1)
  np.testing.assert_array_equal(Codec(300, 20).encode(ids, logprobs), Codec(300, 20).encode(*shuffled))


def test_no_tokens():
  codec = Codec(300, 20)
  rows = codec.encode(np.empty((0, 20), int), np.empty((0, 20)))
  assert rows.shape == (0, codec.bytes_per_token)
  tokens = codec.decode(rows)
  assert tokens.ids.shape == tokens.logprobs.shape == (0, 20) and tokens.tail.shape == (0,)
  assert reconstruction_kl(np.empty((0, 300)), tokens).total.shape == (0,)


def test_equal_probabilities():
  with np.errstate(all='raise'):
    tokens = Codec(8, 4).decode(Codec(8, 4).encode([[0, 1, 2, 3]], np.log(np.full((1, 4), 0.125))))
  np.testing.assert_allclose(tokens.logprobs, np.log(0.125), rtol=1e-6)
  np.testing.assert_allclose(tokens.tail, 0.5, rtol=1e-6)


def test_the_tail_of_a_certain_token_is_neither_negative_nor_above_what_the_rest_can_hold():
  """Rounding hides it in 1 - sum: 1e-12 is the least of the top, so six others hold at most 6e-12."""
  certain = Codec(8, 2).decode(Codec(8, 2).encode([[3, 5]], np.float32([[0.0, np.log(1e-12)]])))
  assert 0 < certain.tail[0] <= 6.001e-12 and (certain.logprobs <= 0).all()
  whole = Codec(8, 8).decode(Codec(8, 8).encode(*top_k(softmax_logits(5, 8), 8)))
  assert (whole.tail == 0).all()


@pytest.mark.parametrize('ids, logprobs, message', [
    ([[0, 1, 2]], [[-1.0, -2.0]], r'ids \(1, 3\) and log-probabilities \(1, 2\) must both be \[n, k=2\]'),
    ([0, 1], [-1.0, -2.0], 'must both be'),
    ([[0, 1], [2, 8]], np.log([[0.5, 0.2]] * 2), 'token 1 has ids from 2 to 8, the vocabulary has 8'),
    ([[0, -1]], np.log([[0.5, 0.2]]), 'token 0 has ids from -1 to 0'),
    ([[0, 1], [6, 6]], np.log([[0.5, 0.2]] * 2), 'token 1 has id 6 twice'),
    ([[0, 1]], [[0.0, -np.inf]], 'token 0 has a log-probability -inf'),
    ([[0, 1]], [[np.nan, -1.0]], 'token 0 has a log-probability nan'),
    ([[0, 1], [0, 1]], np.log([[0.5, 0.2], [0.8, 0.3]]), 'token 1: the 2 probabilities sum to 1.1 '),
    ([[0, 1]], [[3.5, 2.0]], 'float32 log-softmax'),
    ([[0, 1]], np.log([[0.3, 0.05]]), r'sum to 0.35 and the rest, .* to at most 0.3; give the highest'),
])  # fmt: skip
def test_what_cannot_be_a_top_k_is_refused(ids, logprobs, message):
  with pytest.raises(ValueError, match=message):
    Codec(8, 2).encode(ids, logprobs)


@pytest.mark.parametrize('k', [0, -1, 9])
def test_k_is_within_the_vocabulary(k):
  with pytest.raises(ValueError, match=f'k {k} is not within 1 and the vocabulary of 8'):
    Codec(8, k)


def test_rows_that_are_not_of_this_codec_are_refused():
  codec = Codec(300, 20)
  rows = codec.encode(*top_k(softmax_logits(10, 300), 20))
  for wrong in (rows[:, 1:], rows[0], rows.astype(np.int32)):
    with pytest.raises(ValueError, match=r'must be uint8 \[n, '):
      codec.decode(wrong)
  rows[4, -10:] = 0
  with pytest.raises(ValueError, match='rows without 20 ids each'):
    codec.decode(rows)
  one_more, one_less = Codec(8, 2).encode([[0, 1]] * 2, np.log([[0.5, 0.2]] * 2))
  assert one_more[-2] == one_less[-2] == 0b10100000
  one_more[-2], one_less[-2] = 0b10110000, 0b00100000  # as many in all, but not in each
  for pair in ([one_more, one_less], [one_less, one_more]):
    with pytest.raises(ValueError, match='rows without 2 ids each'):
      Codec(8, 2).decode(np.stack(pair))


def dense_kl(logits, tokens, temperature=1.0):
  """By definition, with the whole reconstruction written out."""
  log_p = special.log_softmax(logits.astype(np.float64) / temperature, axis=1)
  vocab_size, k = logits.shape[1], tokens.ids.shape[1]
  rest = tokens.tail.astype(np.float64) / max(vocab_size - k, 1)
  reconstructed = np.repeat(rest[:, None], vocab_size, axis=1)
  np.put_along_axis(reconstructed, tokens.ids, np.exp(tokens.logprobs, dtype=np.float64), axis=1)
  return special.rel_entr(np.exp(log_p), reconstructed).sum(axis=1)


@pytest.mark.parametrize('temperature', [1.0, 2.5])
def test_reconstruction_kl_is_the_kl_of_the_reconstruction(temperature):
  logits = softmax_logits(12, 500)
  codec = Codec(500, 16)
  tokens = codec.decode(codec.encode(*top_k(logits / np.float32(temperature), 16)))
  total, quantisation = reconstruction_kl(logits, tokens, temperature=temperature)
  np.testing.assert_allclose(total, dense_kl(logits, tokens, temperature), rtol=1e-6, atol=1e-9)
  ids, logprobs = top_k(logits / np.float32(temperature), 16)
  exact = TeacherTokens(np.sort(ids, axis=1), by_id(ids, logprobs), 1 - np.exp(logprobs).sum(axis=1))
  unquantised = reconstruction_kl(logits, exact, temperature=temperature)
  np.testing.assert_allclose(unquantised.quantisation, 0, atol=1e-6)
  np.testing.assert_allclose(total - quantisation, unquantised.total, atol=1e-6)
  assert (quantisation > -1e-6).all() and quantisation.max() > 1e-9


def test_reconstruction_kl_by_hand():
  """p = .5 .25 .15 .1 against .6 .2 and .1 each for the rest."""
  logits = np.log([[0.5, 0.25, 0.15, 0.1]])
  tokens = TeacherTokens(np.array([[0, 1]]), np.log([[0.6, 0.2]]), np.array([0.2]))
  total, quantisation = reconstruction_kl(logits, tokens)
  np.testing.assert_allclose(total, 0.5 * np.log(0.5 / 0.6) + 0.25 * np.log(1.25) + 0.15 * np.log(1.5), rtol=1e-12)
  np.testing.assert_allclose(
      quantisation, 0.5 * np.log(0.5 / 0.6) + 0.25 * np.log(1.25) + 0.25 * np.log(1.25), rtol=1e-12)


def test_the_whole_vocabulary_is_exact_up_to_quantisation():
  logits = softmax_logits(30, 40)
  tokens = Codec(40, 40).decode(Codec(40, 40).encode(*top_k(logits, 40)))
  total, quantisation = reconstruction_kl(logits, tokens)
  np.testing.assert_allclose(total, quantisation, atol=1e-15)
  assert total.max() < 5e-6


def test_parts_of_the_rows_make_no_difference(monkeypatch):
  logits = softmax_logits(11, 100)
  tokens = Codec(100, 8).decode(Codec(100, 8).encode(*top_k(logits, 8)))
  whole = reconstruction_kl(logits, tokens)
  monkeypatch.setattr(top_k_codec, 'KL_ELEMENTS', 300)
  np.testing.assert_allclose(reconstruction_kl(logits, tokens), whole, rtol=1e-13)


def test_masked_logits_outside_the_top_cost_nothing():
  logits = softmax_logits(4, 30)
  logits[:, 20:] = -np.inf
  tokens = Codec(30, 20).decode(Codec(30, 20).encode(*top_k(logits, 20)))
  total, _ = reconstruction_kl(logits, tokens)
  assert np.isfinite(total).all() and total.max() < 1e-5


@pytest.mark.parametrize('changes, message', [
    ({'logits': np.zeros((2, 3))}, 'k 4 is more than the vocabulary of 3'),
    ({'logits': np.zeros((3, 9))}, r'logits \(3, 9\) and ids \(2, 4\)'),
    ({'temperature': 0.0}, 'temperature 0.0 is not positive'),
])
def test_reconstruction_kl_refuses(changes, message):
  tokens = TeacherTokens(np.tile(np.arange(4), (2, 1)), np.full((2, 4), -2.0), np.full(2, 0.4))
  with pytest.raises(ValueError, match=message):
    reconstruction_kl(**{'logits': np.zeros((2, 9)), 'tokens': tokens, **changes})


@pytest.mark.parametrize('lead', [0.0, 12.0])
def test_quantisation_is_a_hundredth_of_the_truncation(lead):
  logits = zipf_logits(24, WIDE, lead=lead)
  codec = Codec(WIDE, 64)
  total, quantisation = reconstruction_kl(logits, codec.decode(codec.encode(*top_k(logits, 64))))
  assert 0 < quantisation.mean() < 0.01 * total.mean()
  assert quantisation.max() < 5e-6


def test_codecs_are_equal_by_value():
  assert Codec(8, 2) == Codec(8, 2) and dataclasses.asdict(Codec(8, 2)) == {'vocab_size': 8, 'k': 2}
