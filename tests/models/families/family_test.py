"""Every family against transformers: logits, left padding, packing, decoding, weights there and back; and every mistake
of a table of mistakes is seen.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks.batches import Numbers
from srm_jax import inference
from srm_jax.models import weights
from srm_jax.models.config import num_params
from srm_jax.models.families import FAMILIES, PRESETS
from srm_jax.models.families import family as families
from srm_jax.models.transformer import Transformer
from srm_jax.types import Prompt, SamplingParams
from tests.published import CASES, LONG, ORIGINAL, torch_model

TOLERANCE = 2e-4  # of the largest logit, in float32
SHORT = 20  # within the original length, the window passed twice

# Parameters in millions, as the models' cards give them.
MILLIONS = {
    'phi4-mini': 3836.0,
    'llama3.2-1b': 1235.8, 'llama3.2-3b': 3212.7, 'llama3.1-8b': 8030.3, 'qwen2.5-0.5b': 494.0, 'qwen2.5-1.5b': 1543.7,
    'qwen2.5-3b': 3085.9, 'qwen2.5-7b': 7615.6, 'deepseek-r1-distill-qwen-1.5b': 1777.1,
    'deepseek-r1-distill-qwen-7b': 7615.6, 'qwen3-0.6b': 596.0, 'qwen3-1.7b': 1720.6, 'qwen3-4b': 4022.5,
    'qwen3-8b': 8190.7, 'qwen3-30b-a3b': 30532.1, 'gemma3-270m': 268.1, 'gemma3-1b': 999.9, 'gemma3-4b': 3880.3,
    'smollm2-135m': 134.5, 'smollm2-360m': 361.8, 'smollm2-1.7b': 1711.4, 'smollm3-3b': 3075.1,
}


def test_every_preset_has_the_size_of_its_name():
  assert {name: round(num_params(preset) / 1e6, 1) for name, preset in PRESETS.items()} == MILLIONS


@pytest.mark.parametrize('name', FAMILIES)
def test_presets_survive_their_config_file(name):
  family = FAMILIES[name]
  for preset in family.presets.values():
    words = json.loads(json.dumps(family.write(preset)))
    assert weights._published(family.read(words)) == weights._published(preset)


def test_shortest_period():
  assert [families.shortest_period(letters) for letters in ('gggg', 'lllllgll', 'glg', 'ggl')] == [
      'g', 'lllllg', 'gl', 'ggl'
  ]


@functools.cache
def _both(name):
  """(transformers' model, our config, our parameters as numpy)."""
  import tempfile

  model = torch_model(name)
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    config, params = weights.load_pretrained(folder)
  return model, config, jax.tree.map(np.array, params)


def _tokens(rows, length, seed=0):
  return np.random.default_rng(seed).integers(3, 96, (rows, length))


def _theirs(model, tokens, **options):
  import torch

  with torch.no_grad():
    return model(torch.as_tensor(tokens), **{key: torch.as_tensor(x) for key, x in options.items()}).logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def _ours(config, params, tokens, **options):
  return Transformer(config).apply({'params': params}, tokens, **options).logits


def _error(config, params, tokens, want, **options):
  got = np.asarray(_ours(config, params, jnp.asarray(tokens), **options))
  return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))


def parity(test):
  """Marks a test as one of every family; it needs PyTorch, which only --all installs."""
  return pytest.mark.slow(pytest.mark.parametrize('name', FAMILIES)(test))


def test_every_family_has_a_case():
  assert set(CASES) == set(FAMILIES)


@parity
@pytest.mark.parametrize('length', [SHORT, LONG])
def test_logits(name, length):
  model, config, params = _both(name)
  tokens = _tokens(2, length)
  want = _theirs(model, tokens)
  assert 0.5 < np.std(want) < 5  # logits that say something
  assert _error(config, params, tokens, want) <= TOLERANCE


@parity
def test_hidden_states(name):
  """What distillation taps: the output of every block (transformers normalises the last one, which is left out)."""
  import torch

  model, config, params = _both(name)
  tokens = _tokens(2, SHORT)
  with torch.no_grad():
    want = model(torch.as_tensor(tokens), output_hidden_states=True).hidden_states[1:-1]
  taps = jax.jit(lambda p, x: Transformer(config).apply({'params': p}, x, taps=('hidden',)).taps)(params, tokens)
  for found, expected in zip(taps['hidden'][:-1], want, strict=True):
    np.testing.assert_allclose(found, expected.numpy(), atol=TOLERANCE * float(expected.abs().max()))


@parity
def test_left_padding(name):
  model, config, params = _both(name)
  tokens, lengths = _tokens(2, LONG), np.array([LONG, SHORT])
  inside = np.arange(LONG)[None] >= LONG - lengths[:, None]
  positions = np.maximum(np.cumsum(inside, axis=1) - 1, 0)
  got = np.asarray(_ours(
      config, params, jnp.asarray(np.where(inside, tokens, 0)), positions=jnp.asarray(positions),
      segment_ids=jnp.asarray(inside.astype(np.int32)),
  ))
  for row, length in enumerate(lengths):
    want = _theirs(model, tokens[row : row + 1, LONG - length :])[0]
    assert np.max(np.abs(got[row, LONG - length :] - want)) <= TOLERANCE * np.max(np.abs(want))


@parity
def test_packed_segments(name):
  model, config, params = _both(name)
  lengths = (LONG - SHORT - 9, SHORT, 9)
  assert lengths[0] > ORIGINAL
  tokens = _tokens(1, LONG, seed=1)
  got = np.asarray(_ours(
      config, params, jnp.asarray(tokens),
      positions=jnp.asarray(np.concatenate([np.arange(length) for length in lengths])[None]),
      segment_ids=jnp.asarray(np.repeat(np.arange(1, 4), lengths)[None]),
  ))
  start = 0
  for length in lengths:
    want = _theirs(model, tokens[:, start : start + length])
    assert np.max(np.abs(got[:, start : start + length] - want)) <= TOLERANCE * np.max(np.abs(want))
    start += length


@parity
def test_greedy_generation(name):
  """64 tokens, from prompts that lie beyond the original length of a stretched rope from the start."""
  import torch

  model, config, params = _both(name)
  prompts = _tokens(2, ORIGINAL + 8, seed=2)
  model.generation_config.eos_token_id = None  # neither side ends early
  with torch.no_grad():
    want = model.generate(
        torch.as_tensor(prompts), attention_mask=torch.ones(prompts.shape, dtype=torch.long), do_sample=False,
        max_new_tokens=64, use_cache=True,
    ).numpy()[:, prompts.shape[1] :]
  generate = inference.make_generate(config, params, Numbers, batch_size=2, stop_at_eos=False)
  named = [Prompt(str(i), Numbers.decode(row)) for i, row in enumerate(prompts)]
  found = generate(named, SamplingParams(max_new_tokens=64, temperature=0.0))
  np.testing.assert_array_equal([one.tokens for (one,) in found], want)


@parity
def test_there_and_back(name, tmp_path):
  """Written in several shards, read by transformers: the same bits."""
  import torch
  import transformers

  model, config, params = _both(name)
  weights.save_pretrained(tmp_path, config, params, max_shard_bytes=60_000)
  assert len(list(tmp_path.glob('*.safetensors'))) > 2
  again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
  assert type(again) is type(model) and not report['missing_keys'] and not report['unexpected_keys']
  here, there = model.state_dict(), again.state_dict()
  assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here)
  tokens = _tokens(1, LONG)
  np.testing.assert_array_equal(_theirs(model, tokens), _theirs(again.eval(), tokens))


@parity
def test_a_port_with_a_mistake_is_seen(name):
  model, config, params = _both(name)
  tokens = _tokens(2, LONG)
  want = _theirs(model, tokens)
  errors = {}
  for title, mutate in CASES[name].mutations.items():
    wrong_config, wrong_params = mutate(config, params)
    errors[title] = _error(wrong_config, wrong_params, tokens, want)
  unseen = {title: error for title, error in errors.items() if error < 10 * TOLERANCE}
  assert not unseen
