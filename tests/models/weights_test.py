"""Published folders without PyTorch: there and back for every family, slices on a mesh, and what a bad folder gets."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax import sharding
from srm_jax.models import tensor_files, transformer, weights
from srm_jax.models.config import RopeScaling, TransformerConfig
from srm_jax.models.families import FAMILIES
from srm_jax.models.families.family import UnsupportedError
from srm_jax.models.tensor_header import CheckpointError
from tests.published import CASES

CONFIG = TransformerConfig(
    vocab_size=40, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=24, max_length=32,
    tie_embeddings=False, qkv_bias=True,
)


@functools.partial(jax.jit, static_argnums=0)
def _init(config):
  made = transformer.init_params(config, jax.random.key(0))
  return jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape, leaf.dtype), made)


@pytest.fixture(scope='module')
def params():
  return _init(CONFIG)


@pytest.fixture
def folder(tmp_path, params):
  weights.save_pretrained(tmp_path / 'model', CONFIG, params)
  return tmp_path / 'model'


def _equal(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize('name', FAMILIES)
def test_there_and_back(name, tmp_path):
  config = FAMILIES[name].read(dict(CASES[name].options))
  params = _init(config)
  weights.save_pretrained(tmp_path, config, params, max_shard_bytes=50_000)
  assert len(list(tmp_path.glob('*.safetensors'))) > 1
  assert json.loads((tmp_path / 'config.json').read_text())['architectures'] == [FAMILIES[name].architectures[0]]
  found, again = weights.load_pretrained(tmp_path)
  assert found == config
  _equal(params, again)


def test_casts(folder, params):
  config, half = weights.load_pretrained(folder, dtype='bfloat16')
  assert config.dtype == config.param_dtype == 'bfloat16'
  _equal(half, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))


def test_a_file_of_another_dtype(tmp_path, params):
  weights.save_pretrained(tmp_path, CONFIG, params, dtype='float16', extra={'eos_token_id': 7})
  assert json.loads((tmp_path / 'config.json').read_text())['eos_token_id'] == 7
  config, found = weights.load_pretrained(tmp_path)
  assert config.param_dtype == 'float16'
  _equal(found, jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params))


def test_every_device_reads_its_own_slice(folder, params, monkeypatch):
  read, original = [], tensor_files.read_into

  def counted(info, out, index=()):
    read.append(out.nbytes)
    return original(info, out, index)

  monkeypatch.setattr(tensor_files, 'read_into', counted)
  with jax.set_mesh(sharding.make_mesh((1, 4, 2))):
    _, found = weights.load_pretrained(folder)
  names = transformer.param_names(CONFIG)
  wanted = sharding.shardings(names, params, found['embedding'].sharding.mesh)
  assert jax.tree.map(lambda leaf: leaf.sharding, found) == wanted
  _equal(found, params)
  held = sum(shard.data.nbytes for leaf in jax.tree.leaves(found) for shard in leaf.addressable_shards)
  assert sum(read) <= held
  assert held < 1.5 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_a_text_model_inside_one_that_sees_pictures(tmp_path):
  config = FAMILIES['gemma3'].read(dict(CASES['gemma3'].options))
  params = _init(config)
  weights.save_pretrained(tmp_path / 'text', config, params)
  infos = tensor_files.open_folder(tmp_path / 'text')
  renamed = [
      tensor_files.source('language_model.' + name, tensor_files.read(info)) for name, info in infos.items()
  ] + [tensor_files.source('vision_tower.patches.weight', np.zeros((3, 3), np.float32))]
  tensor_files.write_folder(tmp_path / 'both', renamed)
  words = json.loads((tmp_path / 'text' / 'config.json').read_text())
  words = {'architectures': ['Gemma3ForConditionalGeneration'], 'model_type': 'gemma3', 'text_config': words}
  (tmp_path / 'both' / 'config.json').write_text(json.dumps(words))
  found, again = weights.load_pretrained(tmp_path / 'both')
  assert found == config
  _equal(again, params)


def test_a_tied_head_that_is_written_all_the_same(tmp_path):
  config = dataclasses.replace(CONFIG, tie_embeddings=True)
  params = _init(config)
  weights.save_pretrained(tmp_path / 'a', config, params)
  tensors = [tensor_files.source(name, tensor_files.read(info)) for name, info in
             tensor_files.open_folder(tmp_path / 'a').items()]
  head = tensor_files.source('lm_head.weight', np.asarray(params['embedding']))
  tensor_files.write_folder(tmp_path / 'a', [*tensors, head], overwrite=True)
  _equal(weights.load_pretrained(tmp_path / 'a')[1], params)


def test_the_family_that_says_it_all():
  assert weights.family_of(dataclasses.replace(CONFIG, qkv_bias=False)) == 'llama'
  assert weights.family_of(CONFIG) == 'qwen2'
  assert weights.family_of(dataclasses.replace(CONFIG, qkv_bias=False, qk_norm=True)) == 'qwen3'
  for name, case in CASES.items():
    assert weights.family_of(FAMILIES[name].read(dict(case.options))) == name


@pytest.mark.parametrize('change', [
    {'qkv_bias': True, 'qk_norm': True}, {'norm_offset': 1.0}, {'activation': 'gelu_tanh'}, {'pattern': 'gn'},
    {'query_scale': 0.3}, {'pattern': 'lg', 'window': 4, 'local_rope_base': 33.0},
])
def test_what_no_family_can_say_is_not_written(change, tmp_path):
  config = dataclasses.replace(CONFIG, **{'qkv_bias': False} | change)
  if change == {'pattern': 'gn'}:
    assert weights.family_of(config) == 'smollm3'
    return
  with pytest.raises(UnsupportedError, match='none of the families'):
    weights.save_pretrained(tmp_path / 'x', config, _init(config))
  assert not (tmp_path / 'x').exists()


def _edit(folder, **changes):
  """Changes keys of config.json; None removes one."""
  path = folder / 'config.json'
  words = json.loads(path.read_text()) | changes
  path.write_text(json.dumps({key: value for key, value in words.items() if value is not None}))


def _rewrite(folder, change):
  """Applies a change to {name: array} and writes the tensors again."""
  tensors = {name: tensor_files.read(info) for name, info in tensor_files.open_folder(folder).items()}
  change(tensors)
  sources = [tensor_files.source(name, array) for name, array in tensors.items()]
  tensor_files.write_folder(folder, sources, overwrite=True)


def _flip(folder):
  path = folder / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-100])


Q = 'model.layers.1.self_attn.q_proj.weight'
BAD = {
    'no config': (lambda f: (f / 'config.json').unlink(), CheckpointError, 'has no config.json'),
    'config is a list': (lambda f: (f / 'config.json').write_text('[]'), CheckpointError, 'is no JSON object'),
    'config is cut off': (lambda f: (f / 'config.json').write_text('{"a'), CheckpointError, 'is no JSON object'),
    'another architecture': (
        lambda f: _edit(f, architectures=['MambaForCausalLM']), UnsupportedError, "'MambaForCausalLM'.*known are"),
    'no architecture': (lambda f: _edit(f, architectures=None), UnsupportedError, r'architectures \[\]'),
    'rope type': (
        lambda f: _edit(f, rope_scaling={'rope_type': 'dynamic', 'factor': 2.0}), UnsupportedError, "type 'dynamic'"),
    'activation': (lambda f: _edit(f, hidden_act='relu'), UnsupportedError, "hidden_act='relu'"),
    'a missing key': (lambda f: _edit(f, hidden_size=None), UnsupportedError, 'hidden_size'),
    'a key of the wrong type': (lambda f: _edit(f, num_hidden_layers='two'), UnsupportedError, 'cannot be read as'),
    'sizes that cannot be': (lambda f: _edit(f, num_key_value_heads=3), UnsupportedError, 'not a multiple of'),
    'a missing tensor': (
        lambda f: _rewrite(f, lambda t: t.pop(Q)), CheckpointError, rf'1 tensors are missing: {Q}'),
    'an extra tensor': (
        lambda f: _rewrite(f, lambda t: t.update(extra=np.zeros(3, np.float32))), CheckpointError,
        '1 tensors are not known: extra'),
    'a misnamed tensor': (
        lambda f: _rewrite(f, lambda t: t.update(wrong=t.pop(Q))), CheckpointError, f'missing: {Q}.*not known: wrong'),
    'a misshapen tensor': (
        lambda f: _rewrite(f, lambda t: t.update({Q: t[Q].T.copy()})), CheckpointError,
        rf"model.safetensors: tensor '{Q}' has shape \(16, 24\), not \(24, 16\)"),
    'one layer too many': (lambda f: _edit(f, num_hidden_layers=3), CheckpointError, 'tensors are missing'),
    'another vocabulary': (lambda f: _edit(f, vocab_size=41), CheckpointError, r'has shape \(40, 16\), not \(41, 16\)'),
    'a truncated file': (_flip, CheckpointError, 'model.safetensors'),
    'no weights': (lambda f: (f / 'model.safetensors').unlink(), CheckpointError, 'no weights'),
    'pickled weights': (
        lambda f: (f / 'model.safetensors').rename(f / 'pytorch_model.bin'), CheckpointError, 'pickle'),
}


@pytest.mark.parametrize('case', BAD)
def test_a_bad_folder(case, folder, monkeypatch):
  """Found before a tensor is read."""
  spoil, error, message = BAD[case]
  spoil(folder)
  monkeypatch.setattr(tensor_files, 'read_into', lambda *args: pytest.fail('read before it was checked'))
  with pytest.raises(error, match=message):
    weights.load_pretrained(folder)


def test_a_second_write_does_not_overwrite(folder, params):
  before = (folder / 'config.json').read_bytes()
  with pytest.raises(CheckpointError, match='holds weights already'):
    weights.save_pretrained(folder, dataclasses.replace(CONFIG, norm_eps=1e-5), params)
  assert (folder / 'config.json').read_bytes() == before


def test_words_of_old_and_new_readers_mean_the_same():
  """rope_parameters is what transformers writes since version 5; before, rope_theta and rope_scaling."""
  llama = FAMILIES['llama'].read
  common = dict(CASES['llama'].options)
  scaling, base = common.pop('rope_scaling'), common.pop('rope_theta')
  new = llama(common | dict(rope_parameters=scaling | dict(rope_theta=base)))
  assert new == llama(dict(CASES['llama'].options)) and new.rope_scaling.kind == 'llama3' and new.rope_base == 500.0
  gemma = FAMILIES['gemma3'].read
  common = dict(CASES['gemma3'].options)
  common.pop('rope_scaling')
  new = gemma(common | dict(rope_parameters=dict(
      full_attention=dict(rope_type='linear', factor=8.0, rope_theta=1e6),
      sliding_attention=dict(rope_type='default', rope_theta=10_000.0),
  )))
  assert new == gemma(dict(CASES['gemma3'].options)) and new.rope_scaling == RopeScaling('linear', factor=8.0)


def test_windows_of_qwen_begin_where_its_config_says():
  options = dict(CASES['qwen2'].options) | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)
  options.pop('rope_scaling')
  config = FAMILIES['qwen2'].read(options)
  assert (config.pattern, config.window) == ('gll', 5)
  assert FAMILIES['qwen2'].read(FAMILIES['qwen2'].write(config)) == config
  assert FAMILIES['qwen2'].read(options | dict(use_sliding_window=False)).pattern == 'g'
