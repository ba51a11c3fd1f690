"""Runs become published folders and come back, bit for bit; the card says where a model comes from."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from srm_jax import checkpoints, export, schema
from srm_jax.data.templates import load_template
from srm_jax.models import weights
from srm_jax.models.config import TransformerConfig
from srm_jax.models.tensor_header import CheckpointError
from srm_jax.tasks import TASKS
from srm_jax.train import train
from tests import buckets, tiny
from tests.data import chats
from tests.tiny import one_device, tiny_tasks  # noqa: F401  fixtures

CONFIG = TransformerConfig(
    vocab_size=264, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24, max_length=64,
)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  return train(tiny.sft(), tmp_path_factory.mktemp('run') / 'student').workdir


@pytest.fixture(scope='module')
def evaluation(tmp_path_factory):
  folder = tmp_path_factory.mktemp('evaluation')
  (folder / 'config.json').write_text(json.dumps({'data': {'task': 'gsm8k', 'split': 'test'}}))
  row = {'accuracy': 0.5, 'interval': [0.25, 0.75], 'n': 12}
  (folder / 'results.json').write_text(json.dumps({'greedy': row}))
  return folder


def _equal(left, right):
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


def test_out_and_in_again(finished, tmp_path):
  export.export(finished, tmp_path / 'published')
  there = checkpoints.load_model(tmp_path / 'published')
  here = checkpoints.load_model(finished)
  assert weights._published(there.config) == weights._published(here.config)
  assert there.tokenizer.fingerprint == here.tokenizer.fingerprint
  _equal(there.params, here.params)
  export.take_in(tmp_path / 'published', tmp_path / 'run')
  again = checkpoints.load_model(tmp_path / 'run')
  _equal(again.params, here.params)
  assert again.step == 0 and again.tokenizer.fingerprint == here.tokenizer.fingerprint


@pytest.mark.parametrize('name', ['byte', 'qwen2_5'])
def test_a_published_folder_may_lie_in_a_bucket(name, monkeypatch, tmp_path):
  """Weights, tokenizer, template and card go to gs:// and come back."""
  tokenizer = 'byte' if name == 'byte' else str(chats.save_family(tmp_path / 'tokenizer', name))
  run = tiny.write_model(tmp_path / 'run', dataclasses.replace(CONFIG, vocab_size=400), tokenizer=tokenizer)
  address = buckets.use(monkeypatch) + '/models/out'
  export.export(run, address)
  here, there = checkpoints.load_model(run), checkpoints.load_model(address)
  assert there.tokenizer.fingerprint == here.tokenizer.fingerprint and checkpoints.is_published(address)
  _equal(there.params, here.params)
  if name != 'byte':
    assert load_template(address).source == load_template(tokenizer).source
  export.take_in(address, tmp_path / 'back')
  again = checkpoints.load_model(tmp_path / 'back')
  _equal(again.params, here.params)
  assert again.tokenizer.fingerprint == here.tokenizer.fingerprint


def test_files_of_an_export(finished, evaluation, tmp_path):
  export.export(finished, tmp_path, dtype='bfloat16', evaluations=[evaluation])
  words = json.loads((tmp_path / 'config.json').read_text())
  assert words['architectures'] == ['LlamaForCausalLM'] and words['torch_dtype'] == 'bfloat16'
  assert words['eos_token_id'] == 256 and words['pad_token_id'] == 257
  assert json.loads((tmp_path / 'generation_config.json').read_text())['eos_token_id'] == 256
  text = (tmp_path / 'README.md').read_text()
  score = '| greedy | 50.0 | 25.0 to 75.0 | 12 |'
  for part in ('# student', 'recipe: sft', 'data: sums', 'step 3', score, '## Limits'):
    assert part in text
  config = json.loads((finished / 'config.json').read_text())
  assert f'`{export.content_hash(config)[:16]}`' in text


def test_the_tokenizer_goes_along_with_its_template(tmp_path):
  folder = chats.save_family(tmp_path / 'qwen', 'qwen2_5')
  config = TransformerConfig(**vars(CONFIG) | dict(vocab_size=320))
  params = jax.jit(export.weights.transformer.init_params, static_argnums=0)(config, jax.random.key(0))
  weights.save_pretrained(folder, config, params)
  export.take_in(folder, tmp_path / 'run')
  export.export(tmp_path / 'run', tmp_path / 'out')
  for name in ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json', 'chat_template.jinja'):
    assert (tmp_path / 'out' / name).read_bytes() == (folder / name).read_bytes()
  assert len(json.loads((tmp_path / 'out' / 'config.json').read_text())['eos_token_id']) == 2


def test_an_export_is_not_overwritten_by_accident(finished, tmp_path):
  export.export(finished, tmp_path)
  with pytest.raises(CheckpointError, match='holds weights already'):
    export.export(finished, tmp_path)
  export.export(finished, tmp_path, overwrite=True)


@pytest.mark.parametrize('call, message', [
    (lambda run, tmp: export.export(tmp, tmp / 'x'), 'holds no model'),
    (lambda run, tmp: export.export(run, tmp / 'x', evaluations=[tmp]), 'holds no finished evaluation'),
    (lambda run, tmp: export.take_in(run, tmp / 'x'), 'is not a published model'),
])
def test_wrong_folders(finished, tmp_path, call, message):
  with pytest.raises(schema.ConfigError, match=message):
    call(finished, tmp_path)
  assert not (tmp_path / 'x').exists()


def test_a_workdir_that_is_not_empty_is_left_alone(finished, tmp_path):
  export.export(finished, tmp_path / 'published')
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'notes').touch()
  with pytest.raises(schema.ConfigError, match='is not empty'):
    export.take_in(tmp_path / 'published', tmp_path / 'run')


def test_every_task_says_where_its_problems_come_from():
  assert set(export.DATA) >= set(TASKS) - {'sums', 'parity'}


@pytest.mark.slow
def test_transformers_loads_an_export(finished, tmp_path):
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  export.export(finished, tmp_path)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
  tokens = np.arange(1, 11)[None]
  with torch.no_grad():
    theirs = model(torch.as_tensor(tokens)).logits.numpy()
  here = checkpoints.load_model(finished)
  ours = export.weights.transformer.Transformer(here.config).apply({'params': here.params}, tokens).logits
  np.testing.assert_allclose(ours, theirs, atol=1e-4)
