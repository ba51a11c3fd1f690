"""Many prompts in, completions out: in order, whatever the batches, on one device or on a mesh."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from srm_jax import inference, sharding
from srm_jax.models import transformer
from srm_jax.models.config import RopeScaling
from srm_jax.types import Prompt, SamplingParams, Spent
from tests.inference import models

PROMPTS = [Prompt(f'p{i}', text) for i, text in enumerate(['2+2=', 'a', 'hello world', 'one', 'two three'])]
SAMPLING = SamplingParams(max_new_tokens=8, samples=2, temperature=0.9)
TOKENIZER = models.Characters


@functools.cache
def _generate(batch_size=4):
  return inference.make_generate(models.CONFIG, models.params(), TOKENIZER, batch_size=batch_size, steps=8)


@functools.cache
def _results():
  return _generate()(PROMPTS, SAMPLING)


def _tokens(results):
  return [[completion.tokens for completion in group] for group in results]


def test_results_come_in_order_with_their_cost():
  results = _results()
  assert [[(c.prompt, c.sample) for c in group] for group in results] == [[(p, 0), (p, 1)] for p in PROMPTS]
  for completion in (c for group in results for c in group):
    assert completion.prompt_tokens == tuple(TOKENIZER.encode(completion.prompt.text))
    assert completion.text == TOKENIZER.decode(completion.tokens)
    assert len(completion.logprobs) == len(completion.tokens) <= 8 and max(completion.logprobs) < 0
    assert completion.spent == Spent(len(completion.prompt_tokens), len(completion.tokens), 0)
    assert completion.finished == (completion.tokens[-1] == TOKENIZER.eos_id)
    assert completion.finished or len(completion.tokens) == 8
  assert results[0][0].tokens != results[0][1].tokens


def test_tokens_do_not_depend_on_the_batch():
  assert _tokens(_generate()(PROMPTS[::-1], SAMPLING))[::-1] == _tokens(_results())
  alone = _generate()(PROMPTS[2:3], SamplingParams(max_new_tokens=8, temperature=0.9))
  assert alone[0][0].tokens == _results()[2][0].tokens


@pytest.mark.parametrize('streams', [1, 2, 3])
def test_tokens_do_not_depend_on_the_streams(streams):
  counts = []
  generate = inference.make_generate(
      models.CONFIG, models.params(), TOKENIZER, batch_size=6, steps=8, streams=streams, progress=counts.append,
  )
  results = generate(PROMPTS, SAMPLING)
  assert _tokens(results) == _tokens(_results())
  assert sum(counts) == sum(len(row) for group in _tokens(results) for row in group)


def test_a_failing_stream_fails_the_call(monkeypatch):
  def broken(*args, **kwargs):
    raise FloatingPointError('broken batch')

  monkeypatch.setattr('srm_jax.inference.decode.complete', broken)
  generate = inference.make_generate(models.CONFIG, models.params(), TOKENIZER, batch_size=4, streams=2)
  with pytest.raises(FloatingPointError, match='broken batch'):
    generate(PROMPTS, SAMPLING)


def test_tokens_depend_on_the_seed_and_the_prompt_id():
  renamed = _generate()([Prompt('other', PROMPTS[2].text)], SAMPLING)
  reseeded = _generate()(PROMPTS[2:3], SamplingParams(max_new_tokens=8, samples=2, temperature=0.9, seed=1))
  assert len({_tokens(renamed)[0][0], _tokens(reseeded)[0][0], _results()[2][0].tokens}) == 3


def test_end_of_text_is_kept_once_and_ends_the_text():
  class Early(models.Characters):
    eos_id = int(np.bincount([token for group in _tokens(_results()) for row in group for token in row[:4]]).argmax())

  stopped = inference.make_generate(models.CONFIG, models.params(), Early, batch_size=4, steps=8)(PROMPTS, SAMPLING)
  finished = [completion for group in stopped for completion in group if completion.finished]
  assert finished
  for completion, free in zip(sum(stopped, []), sum(_results(), []), strict=True):
    assert completion.tokens == free.tokens[: len(completion.tokens)]
    assert completion.tokens.count(Early.eos_id) == completion.finished
    assert completion.finished == (completion.tokens[-1] == Early.eos_id)


def test_a_prompt_may_come_as_tokens():
  """As of a rendered chat, whose control tokens no plain text encodes to."""
  generate = _generate()
  named = [Prompt('p0', 'whatever', tuple(TOKENIZER.encode(PROMPTS[0].text)))]
  (found,), (expected, *_) = generate(named, SAMPLING), _results()
  assert [one.tokens for one in found] == [one.tokens for one in expected]
  assert found[0].prompt_tokens == named[0].tokens and found[0].spent.prefilled == len(named[0].tokens)


def test_any_end_of_a_text_finishes_it():
  free = _results()[0][0].tokens

  class Ends(models.Characters):
    end_ids = (models.Characters.eos_id, free[3])

  (completion, *_), *_ = inference.make_generate(
      models.CONFIG, models.params(), Ends, batch_size=4, steps=8
  )(PROMPTS, SAMPLING)
  assert completion.finished and completion.tokens == free[: free.index(free[3]) + 1]


def test_completions_run_to_the_limit_where_end_of_text_is_off():
  class Always(models.Characters):
    eos_id = _results()[0][0].tokens[0]

  options = dict(batch_size=4, steps=8, stop_at_eos=False)
  run = inference.make_generate(models.CONFIG, models.params(), Always, **options)(PROMPTS, SAMPLING)
  assert all(len(c.tokens) == 8 and not c.finished for group in run for c in group)


def test_mesh_equals_one_device():
  if jax.device_count() < 8:
    pytest.skip('needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8')
  mesh = sharding.make_mesh((2, 2, 2), jax.devices()[:8])
  with jax.set_mesh(mesh):
    params = models.params()
    placed = jax.device_put(params, sharding.shardings(transformer.param_names(models.CONFIG), params, mesh))
    generate = inference.make_generate(models.CONFIG, placed, TOKENIZER, batch_size=4, steps=8)
    meshed = generate(PROMPTS[:2], SAMPLING)
  assert _tokens(meshed) == _tokens(_results()[:2])
  for there, here in zip(sum(meshed, []), sum(_results()[:2], []), strict=True):
    np.testing.assert_allclose(there.logprobs, here.logprobs, atol=1e-4)


@pytest.mark.parametrize('text, message', [
    ('', "prompt 'bad' has no tokens"), ('x' * 249, "prompt 'bad' has 249 tokens.*248"),
])
def test_impossible_prompts_are_named(text, message):
  with pytest.raises(ValueError, match=message):
    _generate()([PROMPTS[0], Prompt('bad', text)], SAMPLING)


@pytest.mark.parametrize(
    'length, new, crosses', [(6, 3, False), (6, 4, True), (9, 1, True), (9, 8, True), (10, 8, False)]
)
def test_a_completion_does_not_cross_the_border_of_longrope(length, new, crosses):
  """Original length 8: positions 0 to 7 of a text that has none beyond are of the short kind. The last sampled token is
  not fed back, so a text of 9 tokens in all has 8 positions.
  """
  half = models.CONFIG.head_dim // 2
  scaling = RopeScaling('longrope', original_length=8, short_factor=(1.0,) * half, long_factor=(3.0,) * half)
  config = dataclasses.replace(models.CONFIG, rope_scaling=scaling)
  generate = inference.make_generate(config, models.params(), TOKENIZER, batch_size=1, streams=1, stop_at_eos=False)
  prompts = [Prompt('p', '', tuple(range(1, length + 1)))]
  if crosses:
    with pytest.raises(ValueError, match=f"prompt 'p' has {length} tokens.*would cross 8"):
      generate(prompts, SamplingParams(max_new_tokens=new))
    return
  ((completion,),) = generate(prompts, SamplingParams(max_new_tokens=new))
  tokens = np.array([[*prompts[0].tokens, *completion.tokens]])
  logits = transformer.Transformer(config).apply({'params': models.params()}, tokens[:, :-1]).logits[0, length - 1 :]
  expected = jax.nn.log_softmax(logits)[np.arange(new), np.array(completion.tokens)]
  np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_no_prompts_no_completions():
  assert _generate()([], SAMPLING) == []
