"""Every config opens; the whole line runs; a killed process continues to the same bits."""

import dataclasses
import functools
import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import quickstart, quickstart_sizes
from configs.distill import published_ablation
from srm_jax import checkpoints, metrics, schema, stages
from srm_jax.data import records
from srm_jax.models import transformer, weights
from srm_jax.models.config import TransformerConfig
from srm_jax.train import train
from tests.data import chats
from tests.processes import ROOT, finish, kill_at, one_device, start

CONFIGS = sorted(
    str(path.relative_to(ROOT).with_suffix('')).replace('/', '.')
    for path in (ROOT / 'configs').rglob('*.py') if 'def get_config(' in path.read_text()
)


def open_config(config):
  """Parses a config as what its keys say that it is."""
  kinds = {
      'stages': None, 'recipe': 'train', 'strategies': 'evaluate', 'segmentation': 'label', 'sampling': 'annotate',
      'k': 'cache',
  }
  kind = next(key for key in kinds if key in config)
  return stages.check(config) if kind == 'stages' else stages.CHECKS[kinds[kind]](schema.resolve(config), 'config')


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('smoke', [False, True])
def test_every_config_opens(name, smoke):
  module = importlib.import_module(name)
  sized = name.startswith(('configs.quickstart', 'configs.studies.'))
  argument = ('size=smoke' if sized else 'smoke') if smoke else ''
  open_config(module.get_config(argument))
  assert 'Run:' in module.__doc__


def test_there_are_configs_of_every_stage():
  expected = {'configs.quickstart', 'configs.sft.arithmetic', 'configs.rl.grpo', 'configs.evaluate.arithmetic'}
  assert expected <= set(CONFIGS)


@pytest.mark.parametrize('arg', ['', 'task=gsm8k', 'size=smoke,task=gsm8k', 'seed=7,steps=0.5'])
def test_the_quickstart_opens_in_all_its_forms(arg):
  open_config(quickstart.get_config(arg))


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  """A teacher and a student as published: other shapes, one tokenizer, vocabularies padded to different sizes."""
  folders = {}
  for name, (rows, width) in {'teacher': (384, 32), 'student': (352, 16)}.items():
    config = TransformerConfig(
        vocab_size=rows, num_layers=2, embed_dim=width, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=2 * width,
        max_length=2048, qkv_bias=True,
    )
    folders[name] = chats.save_family(tmp_path_factory.mktemp(name), 'qwen2_5')
    params = jax.jit(transformer.init_params, static_argnums=0)(config, jax.random.key(rows))
    weights.save_pretrained(folders[name], config, params)
  return folders


def test_a_published_model_is_a_model(published):
  model = checkpoints.load_model(published['student'], dtype='bfloat16')
  assert model.config == dataclasses.replace(
      checkpoints.model_config(published['student']), dtype='bfloat16', param_dtype='bfloat16'
  )
  assert model.params['embedding'].dtype == 'bfloat16' and model.tokenizer.end_ids


@pytest.mark.parametrize('spoil, message', [
    (lambda folder: (folder / 'tokenizer.json').unlink(), 'tokenizer .* not found'),
    (lambda folder: (folder / 'model.safetensors').unlink(), 'no weights'),
    (lambda folder: (folder / 'config.json').write_text('{"architectures": ["X"]}'), "architectures .'X'. are not"),
    (lambda folder: (folder / 'config.json').unlink(), 'holds no model'),
])
def test_a_damaged_published_model_is_a_config_error(published, tmp_path, spoil, message):
  folder = shutil.copytree(published['student'], tmp_path / 'copy')
  spoil(folder)
  with pytest.raises(schema.ConfigError, match=message):
    checkpoints.load_model(folder)


def test_a_tokenizer_that_does_not_fit_is_a_config_error(published, tmp_path):
  folder = shutil.copytree(published['student'], tmp_path / 'copy')
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(config | dict(vocab_size=100)))
  with pytest.raises(schema.ConfigError, match='has 100 embedding rows'):
    checkpoints.load_model(folder)


@pytest.mark.slow
def test_the_quickstart_starts_from_published_models(published, tmp_path):
  """The whole line, from two folders and no training from scratch, to its report."""
  command = [
      sys.executable, '-m', 'experiments.quickstart', '--smoke', '--seed=5', f'--workdir={tmp_path / "line"}',
      f'--teacher={published["teacher"]}', f'--student={published["student"]}', '--format=chat',
  ]
  run = functools.partial(subprocess.run, cwd=ROOT, env=one_device(), capture_output=True, text=True)
  done = run(command)
  assert done.returncode == 0, done.stderr[-3000:]
  line = json.loads((tmp_path / 'line' / 'quickstart.json').read_text())
  assert line['stages']['teacher']['run'] == line['stages']['tokenizer']['run'] == 'given'
  student = checkpoints.model_config(pathlib.Path(line_target(tmp_path / 'line', line, 'rl')))
  assert (student.vocab_size, student.embed_dim) == (352, 16)
  annotations = records.read(pathlib.Path(line_target(tmp_path / 'line', line, 'annotate')) / 'annotations.jsonl')
  prompts = {one.prompt for one in annotations}
  assert all(prompt.endswith('<|im_start|>assistant\n') for prompt in prompts)
  assert 'given here' in (tmp_path / 'line' / 'report.html').read_text()
  again = run([*command, '--seed=6'])
  assert again.returncode != 0 and 'holds a run with seed=5' in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize('arm', ['sft', 'minilm_off', 'logit_hidden_on'])
def test_arms_of_the_published_study_take_their_steps(published, arm, tmp_path):
  """Two steps with a real tokenizer and chat template, in float32; the arms differ in their losses alone."""
  config = published_ablation.get_config(
      f'smoke,arm={arm},teacher={published["teacher"]},student={published["student"]}'
  )
  config.progress, config.log_every = False, 1
  run = train(config, tmp_path)
  assert [row['step'] for row in run.metrics] == [1, 2] and all(row['finite'] == 1.0 for row in run.metrics)


def test_every_arm_of_the_published_study_opens():
  for arm in published_ablation.ARMS:
    open_config(published_ablation.get_config(f'arm={arm}'))
  with pytest.raises(ValueError, match="arm 'kl' unknown"):
    published_ablation.get_config('arm=kl')


def line_target(workdir, line, name):
  stage = line['stages'][name]
  return os.path.normpath(workdir / stage['folder'] / stage['target'])


def test_a_misspelt_argument_is_refused():
  with pytest.raises(ValueError, match="'sise' unknown; choose from"):
    quickstart.get_config('sise=smoke')


def test_a_mistake_deep_in_the_quickstart_is_found():
  config = quickstart.get_config('size=smoke')
  with config.unlocked():
    config.stages.rl.config.recipe.rollouts.lenght = 3
  with pytest.raises(schema.ConfigError, match=r"stages\.rl\.config\.recipe\.rollouts\.lenght.*did you mean 'length'"):
    stages.check(config)


# Minutes: only with --all.

TINY = dict(
    vocab=320, length=160, row=192, context=224, new_tokens=24, rows=2, decode_rows=8, annotations=2, opd_prompts=4,
    rl_prompts=2, group=2, votes=2, teacher=dict(embed_dim=16, num_layers=2, num_heads=2, mlp_dim=32),
    student=dict(embed_dim=16, num_layers=1, num_heads=2, mlp_dim=32), teacher_problems=60, gold=12, prompts=4,
    rl_problems=8, dev=4, test=4, hard=4, steps=dict(teacher=2, base=2, arm=2, rl=2),
)


@pytest.mark.slow
def test_the_whole_line_runs_and_runs_only_once(tmp_path, monkeypatch):
  """Annotations of a teacher this small are never right, so every problem counts as solved here."""
  monkeypatch.setitem(quickstart_sizes.SIZES, 'arithmetic_mix/smoke', TINY)
  annotate = lambda *args: _all_right(*stages._annotate(*args))
  monkeypatch.setattr(stages, 'RUNNERS', {**stages.RUNNERS, 'annotate': annotate})
  config = quickstart.get_config('size=smoke')
  for stage in config.stages.values():
    if 'progress' in stage.config:
      stage.config.progress = False
  done = stages.run_stages(config, tmp_path)
  assert list(done) == list(config.order)
  assert done['best'].outcome['chosen'] in done['best'].outcome['scores']
  strategies = json.loads((done['strategies'].target / 'results.json').read_text())
  assert strategies.keys() == {'direct', 'greedy', 'sample', 'majority', 'best_of_n'}
  assert strategies['best_of_n']['spent']['scored'] > 0
  times = {name: (stage.workdir / stages.DONE).stat().st_mtime_ns for name, stage in done.items()}
  again = stages.run_stages(config, tmp_path)
  assert times == {name: (stage.workdir / stages.DONE).stat().st_mtime_ns for name, stage in again.items()}


def _all_right(workdir, summary):
  path = workdir / 'annotations.jsonl'
  lines = [json.loads(line) | {'correct': True} for line in path.read_text().splitlines()]
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return workdir, summary


SFT = [
    '-m', 'experiments.train', '--config=configs/sft/arithmetic.py:smoke', '--config.num_steps=12',
    '--config.checkpoint_every=3', '--config.log_every=1', '--config.progress=False', '--config.model.embed_dim=16',
    '--config.model.head_dim=4', '--config.model.mlp_dim=32', '--config.model.num_layers=1', '--workdir={workdir}',
]


@pytest.mark.slow
def test_kill_minus_nine_and_the_same_command_again_give_the_same_bits(tmp_path):
  whole, torn, last = tmp_path / 'whole', tmp_path / 'torn', 12
  finish(start(SFT, whole))
  kill_at(start(SFT, torn), torn, 7)
  assert metrics.read(torn)[-1]['step'] < last
  finish(start(SFT, torn))
  expected, actual = checkpoints.load_model(whole), checkpoints.load_model(torn)
  assert actual.step == expected.step == last and actual.fingerprint == expected.fingerprint
  jax.tree.map(np.testing.assert_array_equal, actual.params, expected.params)
  losses = [[row['loss'] for row in metrics.read(folder)] for folder in (whole, torn)]
  assert losses[0] == losses[1] and len(losses[0]) == last
