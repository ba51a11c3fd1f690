"""The objective against whole logits, every loss through both sources, runs that learn and continue, and what does not
fit.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from configs.rl import preference as config_file
from srm_jax import checkpoints, inspection, schema, sharding
from srm_jax.data import records, tokenizer
from srm_jax.losses.preference import PREFERENCES, REFERENCED
from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import abstract, preference
from srm_jax.recipes.context import Context
from srm_jax.train import describe, sampled_share, train
from srm_jax.train_step import value_and_grad
from srm_jax.types import Pairs
from tests import tiny
from tests.data import chats, graded
from tests.tiny import one_device, tiny_tasks  # noqa: F401

MODEL = TransformerConfig(258, 1, 16, 2, 2, 8, 32, max_length=64)
CONTEXT = Context(MODEL, tokenizer.load('byte'), 1, 10)


@pytest.fixture(scope='module', autouse=True)
def exact_products():
  with jax.default_matmul_precision('highest'):
    yield


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """A reference, and annotations of twelve problems."""
  path = tmp_path_factory.mktemp('given')
  records.write(path / 'annotations.jsonl', graded.annotations(*[(2, 2), (1, 3), (3, 1)] * 4, (0, 2), (2, 0)))
  return {'reference': tiny.write_model(path / 'reference', MODEL, seed=5), 'records': str(path / 'annotations.jsonl')}


def section(folders, loss='dpo', *, online=False, size=8, **options):
  source = dict(batch=tiny.batch(size, 32, 'one_per_row'))
  data = tiny.data(records=folders['records'], target='unfiltered_completion')
  if online:
    source, data = dict(rollouts=tiny.rollouts()), tiny.data('parity')
  reference = folders['reference'] if loss in REFERENCED else ''
  return base.preference(data, loss=loss, reference=reference, **source, **options)


@pytest.fixture(scope='module')
def params():
  return {'model': jax.jit(transformer.init_params, static_argnums=0)(MODEL, jax.random.key(0))}


@pytest.fixture(scope='module')
def offline(folders):
  """loss -> its recipe on annotations."""
  return functools.cache(lambda loss: preference.build(section(folders, loss), CONTEXT))


@functools.cache
def program(objective, microbatches=1):
  return jax.jit(lambda params, batch, frozen: value_and_grad(
      objective, params, batch, frozen, jax.random.key(0), microbatches=microbatches
  ))


def run_objective(recipe, params, batch, **options):
  frozen = {name: tree for name, (_, tree) in recipe.frozen.items()}
  compiled = program(recipe.objective._replace(resolved=()), **options)  # what it says cannot be hashed
  return jax.device_get(compiled(params, batch, frozen))


def assert_close(actual, expected, tolerance=2e-6):
  np.testing.assert_allclose(actual[0], expected[0], rtol=tolerance)
  norm = optax.tree.norm(expected[1])
  assert norm > 1e-4 and optax.tree.norm(jax.tree.map(np.subtract, actual[1], expected[1])) < tolerance * norm
  for name, value in expected[2].items():
    np.testing.assert_allclose(actual[2][name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def completions(config, params, batch):
  """Sums of log-probabilities from whole logits."""
  out = transformer.Transformer(config).apply(
      {'params': params}, batch.inputs, positions=batch.positions, segment_ids=batch.segment_ids
  )
  logprobs = jnp.take_along_axis(jax.nn.log_softmax(out.logits), batch.targets[..., None], axis=-1)[..., 0]
  return jnp.sum(logprobs * batch.loss_mask, axis=1)


def test_the_loss_is_that_of_the_paper_on_whole_logits(offline, params):
  recipe = offline('dpo')
  batch = recipe.source.next(None, 0)
  shape, reference = recipe.frozen['reference']

  @jax.jit
  def loss(params):
    ratios = completions(MODEL, params['model'], batch.batch) - completions(shape, reference, batch.batch)
    return -jnp.mean(jax.nn.log_sigmoid(0.1 * (ratios[::2] - ratios[1::2]))), ratios

  (value, ratios), gradient = jax.value_and_grad(loss, has_aux=True)(params)
  found = run_objective(recipe, params, batch)
  assert_close(found, (value, gradient, {}), 2e-5)
  mean = {name: metric.total / metric.count for name, metric in found[2].items()}
  margin = 0.1 * (ratios[::2] - ratios[1::2])
  tokens = batch.batch.loss_mask.sum(1)
  expected = {
      'margin': margin.mean(), 'accuracy': (margin > 0).mean(), 'chosen_log_ratio': ratios[::2].mean(),
      'rejected_log_ratio': ratios[1::2].mean(), 'chosen_tokens': tokens[::2].mean(),
      'rejected_tokens': tokens[1::2].mean(), 'loss/preference': value,
  }
  assert mean.keys() == expected.keys()
  for name, number in expected.items():
    np.testing.assert_allclose(mean[name], number, rtol=1e-4, atol=1e-5, err_msg=name)
  assert 0 < expected['accuracy'] < 1


def test_the_baseline_is_of_prompts_with_others_completions(offline, params):
  """Policy and reference in both roles: once it is positive, once clipped."""
  recipe, seen = offline('kto'), []
  batch = recipe.source.next(None, 0)
  shape, reference = recipe.frozen['reference']
  scores = jax.jit(lambda params, rows: completions(MODEL, params, rows))
  for policy, frozen in ((params['model'], reference), (reference, params['model'])):
    ratios, others = (scores(policy, rows) - scores(frozen, rows) for rows in (batch.batch, batch.mismatched))
    seen.append(float(others.mean()))
    baseline = max(0.0, seen[-1])
    gains = 1 / (1 + np.exp(0.1 * (ratios[::2] - baseline)))
    losses = 1 / (1 + np.exp(0.1 * (baseline - ratios[1::2])))
    swapped = recipe._replace(frozen={'reference': (shape, frozen)})
    value, gradient, metrics = run_objective(swapped, {'model': policy}, batch)
    np.testing.assert_allclose(value, (gains.sum() + losses.sum()) / 8, rtol=1e-4)
    np.testing.assert_allclose(metrics['baseline'].total, baseline, rtol=1e-3, atol=1e-4)
    assert optax.tree.norm(gradient) > 1e-4
  assert min(seen) < -0.1 and max(seen) > 0.1


def half_weighted(batch: Pairs) -> Pairs:
  """The second pair says nothing."""
  return batch._replace(weights=np.where(np.arange(len(batch.weights)) // 2 == 1, 0, batch.weights).astype(np.float32))


@pytest.mark.parametrize('loss, microbatches', [('dpo', 2), ('orpo', 4)])
def test_microbatches_change_nothing(offline, params, loss, microbatches):
  recipe = offline(loss)
  batch = half_weighted(recipe.source.next(None, 0))
  assert len(set(batch.batch.loss_mask.sum(1))) > 2
  whole = run_objective(recipe, params, batch)
  assert whole[2]['accuracy'].count == 3
  assert_close(run_objective(recipe, params, batch, microbatches=microbatches), whole)


@pytest.mark.parametrize('loss', PREFERENCES)
def test_pairs_of_weight_0_and_what_is_masked_mean_nothing(offline, params, loss):
  recipe = offline(loss)
  batch = half_weighted(recipe.source.next(None, 0))
  expected = run_objective(recipe, params, batch)

  def garbled(rows):
    """Other tokens in the pair without weight; padding is what it is."""
    silent = (batch.weights == 0)[:, None]
    return rows._replace(inputs=np.where(silent, 65, rows.inputs), targets=np.where(
        silent | (rows.loss_mask == 0), 66, rows.targets))

  spoilt = batch._replace(batch=garbled(batch.batch), mismatched=batch.mismatched and garbled(batch.mismatched))
  actual = run_objective(recipe, params, spoilt)
  np.testing.assert_allclose(actual[0], expected[0], rtol=1e-6)
  assert_close(actual, expected)


def test_eight_devices_give_the_numbers_of_one(folders, params):
  recipe = preference.build(section(folders, 'kto', size=16), CONTEXT)
  batch = recipe.source.next(None, 0)
  expected = run_objective(recipe, params, batch)
  mesh = jax.make_mesh((2, 2, 2), sharding.MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
  with jax.set_mesh(mesh):
    names = transformer.param_names(MODEL)
    placed = {'model': jax.device_put(params['model'], sharding.shardings(names, params['model'], mesh))}
    frozen = {'reference': jax.device_put(recipe.frozen['reference'][1], sharding.shardings(
        names, recipe.frozen['reference'][1], mesh))}
    step = jax.jit(functools.partial(value_and_grad, recipe.objective))
    actual = jax.device_get(step(placed, sharding.shard_rows(batch, mesh), frozen, jax.random.key(0)))
  assert_close(actual, expected, 2e-5)


# Sources.


@pytest.mark.parametrize('loss', ['dpo', 'kto'])
def test_online_pairs_are_better_and_worse_samples(folders, params, loss):
  recipe = preference.build(section(folders, loss, online=True), CONTEXT)
  batch = recipe.source.next(params, 0)
  assert batch.batch.inputs.shape[0] == 4 and np.any(batch.weights) and (batch.mismatched is None) == (loss != 'kto')
  read = CONTEXT.tokenizer.decode
  for row in range(4):
    prompt, answer = batch.batch.inputs[row, :4], batch.batch.targets[row][batch.batch.loss_mask[row] > 0]
    problem = next(one for one in tiny.PARITY.problems('train') if tiny.PARITY.prompt(one) == read(prompt.tolist()))
    reward = tiny.PARITY.grade(problem, read([int(token) for token in answer if token != CONTEXT.tokenizer.eos_id]))
    assert batch.weights[row] == 0 or reward == 1 - row % 2
  again = preference.build(section(folders, loss, online=True), CONTEXT).source
  jax.tree.map(np.testing.assert_array_equal, again.next(params, 0), batch)
  value, gradient, metrics = run_objective(recipe, params, batch)
  assert np.isfinite(value) and optax.tree.norm(gradient) > 1e-4
  assert metrics['informative'].total == batch.weights.sum() and metrics['informative'].count == 4
  assert 0 < metrics['reward'].total / metrics['reward'].count < 1
  assert sampled_share(batch) == 2.0 and describe(batch).startswith('4 x ')  # four samples, of which two are rows


def test_what_is_sampled_at_a_temperature_is_scored_at_it(folders, params):
  config = section(folders, 'simpo', online=True)
  config.rollouts.temperature = 0.5
  cold, warm = (preference.build(one, CONTEXT) for one in (config, section(folders, 'simpo', online=True)))
  batch = warm.source.next(params, 0)
  ours, theirs = (run_objective(recipe, params, batch)[2]['chosen_mean_logprob'].total for recipe in (cold, warm))
  assert abs(ours - theirs) > 1e-2


def test_a_group_without_difference_teaches_nothing(folders, params):
  recipe = preference.build(section(folders, online=True), CONTEXT)
  batch = recipe.source.next(params, 0)
  value, gradient, _ = run_objective(recipe, params, batch._replace(weights=np.zeros(4, np.float32)))
  assert value == 0 and optax.tree.norm(gradient) == 0


# Learning.


@pytest.mark.parametrize('loss', PREFERENCES)
def test_training_raises_the_margin(offline, folders, loss):
  """From the reference itself, where the margin of losses that compare with it is 0."""
  recipe = offline(loss)
  params, tx, rows = {'model': checkpoints.load_model(folders['reference']).params}, optax.adam(3e-3), []
  state = tx.init(params)
  for step in range(20):
    value, gradient, metrics = run_objective(recipe, params, recipe.source.next(None, step))
    rows.append({'loss': value, **{name: metric.total / metric.count for name, metric in metrics.items()}})
    updates, state = tx.update(gradient, state)
    params = optax.apply_updates(params, updates)
  if loss in REFERENCED:
    assert abs(rows[0]['margin']) < 1e-4
  assert rows[-1]['margin'] > rows[0]['margin'] + 0.05 and rows[-1]['accuracy'] > 0.7
  assert rows[-1]['loss'] < rows[0]['loss']


def run(recipe, workdir, **options):
  return train(tiny.train(recipe, **{'num_steps': 4, 'checkpoint_every': 2, **options}), workdir)


def test_a_stopped_run_continues_bit_for_bit(folders, tmp_path):
  config = section(folders, 'kto', online=True)
  whole = run(config, tmp_path / 'whole', num_steps=3)
  with tiny.stopped_after(2):
    run(config, tmp_path / 'cut', num_steps=3)
  again = run(config, tmp_path / 'cut', num_steps=3)
  assert again.step == 3
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.params), jax.device_get(whole.params))
  assert [row['loss'] for row in again.metrics] == [row['loss'] for row in whole.metrics]
  assert len({row['loss'] for row in whole.metrics}) == 3


def test_adapters_learn_from_pairs(folders, tmp_path):
  """The frozen base is its own reference."""
  found = run(section(folders), tmp_path, adapters=base.adapters(2), init_from=folders['reference'], microbatches=2)
  assert set(found.params) == {'adapters'} and found.metrics[-1]['margin'] > found.metrics[0]['margin']


def smoke(folders, argument):
  """The config as it stands, but for its model and where files are."""
  config = config_file.get_config(f'smoke,records={folders["records"]},{argument}')
  config.model, config.init_from, config.progress = base.model(**tiny.MODEL), folders['reference'], False
  config.recipe.data.task, config.model.max_length = 'sums', 256
  config.recipe.reference = config.recipe.reference and folders['reference']
  return config


@pytest.mark.parametrize('argument', ['loss=dpo', 'online'])
def test_the_config_runs(folders, tmp_path, argument):
  rows = train(smoke(folders, argument), tmp_path).metrics
  assert rows[-1]['step'] == 2 and rows[-1]['finite'] == 1 and 'margin' in rows[-1]


@pytest.mark.parametrize('online', ['', ',online'])
@pytest.mark.parametrize('loss', PREFERENCES)
def test_the_config_builds_with_every_loss(folders, loss, online):
  recipe = preference.build(smoke(folders, f'loss={loss}{online}').recipe, CONTEXT)
  assert recipe.objective.resolved['loss'].startswith(loss) and set(recipe.frozen) <= {'reference'}
  with pytest.raises(ValueError, match="config argument 'los' unknown"):
    config_file.get_config('los=dpo')


def test_pairs_are_shown_side_by_side(folders):
  seen = inspection.inspect(tiny.train(section(folders)), rows=3)
  page = inspection.render(seen, 'dpo')
  assert set(seen.scores) == {'student', 'reference'} and seen.total_rows == 8
  assert '| chosen of pair 0, weight 1' in page and '| rejected of pair 0' in page and '| chosen of pair 1' in page


@pytest.mark.parametrize('online', [False, True])
@pytest.mark.parametrize('loss', ['dpo', 'kto', 'orpo'])
def test_a_plan_knows_the_shapes(folders, params, loss, online):
  config = section(folders, loss, online=online)
  found, recipe = abstract.RECIPES['preference'](config.to_dict(), MODEL), preference.build(config, CONTEXT)
  real = recipe.source.next(params, 0)
  real = jax.tree.map(lambda x: x[:, :1] if x.ndim == 2 else x, real)  # online rows are no longer than need be
  planned = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*x.shape[:1], *(1,) * (x.ndim - 1)), x.dtype), found.batch)
  kinds = lambda tree: jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), tree)
  assert kinds(planned) == kinds(real)
  assert set(found.frozen) == set(recipe.frozen)


# What does not fit.


def changed(config, **changes):
  config = config.copy_and_resolve_references()
  with config.ignore_type():
    for path, value in changes.items():
      *parents, last = path.split('__')
      functools.reduce(lambda part, name: part[name], parents, config)[last] = value
  return config


WRONG = {
    'loss': (dict(loss__name='dpoo'), r"loss 'dpoo' unknown \(did you mean 'dpo'"),
    'option': (dict(loss__options=dict(beta=0.1, gamma=1.0)), "option of loss 'dpo' 'gamma' unknown"),
    'a number that is not the config\'s': (
        dict(loss__options=dict(beta=0.1, baseline=0.0), loss__name='kto'), "option of loss 'kto' 'baseline' unknown"),
    'beta missing': (dict(loss__options={}), r"loss 'dpo' needs the options \['beta'\]"),
    'beta': (dict(loss__options=dict(beta=0.0)), r'recipe\.loss dpo: beta 0\.0 of dpo must be above 0'),
    'smoothing': (dict(loss__options=dict(beta=0.1, label_smoothing=0.7)), r'label_smoothing 0\.7 of dpo must be in'),
    'beta is no number': (dict(loss__options=dict(beta='0.1')), r'recipe\.loss dpo: '),
    'no reference': (dict(reference=''), r'recipe\.reference is empty, but dpo compares with a frozen policy; fix: '),
    'a reference too many': (
        dict(loss__name='orpo', loss__options=dict(beta=0.1)), r"recipe\.reference=\S+, but orpo compares with none"),
    'target': (dict(data__target='completion'), r"data\.target is 'completion'; pairs need wrong completions as well"),
    'no file': (dict(data__records='nowhere.jsonl'), r'data\.records nowhere\.jsonl does not exist'),
    'odd': (dict(batch__size=7), r'batch\.size=7, .* a pair has two; fix: an even size'),
    'packed': (dict(batch__packing='plan'), r"batch\.packing='plan'.* row to itself"),
    'no pairs a problem': (dict(per_problem=0), 'per_problem=0; .*at least 1'),
    'too long': (dict(batch__length=11), r"recipe\.batch: example id='\d\+\d#\d' has \d+ tokens, context is 11; fix"),
    'nothing to read': (dict(batch=None), r'recipe\.batch and recipe\.rollouts are both given, or neither; fix: '),
}


@pytest.mark.parametrize('case', WRONG)
def test_a_wrong_config_is_refused(case, folders):
  changes, message = WRONG[case]
  with pytest.raises(schema.ConfigError, match=message):
    preference.build(changed(section(folders), **changes), CONTEXT)


@pytest.mark.parametrize('changes, loss, message', [
    (dict(rollouts__samples=1), 'dpo', r'rollouts\.samples=1, rollouts\.prompts=2; fix: at least two samples'),
    (dict(rollouts__prompts=1), 'kto', r'rollouts\.prompts=1; fix: .* for the baseline of kto two prompts'),
    (dict(batch=dict(size=2, length=8, packing='one_per_row')), 'dpo', 'are both given, or neither'),
    (dict(rollouts__length=9), 'dpo', r'rollouts\.length=9'),
])
def test_a_wrong_online_config_is_refused(folders, changes, loss, message):
  with pytest.raises(schema.ConfigError, match=message):
    preference.build(changed(section(folders, loss, online=True), **changes), CONTEXT)


def test_a_reference_of_another_vocabulary_is_refused(folders, tmp_path):
  other = tokenizer.load(chats.save_family(tmp_path, 'qwen2_5'))
  context = CONTEXT._replace(tokenizer=other, model=dataclasses.replace(MODEL, vocab_size=512))
  with pytest.raises(schema.ConfigError, match=r'reference has tokenizer byte of 258 pieces, the student '):
    preference.build(changed(section(folders), batch__length=200), context)


@pytest.mark.parametrize('loss, counts, message', [
    ('dpo', [(2, 0), (0, 3)], 'no problem with a right and a wrong one among 2 problems, 5 annotations, 2 of them'),
    ('kto', [(2, 0), (3, 0)], 'no three completions, of both grades, among 2 problems, 5 annotations, 5 of them'),
])
def test_annotations_without_a_difference_are_refused(folders, tmp_path, loss, counts, message):
  records.write(tmp_path / 'a.jsonl', graded.annotations(*counts))
  config = changed(section(folders, loss), data__records=str(tmp_path / 'a.jsonl'))
  with pytest.raises(schema.ConfigError, match=f'a.jsonl: {message} right; fix: annotate with more samples'):
    preference.build(config, CONTEXT)


def test_kto_reads_what_makes_no_pairs(folders, tmp_path):
  records.write(tmp_path / 'a.jsonl', graded.annotations((2, 0), (0, 3)))
  config = changed(section(folders, 'kto'), data__records=str(tmp_path / 'a.jsonl'))
  assert np.all(preference.build(config, CONTEXT).source.next(None, 0).weights == 1)


def test_microbatches_of_a_coupled_loss_are_refused_at_the_start(folders, tmp_path):
  with pytest.raises(schema.ConfigError, match=r'config\.microbatches=2, but the baseline of kto is a mean over'):
    run(section(folders, 'kto'), tmp_path, microbatches=2)
