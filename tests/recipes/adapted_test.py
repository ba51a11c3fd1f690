"""Runs of adapters on a frozen base: what is trained, saved and shared, and what is refused before it compiles."""

import json

import jax
import numpy as np
import pytest

from configs import base
from srm_jax import checkpoints, export
from srm_jax.models import adapter_files, adapters, transformer
from srm_jax.models.config import TransformerConfig, forward_flops
from srm_jax.models.quantization import Quantized
from srm_jax.models.transformer import Transformer
from srm_jax.recipes import adapted
from srm_jax.schema import ConfigError
from srm_jax.train import step_flops, train
from srm_jax.types import Objective, Recipe
from tests import tiny
from tests.tiny import one_device, tiny_tasks  # noqa: F401

MODEL = TransformerConfig(258, 1, 16, 2, 2, 8, 32, max_length=64)


@pytest.fixture(scope='module')
def start(tmp_path_factory):
  return tiny.write_model(tmp_path_factory.mktemp('base'), MODEL, scale=2.0)


def _config(start, make=tiny.sft, *, rank=2, section=None, **options):
  section = base.adapters(rank, **{'targets': ('attention/*', '0/mlp/up'), **(section or {})})
  return make(**{'init_from': start, 'adapters': section, 'learning_rate': 3e-2, 'num_steps': 4, **options})


@pytest.fixture(scope='module')
def finished(start, tmp_path_factory):
  """DoRA on int8, saved after every second step."""
  config = _config(start, section=dict(kind='dora', base='int8'), checkpoint_every=2, ema_decay=0.5, microbatches=2)
  return config, train(config, tmp_path_factory.mktemp('finished'))


def test_the_loss_falls_and_the_base_stays(start, finished, tmp_path):
  before = checkpoints.load_model(start).params
  for run in (finished[1], train(_config(start), tmp_path)):
    assert set(run.params) == {'adapters'}
    assert run.metrics[-1]['loss'] < run.metrics[0]['loss'] - 0.1
    assert all(np.any(leaf) for leaf in jax.tree.leaves(run.params))
  after = checkpoints.load_model(start).params
  jax.tree.map(np.testing.assert_array_equal, before, after)


def test_fresh_adapters_begin_where_the_base_is(start, tmp_path):
  runs = [train(_config(start, rank=rank, num_steps=1), tmp_path / str(rank)) for rank in (0, 2)]
  assert set(runs[0].params) == {'model'}
  assert runs[0].metrics[0]['loss'] == pytest.approx(runs[1].metrics[0]['loss'], rel=1e-6)


def test_a_checkpoint_holds_adapters_alone(finished):
  """Parameters, two moments of Adam and the average: four numbers for each one that is trained, and some counters."""
  config, run = finished
  section = adapters.AdapterConfig(**config.adapters.to_dict())
  trained = adapters.num_adapter_params(MODEL, section)
  opened = checkpoints.open_checkpoints(run.workdir)
  saved = opened.manager.item_metadata(run.step)
  opened.close()
  count = lambda tree: sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(dict(tree)))
  params, rest = count(saved['params']), count(saved['rest'])
  assert params == trained == sum(leaf.size for leaf in jax.tree.leaves(run.params))
  assert 3 * trained <= rest <= 3 * trained + 8
  meta = json.loads((run.workdir / 'checkpoints' / str(run.step) / 'meta' / 'metadata').read_text())
  assert list(meta['frozen']) == [adapted.BASE]


def test_a_stopped_run_continues_bit_for_bit(finished, tmp_path):
  config, expected = finished
  with tiny.stopped_after(3):
    train(config, tmp_path)
  run = train(config, tmp_path)
  jax.tree.map(np.testing.assert_array_equal, run.params, expected.params)
  assert run.metrics[-1]['loss'] == expected.metrics[-1]['loss']


@pytest.mark.parametrize('quantize', ['', 'int8'])
def test_the_reference_policy_is_the_base(start, quantize, tmp_path, monkeypatch):
  """Actor and reference are one set of arrays, also where it is quantised, so that their divergence begins at zero."""
  made = []
  monkeypatch.setattr(adapted, 'adapt', lambda *args: made.append(adapt(*args)) or made[-1])
  recipe = base.grpo(tiny.data('parity'), tiny.rollouts(), kl=0.1, reference=start)
  config = _config(start, lambda **options: tiny.train(recipe, **options), section=dict(base=quantize), num_steps=3)
  run = train(config, tmp_path)
  reference, shared = (made[0].frozen[name][1] for name in ('reference', adapted.BASE))
  assert reference is shared
  kernel = shared['layers']['mlp']['up']['kernel']
  assert isinstance(kernel, Quantized) == bool(quantize)
  assert abs(run.metrics[0]['kl']) < 1e-6 < run.metrics[2]['kl']
  assert all(row['sampler_gap_max'] < 1e-4 for row in run.metrics)


adapt = adapted.adapt


@pytest.mark.parametrize('section, message', [
    (dict(targets=('attention/o',)), r"config\.adapters: adapter target 'attention/o' matches nothing"),
    (dict(targets=()), r'config\.adapters\.rank=2 without targets'),
    (dict(base='nf4'), r'config\.adapters: inputs of attention/k \(16\), .* do not divide'),
    (dict(base='int4'), r"config\.adapters: base 'int4' unknown"),
    (dict(kind='ia3'), r"config\.adapters: kind 'ia3' unknown; choose from"),
])
def test_a_wrong_section_stops_before_anything_compiles(start, section, message, tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoints, 'load_model', lambda *_: pytest.fail('the base was read'))
  with pytest.raises(checkpoints.ConfigError, match=message):
    train(_config(start, section=section), tmp_path)


def test_flops_leave_out_the_weight_gradient():
  batch = tiny.random_batch()
  tokens = int(batch.segment_ids.sum())
  recipe = Recipe(None, None, {adapted.BASE: (MODEL, {})})
  expected = 2 * forward_flops(MODEL, tokens, batch.positions.sum() / tokens)
  assert step_flops(MODEL, recipe, batch) == pytest.approx(expected)


def test_what_a_run_says_of_its_adapters(start):
  section = adapters.AdapterConfig(2, 4.0, ('attention/q',), base='int8')
  said = adapted.objective(Objective(None, None, {'loss': 'x'}), MODEL, section).resolved
  trained = 16 * 2 + 2 * 16
  assert f'lora of rank 2, scale 2, on [\'attention/q\']: {trained} parameters are trained' in said['adapters']
  assert 'frozen in int8' in said['adapters'] and said['loss'] == 'x'


def _logits(config, params):
  tokens = np.arange(1, 13)[None]
  return Transformer(config).apply(transformer.variables(params), tokens).logits


def test_a_finished_run_is_a_model(start, finished):
  """Its base with the adapters merged in, as a teacher, start or exported model."""
  config, run = finished
  section = adapters.AdapterConfig(**config.adapters.to_dict())
  frozen = adapters.quantize(MODEL, checkpoints.load_model(start).params, 'int8')
  expected = _logits(MODEL, adapters.join(MODEL, section, frozen, run.params['adapters']))
  model = checkpoints.load_model(run.workdir)
  np.testing.assert_allclose(_logits(MODEL, model.params), expected, atol=2e-4)
  assert float(np.abs(expected - _logits(MODEL, checkpoints.load_model(start).params)).max()) > 0.01
  assert model.step == run.step and not adapters.is_adapted(model.params)


def test_a_run_may_begin_from_one_that_trained_adapters(finished, tmp_path):
  first = train(_config(str(finished[1].workdir), rank=0, num_steps=1), tmp_path)
  assert first.metrics[0]['loss'] == pytest.approx(finished[1].metrics[-1]['loss'], rel=0.5)


def test_adapters_of_a_run_as_files_for_peft(finished, tmp_path):
  config, run = finished
  export.export_adapters(run.workdir, tmp_path)
  section, tree = adapter_files.load_adapters(tmp_path, MODEL)
  assert (section.rank, section.kind, section.alpha) == (2, 'dora', config.adapters.alpha)
  jax.tree.map(np.testing.assert_array_equal, tree, run.params['adapters'])


def test_a_run_without_adapters_has_none_to_write(start, tmp_path):
  with pytest.raises(ConfigError, match='trained no adapters'):
    export.export_adapters(start, tmp_path / 'x')


def test_adapters_of_random_weights_are_no_model(tmp_path):
  run = train(_config('', num_steps=1), tmp_path)
  with pytest.raises(ConfigError, match='adapters of random weights, which are not kept'):
    checkpoints.load_model(run.workdir)
