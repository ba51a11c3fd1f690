"""XLA flags and the cache of compiled programs, each in an environment of its own."""

import os
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from configs import quickstart
from configs.sft import arithmetic
from experiments import command, runtime

AMX = 'processor : 0\nflags : fpu amx_bf16 avx2\ncpu MHz : 2000\n'


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
  monkeypatch.setenv('XLA_FLAGS', '--xla_cpu_enable_fast_math=false')
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'compiled'))
  monkeypatch.setattr(runtime, '_chip', lambda: AMX)
  monkeypatch.setattr(runtime.importlib.metadata, 'version', lambda name: '0.12.0.1')


def test_virtual_devices_replace_an_earlier_count_and_keep_the_rest():
  runtime.set_virtual_devices(4)
  runtime.set_virtual_devices(2)
  wanted = ['--xla_cpu_enable_fast_math=false', '--xla_force_host_platform_device_count=2']
  assert sorted(os.environ['XLA_FLAGS'].split()) == sorted([*wanted, runtime.PATIENCE, runtime.ONE_ORDER])


def test_flags_are_known_to_xla():
  assert runtime._try(f'{runtime.PATIENCE} {runtime.ONE_ORDER} {runtime.HASTY}')


def test_a_level_of_the_user_stays(monkeypatch):
  runtime.compile_hastily()
  assert os.environ['XLA_FLAGS'] == f'--xla_cpu_enable_fast_math=false {runtime.HASTY}'
  monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=3')
  runtime.compile_hastily()
  assert os.environ['XLA_FLAGS'] == '--xla_backend_optimization_level=3'


@pytest.mark.parametrize('accepted', [True, False])
def test_flag_is_tried_once_and_the_verdict_kept(monkeypatch, tmp_path, accepted):
  tried = []
  monkeypatch.setattr(runtime, '_try', lambda flag: tried.append(flag) or accepted)
  for _ in range(2):
    monkeypatch.setenv('XLA_FLAGS', '')
    runtime.prepare(tmp_path, bfloat16=True)
    assert (runtime.ONEDNN in os.environ['XLA_FLAGS']) is accepted
  assert tried == [runtime.ONEDNN]


def test_flag_is_for_trainings_in_bfloat16(monkeypatch, tmp_path):
  monkeypatch.setattr(runtime, '_try', lambda flag: pytest.fail('tried'))
  runtime.prepare(tmp_path)
  assert os.environ['XLA_FLAGS'] == '--xla_cpu_enable_fast_math=false'


def test_a_config_names_bfloat16_wherever_it_stands():
  config = arithmetic.get_config('')
  assert not command.names_bfloat16(config)
  config.model.dtype = 'bfloat16'
  assert command.names_bfloat16(config) and command.names_bfloat16(ConfigDict({'stages': {'sft': config}}))
  assert not command.names_bfloat16(quickstart.get_config(''))
  assert command.names_bfloat16(quickstart.get_config('dtype=bfloat16'))


def test_verdict_belongs_to_one_chip_whatever_its_clock(monkeypatch, tmp_path):
  tried = []
  monkeypatch.setattr(runtime, '_try', lambda flag: tried.append(flag) or False)
  for chip in (AMX, AMX.replace('2000', '3000'), AMX.replace('avx2', 'avx3')):
    monkeypatch.setattr(runtime, '_chip', lambda chip=chip: chip)
    runtime.prepare(tmp_path, bfloat16=True)
  assert len(tried) == 2


@pytest.mark.parametrize('chip, version', [('flags : avx2', '0.12.0'), (AMX, '0.10.2')])
def test_flag_is_not_tried_where_it_does_not_help(monkeypatch, tmp_path, chip, version):
  monkeypatch.setattr(runtime, '_chip', lambda: chip)
  monkeypatch.setattr(runtime.importlib.metadata, 'version', lambda name: version)
  monkeypatch.setattr(runtime, '_try', lambda flag: pytest.fail('tried'))
  runtime.prepare(tmp_path, bfloat16=True)
  assert os.environ['XLA_FLAGS'] == '--xla_cpu_enable_fast_math=false'


def test_a_choice_of_the_user_stays(monkeypatch, tmp_path):
  monkeypatch.setenv('XLA_FLAGS', runtime.ONEDNN.replace('true', 'false'))
  monkeypatch.setattr(runtime, '_try', lambda flag: pytest.fail('tried'))
  runtime.prepare(tmp_path, bfloat16=True)
  assert os.environ['XLA_FLAGS'] == runtime.ONEDNN.replace('true', 'false')
  assert os.environ['JAX_COMPILATION_CACHE_DIR'] == str(tmp_path / 'compiled')


def test_unknown_flag_is_refused_without_harm_to_this_process():
  assert not runtime._try('--xla_no_such_flag=true')


def test_trial_passes_without_a_flag():
  assert runtime._try('')


def test_compiled_programs_are_kept(tmp_path):
  script = (
    f'from experiments import runtime; runtime.prepare({str(tmp_path)!r})\n'
    'import jax; print(jax.config.jax_compilation_cache_dir)')
  environment = {name: value for name, value in os.environ.items() if name != 'JAX_COMPILATION_CACHE_DIR'}
  done = subprocess.run([sys.executable, '-c', script], env=environment, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == str(tmp_path / 'xla')


def test_folder_that_cannot_be_made_costs_only_time(monkeypatch, tmp_path):
  (tmp_path / 'file').touch()
  monkeypatch.setattr(runtime, '_try', lambda flag: True)
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
  runtime.prepare(tmp_path / 'file' / 'cache', bfloat16=True)
  assert runtime.ONEDNN in os.environ['XLA_FLAGS'] and 'JAX_COMPILATION_CACHE_DIR' not in os.environ
