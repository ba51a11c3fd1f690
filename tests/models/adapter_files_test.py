"""Folders of adapters: written and read back, with peft on the other side, and what bad ones get."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.models import adapter_files, adapters, tensor_files, transformer, weights
from srm_jax.models.adapters import AdapterConfig
from srm_jax.models.config import TransformerConfig
from srm_jax.models.families.family import UnsupportedError
from srm_jax.models.tensor_header import CheckpointError
from srm_jax.models.transformer import Transformer
from tests.published import torch_model

CONFIG = TransformerConfig(  # a qwen2
    vocab_size=40, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24, qkv_bias=True,
)
ADAPTER = AdapterConfig(3, 6.0, ('attention/[qo]*', '1/mlp/up'), kind='dora', scaling='alpha/sqrt(r)')
NAMES = {  # of the one layer's adapters that a pattern of one layer asks for, and of a few others
    'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight': (3, 16),
    'base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight': (16, 3),
    'base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector': (24,),
}


def _random(config, adapter, params=None, seed=0):
  """Adapters of which every number matters."""
  if params is None:
    params = jax.jit(functools.partial(transformer.init_params, config))(jax.random.key(0))
  tree = jax.jit(functools.partial(adapters.init_adapters, config, adapter))(jax.random.key(seed), params)
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: leaf + (0.2 * rng.normal(size=leaf.shape)).astype(np.float32), tree)


def test_names_and_words_are_those_of_peft(tmp_path):
  adapter_files.save_adapters(tmp_path, CONFIG, ADAPTER, _random(CONFIG, ADAPTER), base='somewhere')
  infos = tensor_files.open_file(tmp_path / 'adapter_model.safetensors')
  assert {name: infos[name].shape for name in NAMES} == NAMES and len(infos) == 3 * 5
  words = json.loads((tmp_path / 'adapter_config.json').read_text())
  assert (words['r'], words['lora_alpha'], words['use_rslora'], words['use_dora']) == (3, 6, True, True)
  assert words['base_model_name_or_path'] == 'somewhere' and words['peft_type'] == 'LORA'
  assert 'model.layers.1.mlp.up_proj' in words['target_modules'] and len(words['target_modules']) == 5


def test_there_and_back(tmp_path):
  tree = _random(CONFIG, ADAPTER)
  adapter_files.save_adapters(tmp_path, CONFIG, ADAPTER, tree)
  config, again = adapter_files.load_adapters(tmp_path, CONFIG)
  assert config == dataclasses.replace(ADAPTER, targets=('attention/out', 'attention/q', '1/mlp/up'))
  jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_parts_of_a_fused_matrix_are_refused(tmp_path):
  phi = dataclasses.replace(CONFIG, qkv_bias=False, rope_dim=2)
  assert weights.family_of(phi) == 'phi'
  adapter = AdapterConfig(2, 4.0, ('attention/*',))
  with pytest.raises(UnsupportedError, match=r'attention/k: a published phi3 keeps it as rows of .*qkv_proj.weight'):
    adapter_files.save_adapters(tmp_path / 'new', phi, adapter, _random(phi, adapter))
  assert not (tmp_path / 'new').exists()
  adapter = AdapterConfig(2, 4.0, ('attention/out', 'mlp/down'))
  adapter_files.save_adapters(tmp_path, phi, adapter, _random(phi, adapter))
  assert adapter_files.load_adapters(tmp_path, phi)[0].targets == adapter.targets


def _tensors(**changes):
  """A change of the tensors: names as they end, None to leave one out."""
  def change(folder):
    path = folder / 'adapter_model.safetensors'
    found = {name: tensor_files.read(info) for name, info in tensor_files.open_file(path).items()}
    for name, value in changes.items():
      found[f'base_model.model.model.layers.0.self_attn.{name.replace("__", ".")}'] = value
    tensor_files.write_file(path, [tensor_files.source(name, x) for name, x in found.items() if x is not None])

  return change


def _words(**changes):
  def change(folder):
    path = folder / 'adapter_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

  return change


BAD = {
    'rank of some': (_words(rank_pattern={'q_proj': 8}), UnsupportedError, r"rank_pattern=\{'q_proj': 8\} is not supp"),
    'biases': (_words(bias='all'), UnsupportedError, "bias='all' is not supported, only 'none'"),
    'other method': (_words(peft_type='IA3'), UnsupportedError, "peft_type='IA3'"),
    'changed base': (_words(init_lora_weights='pissa'), UnsupportedError, "init_lora_weights='pissa'"),
    'saved modules': (_words(modules_to_save=['lm_head']), UnsupportedError, 'modules_to_save'),
    'no rank': (_words(r=None), CheckpointError, 'r=None is no positive number'),
    'other rank': (_words(r=4), CheckpointError, r'has shape \(3, 16\), not \(4, 16\)'),
    'no object': (lambda f: (f / 'adapter_config.json').write_text('[]'), CheckpointError, 'no description of adapt'),
    'no words': (lambda f: (f / 'adapter_config.json').unlink(), CheckpointError, 'has no adapter_config.json'),
    'no tensors': (lambda f: (f / 'adapter_model.safetensors').unlink(), CheckpointError, 'has no adapter_model'),
    'half of one': (
        _tensors(q_proj__lora_B__weight=None), CheckpointError, 'missing: lora_B.weight of attention/q in layer 0'),
    'unknown': (_tensors(z_proj__lora_A__weight=np.ones((3, 16), np.float32)), CheckpointError, 'not known.*z_proj'),
    'misshapen': (
        _tensors(q_proj__lora_B__weight=np.ones((8, 3), np.float32)), CheckpointError, r'\(8, 3\), not \(16, 3\)'),
    'not announced': (_words(use_dora=False), CheckpointError, r'not known: .*lora_magnitude_vector'),
}


@pytest.mark.parametrize('case', BAD)
def test_what_bad_folders_get(case, tmp_path):
  change, error, message = BAD[case]
  adapter_files.save_adapters(tmp_path, CONFIG, ADAPTER, _random(CONFIG, ADAPTER))
  change(tmp_path)
  with pytest.raises(error, match=message):
    adapter_files.load_adapters(tmp_path, CONFIG)


# --- peft on the other side

TOKENS = np.random.default_rng(0).integers(3, 96, (2, 12))
PARITY = {
    'qwen2': AdapterConfig(4, 8.0, ('*',)),
    'llama': AdapterConfig(4, 2.0, ('attention/[qv]', '1/mlp/*'), scaling='alpha/sqrt(r)'),
    'gemma3': AdapterConfig(2, 5.0, ('attention/*', 'mlp/down'), kind='dora'),
    'phi': AdapterConfig(4, 8.0, ('attention/out', 'mlp/down'), kind='dora', scaling='alpha/sqrt(r)'),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _ours(config, adapter, params, tree):
  joined = adapters.join(config, adapter, params, tree)
  return Transformer(config).apply(transformer.variables(joined), jnp.asarray(TOKENS)).logits


def _theirs(model):
  import torch

  with torch.no_grad():
    return model(torch.as_tensor(TOKENS)).logits.numpy()


def _error(found, want):
  return float(np.max(np.abs(np.asarray(found) - want)) / np.max(np.abs(want)))


@pytest.mark.slow
@pytest.mark.parametrize('name', PARITY)
def test_peft_gives_the_same_logits(name, tmp_path):
  """Ours read by peft, and what peft then writes read by us: the same adapters, and logits far from the base's."""
  peft = pytest.importorskip('peft')
  model, adapter = torch_model(name), PARITY[name]
  model.save_pretrained(tmp_path / 'model')
  config, params = weights.load_pretrained(tmp_path / 'model')
  tree, plain = _random(config, adapter, params), _theirs(model)
  adapter_files.save_adapters(tmp_path / 'ours', config, adapter, tree)
  wrapped = peft.PeftModel.from_pretrained(model, tmp_path / 'ours').eval()
  want, found = _theirs(wrapped), _ours(config, adapter, params, tree)
  assert _error(plain, want) > 0.05
  assert _error(found, want) <= 2e-4
  wrapped.save_pretrained(tmp_path / 'theirs')
  again, read = adapter_files.load_adapters(tmp_path / 'theirs', config)
  assert adapters.targeted(config, again) == adapters.targeted(config, adapter)
  jax.tree.map(np.testing.assert_array_equal, read, tree)
  assert _error(_ours(config, again, params, read), want) <= 2e-4


@pytest.mark.slow
def test_adapters_made_by_peft_are_read(tmp_path):
  """With targets, names and numbers that are peft's own."""
  peft, torch = pytest.importorskip('peft'), pytest.importorskip('torch')
  model = torch_model('qwen3')
  model.save_pretrained(tmp_path / 'model')
  made = peft.LoraConfig(r=3, lora_alpha=7, target_modules=['q_proj', 'gate_proj'], layers_to_transform=[0, 2])
  wrapped = peft.get_peft_model(model, made).eval()
  with torch.no_grad():
    for path, parameter in wrapped.named_parameters():
      if 'lora_B' in path:
        parameter.normal_(std=0.3)
  wrapped.save_pretrained(tmp_path / 'adapter')
  config, params = weights.load_pretrained(tmp_path / 'model')
  adapter, tree = adapter_files.load_adapters(tmp_path / 'adapter', config)
  assert adapter.targets == ('0/attention/q', '2/attention/q', '0/mlp/gate', '2/mlp/gate')
  assert _error(_ours(config, adapter, params, tree), _theirs(wrapped)) <= 2e-4
