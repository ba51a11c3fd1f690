"""The loop: exact resume, errors before anything compiles, what a NaN leaves behind, and that every loss can be driven
to zero.
"""

import functools
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from srm_jax import checkpoints, sharding
from srm_jax.data import records, tokenizer
from srm_jax.losses.advantages import ADVANTAGES, group_relative
from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig, forward_flops, train_flops
from srm_jax.schema import ConfigError, resolve
from srm_jax.train import NonFiniteError, describe, step_flops, train
from srm_jax.train import _compiled_step as compiled_step
from srm_jax.types import Batch, Recipe, SamplingParams
from tests import tiny
from tests.tiny import one_device, tiny_tasks  # noqa: F401

SFT = functools.partial(tiny.sft, num_steps=4, checkpoint_every=2, name='muon', ema_decay=0.5, microbatches=2)
GRPO = functools.partial(tiny.grpo, num_steps=3, checkpoint_every=1)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """{recipe: a run that nothing interrupted}."""
  folder = tmp_path_factory.mktemp('finished')
  return {name: train(config(), folder / name) for name, config in (('sft', SFT), ('grpo', GRPO))}


def assert_equal(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(actual), jax.device_get(expected))


def without_clock(rows):
  return [{key: value for key, value in row.items() if key != 'seconds_per_step'} for row in rows]


def saved_meta(workdir, step):
  """Fingerprints of parameters, optimizer and average at a step, with the source's cursor."""
  return (workdir / 'checkpoints' / str(step) / 'meta' / 'metadata').read_text()


def listed(workdir):
  return [path.name for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit()]


def test_devices_that_are_full_say_what_to_do(tmp_path, monkeypatch):
  def full(*_):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.\nlong report')

  monkeypatch.setattr('srm_jax.train._compiled_step', full)
  with pytest.raises(ConfigError, match="does not fit the devices' memory; fix: .*XLA says: .* 7 bytes.$"):
    train(SFT(), tmp_path / 'sft')
  teacher = tiny.write_model(tmp_path / 'teacher', TransformerConfig(258, 1, 16, 2, 2, 8, 32, max_length=64))
  distilled = tiny.train(base.distill(teacher, tiny.data(), tiny.batch(), base.distillation()))
  with pytest.raises(ConfigError, match=f'memory, with teacher {teacher} beside it; fix: .*experiments.cache_teacher'):
    train(distilled, tmp_path / 'distilled')
  monkeypatch.setattr('srm_jax.train._compiled_step', lambda *_: 1 / 0)  # other errors stay what they are
  with pytest.raises(ZeroDivisionError):
    train(SFT(), tmp_path / 'other')


def test_an_alarm_is_logged_once_and_says_what_to_change(tmp_path, caplog):
  """An untrained model answers no sum rightly."""
  config = tiny.train(base.grpo(tiny.data('sums'), tiny.rollouts()), num_steps=12)
  with caplog.at_level('WARNING', logger='srm_jax.train'):
    train(config, tmp_path)
  rung = [record.getMessage() for record in caplog.records if 'alarm no_variance' in record.getMessage()]
  assert len(rung) == 1 and 'equal rewards within every group of steps 1 to 10' in rung[0] and 'too hard' in rung[0]


@pytest.mark.parametrize('name, config, after', [('sft', SFT, 1), ('sft', SFT, 2), ('grpo', GRPO, 2)])
def test_a_stopped_run_continues_bit_for_bit(finished, tmp_path, name, config, after):
  before = signal.getsignal(signal.SIGINT)  # ignored where the tests run in the background of a shell
  with tiny.stopped_after(after):
    train(config(), tmp_path)
  assert signal.getsignal(signal.SIGINT) is before
  run = train(config(), tmp_path)
  assert run.step == finished[name].step
  assert_equal(run.params, finished[name].params)
  assert saved_meta(tmp_path, run.step) == saved_meta(finished[name].workdir, run.step)
  assert without_clock(run.metrics) == without_clock(finished[name].metrics)


def test_a_finished_run_is_read_back(finished):
  again = train(SFT(), finished['sft'].workdir)
  assert_equal(again.params, finished['sft'].params)
  assert again.metrics == finished['sft'].metrics and [row['step'] for row in again.metrics] == [1, 2, 3, 4]


def test_parameters_moved_and_the_loss_fell(finished):
  """What the tests above compare is not the initialisation."""
  for run in finished.values():
    assert all(row['grad_norm'] > 1e-3 and row['finite'] == 1 for row in run.metrics)
    assert len({saved_meta(run.workdir, step) for step in sorted(map(int, listed(run.workdir)))}) == 2
  assert finished['sft'].metrics[-1]['loss'] < finished['sft'].metrics[0]['loss']


def test_a_batch_is_described_by_what_is_supervised():
  rows = np.array([[1, 1, 2, 0], [1, 1, 1, 1]])
  batch = Batch(rows, rows, np.float32([[0, 1, 1, 0], [0, 0, 0, 1]]), rows, rows)
  assert describe(batch) == '2 x 4 tokens, 3 of 7 that are not padding supervised'


def test_metrics_of_a_reinforcement_run(finished):
  rows = finished['grpo'].metrics
  assert all(row['sampler_gap_max'] < 1e-4 for row in rows)
  assert 0 < np.mean([row['reward'] for row in rows]) < 1
  assert rows[0]['flops'] < rows[1]['flops']


def test_eight_devices_train_like_one(finished, tmp_path, monkeypatch):
  monkeypatch.setattr(sharding, 'make_mesh', functools.partial(sharding.make_mesh.func, devices=jax.devices()))
  optimizer = base.optimizer('adamw', learning_rate=3e-3, warmup_steps=1, schedule='constant')
  config = SFT(mesh=(2, 2, 2), optimizer=optimizer)
  steps = []

  def remember(*args):
    steps.append(compiled_step(*args))
    return steps[0]

  monkeypatch.setattr('srm_jax.train._compiled_step', remember)
  run = train(config, tmp_path)
  assert steps[0]._cache_size() == 1  # the state comes back where it was: nothing compiles twice
  assert run.params['model']['embedding'].sharding.spec == jax.sharding.PartitionSpec('tensor', 'fsdp')
  first, expected = run.metrics[0], finished['sft'].metrics[0]
  assert first['loss'] == pytest.approx(expected['loss'], rel=1e-5)
  assert first['grad_norm'] == pytest.approx(expected['grad_norm'], rel=1e-4)


# What is wrong with a config is said before a parameter exists.

def changed(config, **changes):
  """A plain copy with nested keys replaced or added; a__b is config.a.b."""
  config = resolve(config)
  for key, value in changes.items():
    *path, last = key.split('__')
    functools.reduce(lambda at, name: at[name], path, config)[last] = value
  return config


def distillation(teacher, **options):
  options = {'hidden_weight': 0.1, **options}
  return tiny.train(base.distill(teacher, tiny.data(), tiny.batch(), base.distillation(**options)))


WRONG = {
    'misspelt key': (dict(num_step=3), r"config\.num_step: key 'num_step' unknown \(did you mean 'num_steps'"),
    'misspelt deep key': (dict(recipe__batch__lenght=8), r"config\.recipe\.batch\.lenght.*did you mean 'length'"),
    'wrong type': (
        dict(optimizer__learning_rate='fast'), r"config\.optimizer\.learning_rate is 'fast' \(str\); expected float",
    ),
    'recipe': (dict(recipe__name='stf'), r"recipe 'stf' unknown \(did you mean 'sft'"),
    'optimizer': (dict(optimizer__name='adam'), r"optimizer 'adam' unknown \(did you mean 'adamw'"),
    'schedule': (dict(optimizer__schedule='cosin'), r"schedule 'cosin' unknown"),
    'task': (dict(recipe__data__task='sum'), r"task 'sum' unknown \(did you mean 'sums'"),
    'split': (dict(recipe__data__split='dve'), r"no split 'dve'"),
    'target': (dict(recipe__data__target='solutions'), r"data\.target 'solutions' unknown"),
    'packing': (dict(recipe__batch__packing='plam'), r"batch\.packing 'plam' unknown"),
    'tokenizer': (dict(tokenizer='bytes'), r"tokenizer 'bytes' not found; choose 'byte'"),
    'model': (dict(model__head_dim=7), r'head_dim=7 is odd'),
    'vocabulary': (dict(model__vocab_size=100), r'vocab_size=100 is below'),
    'mesh': (dict(mesh=(3, 1, 1)), r'mesh \(3, 1, 1\)'),
    'annotations without a file': (dict(recipe__data__target='completion'), r"needs data\.records"),
    'no such annotations': (dict(recipe__data__records='/nowhere.jsonl'), r'/nowhere\.jsonl does not exist'),
    'too long': (dict(recipe__batch__length=6), r"example id='.*' has 1\d tokens, context is 6"),
    'no such start': (dict(init_from='/nowhere'), r'/nowhere holds no model'),
}
WRONG_RL = {
    'advantage': (dict(recipe__advantage__name='group'), r"advantage 'group' unknown"),
    'advantage option': (
        dict(recipe__advantage__options=dict(dof=1)),
        r"option of advantage 'group_relative' 'dof' unknown \(did you mean 'ddof'",
    ),
    'surrogate': (dict(recipe__surrogate__name='ppo'), r"surrogate 'ppo' unknown"),
    'surrogate option': (
        dict(recipe__surrogate__options=dict(clip=1.0)), r"option of surrogate 'clipped' 'clip' unknown",
    ),
    'reduction': (dict(recipe__reduction__name='mean'), r"reduction 'mean' unknown"),
    'reduction option': (
        dict(recipe__reduction__name='fixed_length'), r"reduction 'fixed_length' needs the options \['max_length'\]",
    ),
    'kl estimator': (dict(recipe__kl__estimator='k4'), r"kl\.estimator 'k4' unknown"),
    'no reference': (dict(recipe__kl__coef=0.1, recipe__kl__reference='/nowhere'), r'/nowhere holds no model'),
    'prompt too long': (
        dict(recipe__rollouts__length=10), r'prompt .* has 4 tokens; with max_new_tokens=8 it does not fit in 10',
    ),
    'context too short': (dict(model__max_length=11), r'does not fit in 11.*model\.max_length=11'),
}
WRONG_TEACHER = {
    'no teacher': (dict(recipe__teacher='/nowhere'), r'/nowhere holds no model'),
    'divergence': (
        dict(recipe__loss__terms__forward_kl__options__name='forward'),
        r"divergence of loss\.terms\.forward_kl\.options 'forward' unknown \(did you mean 'forward_kl'",
    ),
    'divergence option': (
        dict(recipe__loss__terms__forward_kl__options__options=dict(beta=0.1)),
        r"option of divergence of loss\.terms\.forward_kl\.options 'forward_kl' 'beta' unknown",
    ),
    'feature': (
        dict(recipe__loss__terms__hidden__options__feature='cosin'), r"hidden\.options\.feature 'cosin' unknown",
    ),
    'layers': (dict(recipe__loss__terms__hidden__options__layers='all'), r"hidden\.options\.layers 'all' unknown"),
    'coupled': (
        dict(microbatches=2, recipe__loss__terms__cka=base.term('alignment', feature='linear_cka', layers='final')),
        r"config\.microbatches=2, but the terms \['cka'\] see the whole batch at once; fix: 1",
    ),
}


def assert_refused(config, workdir, monkeypatch, message):
  monkeypatch.setattr(transformer, 'init_params', lambda *_: pytest.fail('a parameter was made'))
  with pytest.raises(ValueError, match=message):
    train(config, workdir)
  assert not (workdir / 'config.json').exists()


@pytest.mark.parametrize('case', WRONG)
def test_a_wrong_config_stops_before_anything_compiles(case, tmp_path, monkeypatch):
  changes, message = WRONG[case]
  assert_refused(changed(tiny.sft(), **changes), tmp_path, monkeypatch, message)


@pytest.mark.parametrize('case', WRONG_RL)
def test_a_wrong_reinforcement_config_stops_before_anything_compiles(case, tmp_path, monkeypatch):
  changes, message = WRONG_RL[case]
  assert_refused(changed(tiny.grpo(), **changes), tmp_path, monkeypatch, message)


@pytest.mark.parametrize('case', WRONG_TEACHER)
def test_a_wrong_teacher_stops_before_anything_compiles(case, finished, tmp_path, monkeypatch):
  changes, message = WRONG_TEACHER[case]
  assert_refused(changed(distillation(str(finished['sft'].workdir)), **changes), tmp_path, monkeypatch, message)


@pytest.fixture(scope='module')
def pieces(tmp_path_factory):
  """A SentencePiece tokenizer, which no run of this module was trained with."""
  texts = [tiny.SUMS.prompt(problem) + tiny.SUMS.solution(problem) for problem in tiny.SUMS.problems('train')]
  return tokenizer.train_sentencepiece(texts, tmp_path_factory.mktemp('pieces') / 'tokenizer.model', vocab_size=275)


@pytest.mark.parametrize('place', ['recipe__teacher', 'init_from'])
def test_another_vocabulary_is_refused(place, finished, pieces, tmp_path, monkeypatch):
  workdir = str(finished['sft'].workdir)
  config = distillation(workdir) if place == 'recipe__teacher' else tiny.sft(model=dict(vocab_size=258))
  config = changed(config, **{place: workdir, 'tokenizer': pieces, 'model__vocab_size': 0})
  assert_refused(config, tmp_path, monkeypatch, 'tokenizer|vocab_size')


def test_another_shape_than_the_start_is_refused(finished, tmp_path, monkeypatch):
  config = tiny.sft(init_from=str(finished['sft'].workdir), model=dict(mlp_dim=48))
  assert_refused(config, tmp_path, monkeypatch, r'config\.model does not fit init_from=.*mlp_dim=48 \(there 32\)')


def annotation(problem, completion, **options):
  values = dict(correct=True, finished=False, sample=0) | options
  return records.Annotation(
      problem=problem, prompt=tiny.SUMS.prompt(problem), completion=completion, num_tokens=len(completion),
      teacher=records.Teacher('t', 1, 'h'), sampling=SamplingParams(), config_hash='c', **values,
  )


def from_records(path, **options):
  return tiny.train(base.sft(tiny.data(records=str(path), target='completion'), tiny.batch(**options)))


def test_nothing_to_learn_from_is_refused(tmp_path, monkeypatch):
  path, problem = tmp_path / 'annotations.jsonl', tiny.SUMS.problems('train', count=1)[0]
  records.write(path, [annotation(problem, '#### 99', correct=False)])
  assert_refused(from_records(path), tmp_path / 'run', monkeypatch, 'nothing to learn from')


def test_a_batch_without_a_supervised_token_is_refused(tmp_path):
  path, problems = tmp_path / 'annotations.jsonl', tiny.SUMS.problems('train', count=3)
  records.write(path, [annotation(problem, '') for problem in problems])
  with pytest.raises(ValueError, match=r"no supervised token; its examples are \['"):
    train(from_records(path), tmp_path / 'run')


def test_a_workdir_of_another_config_is_refused(finished):
  with pytest.raises(ConfigError, match=r'begun with another config: config\.optimizer\.b1 was 0\.9, is 0\.8'):
    train(changed(SFT(), optimizer__b1=0.8), finished['sft'].workdir)
  shown = train(changed(SFT(), progress=True), finished['sft'].workdir)  # how it is shown does not matter
  assert without_clock(shown.metrics)


def test_a_changed_teacher_is_noticed(finished, tmp_path):
  teacher = tmp_path / 'teacher'
  train(SFT(), teacher)
  config = changed(distillation(str(teacher)), num_steps=2, checkpoint_every=1)
  train(config, tmp_path / 'student')
  (tmp_path / 'student' / 'checkpoints' / '2').rename(tmp_path / 'later')
  for path in (teacher / 'checkpoints').iterdir():
    path.rename(tmp_path / f'old-{path.name}')
  opened = checkpoints.open_checkpoints(teacher)
  other = jax.tree.map(lambda x: x + 1, finished['sft'].params)
  opened.save(checkpoints.TrainState(jnp.asarray(4, jnp.int32), other, {}, None), {})
  opened.close()
  with pytest.raises(ConfigError, match='the frozen models changed since the checkpoint'):
    train(config, tmp_path / 'student')


# What is not finite.

def test_a_step_that_is_not_finite_keeps_the_last_good_state(tmp_path, monkeypatch):
  """The second batch is poisoned and the third is not: neither may move the parameters that are saved. The advantage is
  tried once before the first.
  """
  calls = []

  def poisoned(rewards, *, valid=None):
    calls.append(1)
    return np.asarray(group_relative(rewards, valid=valid)) * (np.nan if len(calls) == 3 else 1.0)

  monkeypatch.setitem(ADVANTAGES, 'poisoned', poisoned)
  config = changed(GRPO(checkpoint_every=0), recipe__advantage__name='poisoned', recipe__advantage__options=dict())
  message = r'step 1: not finite, first in the loss.*checkpoint 1, the batch in .*non_finite_batch_1\.npz'
  with pytest.raises(NonFiniteError, match=message):
    train(config, tmp_path)
  saved = np.load(tmp_path / 'non_finite_batch_1.npz')
  assert np.isnan(saved['advantages']).any() and saved['batch.inputs'].shape == saved['advantages'].shape
  calls[:] = [1, 1]
  good = train(changed(config, num_steps=1), tmp_path / 'good')
  assert_equal(checkpoints.load_model(tmp_path).params, good.params['model'])


def test_flops_count_what_is_useful():
  model, teacher = TransformerConfig(258, 1, 16, 2, 2, 8, 32), TransformerConfig(258, 2, 32, 2, 2, 16, 64)
  batch = tiny.random_batch()
  tokens = int(batch.segment_ids.sum())
  context = batch.positions.sum() / tokens
  recipe = Recipe(None, None, {'teacher': (teacher, {})})
  expected = train_flops(model, tokens, context) + forward_flops(teacher, tokens, context)
  assert step_flops(model, recipe, batch) == pytest.approx(expected)
  sampled = expected + forward_flops(model, tokens, context)
  assert step_flops(model, recipe, tiny.random_rollouts()) == pytest.approx(sampled)


# Every loss can be driven to nothing on one batch.

def overfit(recipe, **options):
  model = dict(embed_dim=32, mlp_dim=64)
  settings = dict(num_steps=150, learning_rate=0.02, log_every=1, overfit_one_batch=True, model=model) | options
  return tiny.train(recipe, **settings)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
  """A model that knows one batch by heart, so that its distributions are far from flat."""
  workdir = tmp_path_factory.mktemp('overfit') / 'teacher'
  return train(overfit(base.sft(tiny.data(), tiny.batch())), workdir)


def test_overfit_sft(teacher):
  assert teacher.metrics[-1]['loss'] < 0.01 * teacher.metrics[0]['loss']


@pytest.mark.parametrize('kind', ['logits', 'hidden', 'on_policy'])
def test_overfit_distillation(kind, teacher, tmp_path):
  folder, rows = str(teacher.workdir), (tiny.data(), tiny.batch())
  config = {
      'logits': lambda: overfit(base.distill(folder, *rows, base.distillation()), seed=2),
      'hidden': lambda: overfit(base.distill(folder, *rows, base.distillation(weight=0.0, hidden_weight=1.0)), seed=2),
      'on_policy': lambda: overfit(
          base.on_policy_distill(folder, tiny.data(), tiny.rollouts(), base.distillation()), seed=2
      ),
  }[kind]()
  rows = train(config, tmp_path).metrics
  assert rows[-1]['loss'] < 0.01 * rows[0]['loss']
