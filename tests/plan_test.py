import functools
import importlib.util
import math
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import base
from experiments import plan as main
from srm_jax import plan, schema
from srm_jax.data import teacher_cache
from srm_jax.models import adapters
from srm_jax.models.config import TransformerConfig, num_params
from tests import tiny

GIB = 2**30


@pytest.fixture
def cpu_chip(monkeypatch):
  """A data sheet for the CPU devices that stand in for a topology's."""
  chip = plan.Chip(GIB, 1e12, 1e11, 1e10)
  monkeypatch.setitem(plan.CHIPS, jax.devices()[0].device_kind, chip)
  return chip


def test_a_plan_counts_state_and_batch_over_the_chips(cpu_chip):
  config = tiny.sft(mesh=(1, 4, 1), model=dict(vocab_size=64))
  found = plan.plan(config, jax.devices()[:4])
  parameters = num_params(TransformerConfig(**config.model.to_dict()))
  batch = 5 * 4 * 4 * 32 // 4  # five fields of 4 x 32 numbers of 4 bytes, a row a chip
  state = 3 * 4 * parameters  # parameters and two moments of Adam
  assert state / 4 + batch < found.memory.arguments < state / 4 * 1.2 + batch + 100  # norms stay whole on every chip
  assert found.memory.fits and found.memory.outputs < 1000  # the donated state is written in place
  assert found.memory.total >= found.memory.arguments + found.memory.temporaries
  assert (found.chips, found.tokens) == (4, 128)
  assert found.collectives['all-gather'].count > 0
  # No recomputation; attention is computed in full, counted in half.
  assert 0.9 < found.executed_flops / found.useful_flops < 1.2
  np.testing.assert_allclose(found.roofline.compute, found.executed_flops / 4 / cpu_chip.flops)
  assert found.roofline.seconds == max(found.roofline) > 0
  console = main.rich.console.Console(record=True, width=120)
  main.show('as configured', found, console)
  text = console.export_text()
  assert 'all-gather' in text and '1.00 GiB (fits)' in text and '4 chips, 128 tokens' in text


def test_a_program_that_compiles_but_leaves_no_room_for_its_arguments_does_not_fit(cpu_chip, monkeypatch):
  monkeypatch.setattr(plan, '_compile', lambda traced: (plan.Memory(GIB, 2.0, 0.0, GIB + 2.0, True), None))
  assert not plan.plan(tiny.sft(mesh=(1, 1, 1), model=dict(vocab_size=64)), jax.devices()[:1]).memory.fits


def _traced_only(traced):
  """In place of compiling: the arguments alone."""
  size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(traced.in_avals))
  return plan.Memory(size, 0.0, 0.0, size, True), None


def test_a_cache_takes_the_room_of_its_arrays_and_not_of_a_teacher(cpu_chip, tmp_path, monkeypatch):
  monkeypatch.setattr(plan, '_compile', _traced_only)
  model = TransformerConfig(258, 2, 32, 2, 2, 16, 64, max_length=64)
  teacher = tiny.write_model(tmp_path / 'teacher', model)
  identity = teacher_cache.Identity('t', 'v', 'd', 258, 7, 1.0)
  with teacher_cache.writer(tmp_path / 'cache', identity):
    pass
  rows = (tiny.data(), tiny.batch(4, 32))
  arguments = {}
  for name, recipe in {
      'cached': base.distill('', *rows, base.loss(kl=base.top_k()), cache=str(tmp_path / 'cache')),
      'present': base.distill(teacher, *rows, base.distillation()),
  }.items():
    config = tiny.train(recipe, mesh=(1, 1, 1), model=dict(vocab_size=258))
    arguments[name] = plan.plan(config, jax.devices()[:1]).memory.arguments
  known, parameters = 4 * 32 * (2 * 7 + 1) * 4, 4 * num_params(model)
  assert arguments['cached'] - known == arguments['present'] - parameters
  assert known < parameters / 4


def test_the_head_is_changed_wherever_the_recipe_keeps_it():
  assert plan.with_head(tiny.sft(), 0).recipe.head_chunk == 0
  config = tiny.train(base.distill('x', tiny.data(), tiny.batch(), base.distillation()))
  assert plan.with_head(config, 0).recipe.loss.head_chunk == 0
  assert plan.with_head(plan.with_head(config, 0), None).recipe.loss.head_chunk is None
  assert config.recipe.loss.head_chunk is None


@pytest.mark.parametrize('start', [16, 64, 100, 4096])
@pytest.mark.parametrize('limit', [0, 15, 16, 47, 64, 384, 1000])
def test_the_most_rows_are_found_by_halving(start, limit):
  tried = []

  def fits(rows):
    tried.append(rows)
    return rows <= limit

  assert plan.most_rows(fits, start=start, unit=16) == limit // 16 * 16
  assert len(tried) == len(set(tried)) <= 2 + 2 * math.log2(max(start, limit, 16) / 16)
  assert all(rows % 16 == 0 and rows > 0 for rows in tried)


def test_a_search_starts_with_the_rows_of_the_config_and_keeps_its_chips_busy():
  devices = jax.devices()[:4]
  config = tiny.sft(mesh=(1, 4, 1), microbatches=3)
  assert plan.rows_of(config, devices) == (4, 12)
  assert plan.rows_of(tiny.sft(mesh=(1, 2, 2)), devices) == (4, 2)
  assert plan.with_rows(config, 24).recipe.batch.size == 24 and config.recipe.batch.size == 4
  rollouts = tiny.train(base.grpo(tiny.data(), tiny.rollouts(prompts=2, samples=6), kl=0.0), mesh=(2, 2, 1))
  assert plan.rows_of(rollouts, devices) == (12, 12)  # whole groups of 6 on 4 devices
  assert plan.with_rows(rollouts, 36).recipe.rollouts.prompts == 6
  pairs = functools.partial(base.preference, tiny.data(), loss='orpo')
  for recipe in (pairs(batch=tiny.batch(8)), pairs(rollouts=tiny.rollouts(prompts=4, samples=6))):
    config = tiny.train(recipe, mesh=(2, 2, 1), microbatches=2)
    assert plan.rows_of(config, devices) == (8, 16)  # two pairs a device, one in each microbatch
    assert plan.rows_of(plan.with_rows(config, 32), devices) == (32, 16)
  with pytest.raises(schema.ConfigError, match='microbatches'):
    plan.rows_of({key: value for key, value in config.to_dict().items() if key != 'microbatches'}, devices)


def test_the_largest_batch_is_printed_with_every_try(cpu_chip, monkeypatch):
  monkeypatch.setattr(plan, 'topology_devices', lambda name: jax.devices()[:2])
  monkeypatch.setattr(plan, '_compile', _traced_only)
  console = main.rich.console.Console(record=True, width=120)
  monkeypatch.setattr(main.rich.console, 'Console', lambda: console)  # the terminal of `run`
  config = tiny.sft(mesh=(1, 2, 1), model=dict(vocab_size=64))
  sizes = {n: plan.plan(plan.with_rows(config, n), jax.devices()[:2]).memory.total for n in (2, 4, 10, 12)}
  assert sizes[12] - sizes[10] == sizes[4] - sizes[2] == 2 * 5 * 4 * 32  # five fields of two rows
  monkeypatch.setitem(plan.CHIPS, jax.devices()[0].device_kind, cpu_chip._replace(hbm=sizes[10]))
  main.run(config, 'any', dense=False, grow=True, rollout=False)
  text = console.export_text()
  assert [line.split()[0] for line in text.splitlines() if ' rows: ' in line] == ['4', '8', '16', '12', '10']
  assert '10 rows are the most that fit, in steps of 2' in text and text.count('does not fit') == 2
  assert '320 tokens' in text
  monkeypatch.setitem(plan.CHIPS, jax.devices()[0].device_kind, cpu_chip._replace(hbm=sizes[2] - 1))
  with pytest.raises(schema.ConfigError, match='2 rows do not fit'):
    main.run(config, 'any', dense=False, grow=True, rollout=False)


def test_a_program_that_does_not_fit_is_read_from_the_message():
  message = (
      'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. '
      'Used 33.27G of 15.75G hbm. Exceeded hbm capacity by 17.52G.\n\nTotal hbm usage >= 33.79G:\n'
      '    reserved        530.00M \n    program          32.89G \n    arguments       388.15M \n\n'
      'Output size 386.26M; shares 386.25M with arguments.\n'
  )
  memory = plan.out_of_memory(message)
  assert not memory.fits
  np.testing.assert_allclose(
      [memory.total, memory.temporaries, memory.arguments], [33.27 * GIB, 32.89 * GIB, 388.15 * 2**20],
  )
  np.testing.assert_allclose(memory.outputs, 0.01 * 2**20, atol=1e4)
  assert math.isnan(plan.out_of_memory('Used 20G of 15.75G hbm').arguments)
  early = plan.out_of_memory(
      'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO '
      'temporaries (24.58G) exceeds available HBM (15.75G). HLO module: jit_step.'
  )
  assert not early.fits and early.total == early.temporaries == 24.58 * GIB and math.isnan(early.arguments)
  with pytest.raises(RuntimeError, match='something else'):
    plan.out_of_memory('something else')


def test_without_libtpu_the_message_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(schema.ConfigError, match=r"pip install -e '\.\[tpu\]'"):
    plan.topology_devices('v5e:4x4')


def test_an_unknown_chip_is_named():
  with pytest.raises(schema.ConfigError, match="chip 'cpu' unknown.*TPU v5 lite"):
    plan.plan(tiny.sft(mesh=(1, 1, 1), model=dict(vocab_size=64)), jax.devices()[:1])


def test_sampling_needs_the_copy_and_the_cache_beside_what_is_trained(cpu_chip):
  """Two groups of four rows on two chips: prompts of up to 16 slots, and completions of 40 that the cache grows to."""
  config = tiny.grpo(mesh=(1, 2, 1), model=dict(vocab_size=258))
  config.recipe.rollouts.update(length=56, max_new_tokens=40)
  model = TransformerConfig(**config.model.to_dict())
  found = plan.plan_rollout(config, jax.devices()[:2])
  assert list(found) == ['merge', 'gather', 'prefill', 'grow', 'decode']
  weights = 4 * num_params(model)
  state = 3 * weights / 2  # parameters and two moments of Adam, split in two
  slot = 4 * 2 * 4 * model.num_layers * model.num_kv_heads * model.head_dim  # keys and values of a chip's four rows
  near = lambda number: pytest.approx(number, rel=0.05)
  layer = weights - 4 * (258 * model.embed_dim + model.embed_dim)  # all but the embedding and the last norm
  assert found['merge'].outputs == near(weights / 2)
  assert found['gather'].outputs == near(layer / model.num_layers)
  assert found['gather'].total == pytest.approx(state + weights + layer / 2, rel=0.1)  # the copy, and the split stack
  assert found['prefill'].outputs == near(48 * slot)
  assert (found['grow'].arguments, found['grow'].outputs) == (near(48 * slot), near(64 * slot))
  assert found['decode'].arguments == near(weights + 64 * slot)  # every weight whole on every chip
  assert found['decode'].outputs < 0.1 * slot * 64  # the donated cache is written in place
  for name in ('gather', 'prefill', 'grow', 'decode'):
    parts = found[name].arguments + found[name].temporaries + found[name].outputs
    assert found[name].total >= parts + 0.99 * state
  console = main.rich.console.Console(record=True, width=120)
  main.show_rollout(found, cpu_chip, console)
  text = console.export_text()
  assert 'grow' in text and '(fits)' in text and 'reads its weights and cache once' in text
  with pytest.raises(schema.ConfigError, match="recipe 'sft' samples nothing"):
    plan.plan_rollout(tiny.sft(), jax.devices()[:1])


def test_sampling_that_does_not_fit_ends_the_plan(cpu_chip, monkeypatch):
  monkeypatch.setattr(plan, '_compile', lambda traced: (plan.Memory(0.0, 2 * GIB, 0.0, 2 * GIB, False), None))
  found = plan.plan_rollout(tiny.grpo(mesh=(1, 1, 1), model=dict(vocab_size=258)), jax.devices()[:1])
  assert list(found) == ['merge'] and not found['merge'].fits


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs the tpu extra')
def test_the_tpu_compiler_plans_a_small_run():
  root = pathlib.Path(__file__).resolve().parents[1]
  command = [
      sys.executable, '-m', 'experiments.plan', '--config=configs/sft/qwen2p5_0p5b.py:smoke', '--topology=v5e:2x2',
      '--dense',
  ]
  environment = {key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'}
  options = dict(cwd=root, env=environment, capture_output=True, text=True, timeout=300)
  done = subprocess.run(command, **options)
  assert done.returncode == 0, done.stderr
  assert 'chunked head: 4 chips, 512 tokens' in done.stdout and 'dense head: 4 chips' in done.stdout
  assert done.stdout.count('15.75 GiB (fits)') == 2 and done.stdout.count('all-gather') == 2
  unknown = subprocess.run([*command[:-2], '--topology=v5e:3x17'], **options)
  assert unknown.returncode == 2 and 'v5e:3x17' in unknown.stderr


@pytest.mark.parametrize('quantize', ['', 'int8'])
def test_a_plan_counts_the_state_of_adapters_alone(quantize, cpu_chip):
  config = tiny.sft(mesh=(1, 1, 1), model=dict(vocab_size=64), adapters=base.adapters(2, base=quantize))
  found = plan.plan(config, jax.devices()[:1])
  model = TransformerConfig(**config.model.to_dict())
  section = adapters.AdapterConfig(**config.adapters.to_dict())
  matrices = sum(np.prod(kernel.matrix) for kernel in adapters.kernels(model).values())
  outputs = sum(kernel.matrix[1] for kernel in adapters.kernels(model).values())
  stored = matrices + 4 * outputs if quantize else 4 * matrices
  whole = 4 * (64 * 16 + 3 * 16) + stored + 3 * 4 * adapters.num_adapter_params(model, section) + 5 * 4 * 4 * 32
  assert whole <= found.memory.arguments <= whole + 100
