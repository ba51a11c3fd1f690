"""On-policy distillation: the teacher corrects exactly the tokens that the student sampled, alone or among data, and
every composed loss can be driven down.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from srm_jax import schema
from srm_jax.data import tokenizer
from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import distill, on_policy, on_policy_distill
from srm_jax.recipes.context import BatchConfig, Context, DataConfig
from srm_jax.schema import ConfigError
from srm_jax.train import train
from srm_jax.train_step import combine
from srm_jax.types import Mean, Source
from tests import tiny
from tests.tiny import one_device, tiny_tasks  # noqa: F401

MODEL = TransformerConfig(64, 1, 16, 2, 2, 8, 32)


@pytest.fixture(scope='module')
def run():
  """(student, teacher, rollouts) -> (loss terms, metrics, the terms of plain distillation on the same batch)."""
  loss = schema.parse(distill.LossConfig, base.distillation('reverse_kl'), 'loss')
  objective, plain = on_policy_distill.objective(loss, MODEL, MODEL), distill.objective(loss, MODEL, MODEL)

  @jax.jit
  def run(student, teacher, rollouts):
    params, frozen = {'model': student}, {'teacher': teacher}
    found = objective.terms(params, objective.prepare(rollouts, 0), frozen, None)
    return *found, plain.terms(params, plain.prepare(rollouts.batch, 0), frozen, None)[0]

  return run


@pytest.fixture(scope='module')
def params():
  return jax.jit(transformer.init_params, static_argnums=0)(MODEL, jax.random.key(0))


def test_it_is_the_divergence_on_sampled_tokens(run, params):
  rollouts = tiny.random_rollouts()
  teacher = jax.tree.map(lambda x: 1.5 * x, params)
  terms, metrics, plain = run(params, teacher, rollouts)
  assert terms['tokens'][1] == plain['tokens'][1] > 0
  assert {'reward', 'unscorable', 'completion_tokens', 'reverse_kl'} <= metrics.keys()
  assert metrics['reverse_kl'].count == rollouts.batch.loss_mask.sum()
  batch, first = rollouts.batch, (np.arange(8) < 4)[:, None]
  half = rollouts._replace(batch=batch._replace(loss_mask=batch.loss_mask * first))
  rest = rollouts._replace(batch=batch._replace(loss_mask=batch.loss_mask * ~first))
  parts = [run(params, teacher, part)[0]['tokens'][1] for part in (half, rest)]
  share = half.batch.loss_mask.sum() / batch.loss_mask.sum()
  np.testing.assert_allclose(share * parts[0] + (1 - share) * parts[1], terms['tokens'][1], rtol=1e-5)
  assert jnp.all(jnp.array(parts) > 0)


def test_a_student_that_equals_its_teacher_has_no_loss(run, params):
  assert abs(run(params, params, tiny.random_rollouts())[0]['tokens'][1]) < 3e-6


def test_the_resolved_loss_names_the_mask():
  loss = schema.parse(distill.LossConfig, base.distillation('reverse_kl'), 'loss')
  assert on_policy_distill.objective(loss, MODEL, MODEL).resolved['mask'] == 'tokens that the student sampled, and data'


# Rows of a data set in between, or beside.


def stub(make):
  """A source whose batch is a function of the step."""
  return Source(lambda params, step: make(step), lambda: {}, lambda state: None)


SAMPLED, DATA = stub(lambda step: tiny.random_rollouts(step)), stub(lambda step: tiny.random_batch(step + 1000, rows=4))


def draws(fraction, steps, *, seed=1):
  """Whether the steps sample, under mix 'alternate'."""
  data = schema.parse(DataConfig, tiny.data(), 'data')
  config = on_policy_distill.MixConfig('alternate', fraction, data, schema.parse(BatchConfig, tiny.batch(), 'batch'))
  next_batch = on_policy_distill.MIXES['alternate'](config, SAMPLED, DATA, seed)
  batches = [next_batch(None, step) for step in steps]
  for step, made in zip(steps, batches, strict=True):
    kind = made.sampled[0]
    assert np.all(made.sampled == kind)
    expected = tiny.random_rollouts(step).batch if kind else tiny.random_batch(step + 1000, rows=4)
    jax.tree.map(np.testing.assert_array_equal, made.batch, expected)
  return [bool(made.sampled[0]) for made in batches]


def test_which_steps_sample_is_a_function_of_seed_and_step():
  whole = draws(0.5, range(40))
  assert draws(0.5, range(25, 40)) == whole[25:] and draws(0.5, [7]) == [whole[7]]
  assert draws(0.5, range(40), seed=2) != whole
  assert all(high or not low for low, high in zip(draws(0.3, range(40)), draws(0.7, range(40))))


def test_the_share_of_steps_that_sample_follows_its_schedule():
  assert draws(0.0, range(20)) == [False] * 20 and draws(1.0, range(20)) == [True] * 20
  assert 0.2 < np.mean(draws(0.3, range(200))) < 0.4
  switch = dict(name='switch', start=0.0, end=1.0, steps=3)
  assert draws(switch, range(6)) == [False] * 3 + [True] * 3
  falling = draws(dict(name='linear', start=1.0, end=0.0, steps=200), range(240))
  assert sum(falling[:100]) > 60 > 40 > sum(falling[100:200]) > 0 == sum(falling[200:])


BYTES = TransformerConfig(258, 1, 16, 2, 2, 8, 32, max_length=64)
CONTEXT = Context(BYTES, tokenizer.load('byte'), 1, 10)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """The workdir of a teacher that is the student itself, with a distribution far from flat."""
  return tiny.write_model(tmp_path_factory.mktemp('teacher'), BYTES, scale=3.0)


@pytest.fixture(scope='module')
def student():
  tree = jax.jit(transformer.init_params, static_argnums=0)(BYTES, jax.random.key(0))
  return {'model': {**tree, 'embedding': tree['embedding'] * 3}}


def mixing(mix='both', fraction=0.5, **options):
  return base.mixing(tiny.data(**options), tiny.batch(), mix=mix, fraction=fraction)


def policy(rows='samples', **options):
  return base.policy(rows=rows, **options)


def build(folder, *, mixing=None, context=CONTEXT, rollouts=None, **terms):
  terms = terms or {'kl': base.divergence('reverse_kl')}
  section = base.on_policy_distill(
      folder, tiny.data('parity'), tiny.rollouts(**(rollouts or {})), base.loss(**terms), mixing=mixing
  )
  return on_policy_distill.build(section, context)


@pytest.fixture(scope='module')
def drawn(folder, student):
  """{mix: the batches of steps 0 to 5}; with rewards in one, and without in the other."""
  def batches(mix, **terms):
    source = build(folder, mixing=mixing(mix), **terms).source
    return [source.next(student, step) for step in range(6)]

  return {'alternate': batches('alternate'), 'both': batches('both', x=policy(reward_weight=1.0))}


@pytest.mark.parametrize('terms', [{}, {'x': policy(reward_weight=1.0)}])
def test_a_teacher_teaches_where_rewards_are_all_alike(terms, folder, student):
  """One sample a prompt is the quickstart's way: no two rewards of a group can differ."""
  source = build(folder, rollouts=dict(samples=1, patience=2), **terms).source
  for step in range(4):
    source.next(student, step)


@pytest.mark.parametrize('mix', on_policy_distill.MIXES)
def test_a_batch_is_drawn_again_from_its_step_and_the_state(mix, folder, student, drawn):
  terms = {'x': policy(reward_weight=1.0)} if mix == 'both' else {}
  first, again = (build(folder, mixing=mixing(mix), **terms).source for _ in range(2))
  first.next(student, 3)
  again.set_state(json.loads(json.dumps(first.get_state())))
  jax.tree.map(np.testing.assert_array_equal, again.next(student, 4), drawn[mix][4])
  assert first.get_state() == again.get_state()  # the step is the run's: nothing of it is kept
  other_seed = CONTEXT._replace(seed=2)
  for other in (build(folder, mixing=mixing(mix, count=11)), build(folder, context=other_seed, mixing=mixing(mix))):
    with pytest.raises(ValueError, match='data_hash|seed'):
      other.source.set_state(first.get_state())


def test_batches_that_alternate_have_one_structure(drawn):
  batches = drawn['alternate']
  kinds = [one.sampled.mean() for one in batches]
  assert set(kinds) == {0.0, 1.0}
  assert {one.batch.inputs.shape[0] for one, kind in zip(batches, kinds) if kind} == {8}
  assert {one.batch.inputs.shape for one, kind in zip(batches, kinds) if not kind} == {(4, 32)}
  assert len({str(jax.tree.structure(one)) for one in batches}) == 1
  assert len({str([leaf.dtype for leaf in jax.tree.leaves(one)]) for one in batches}) == 1


def test_batches_of_both_hold_rows_of_both(drawn):
  for made in drawn['both']:
    assert made.batch.inputs.shape == (12, 32) and made.sampled.sum() == 8
    data = made.sampled == 0
    assert np.all(made.group[data] == -1) and sorted(made.group[~data]) == [0] * 4 + [1] * 4
    assert not made.advantages[data].any() and made.batch.loss_mask[data].any(1).all()
  assert any(made.advantages.any() for made in drawn['both'])


def test_metrics_count_sampled_rows_alone():
  """Rewards that data rows might hold, too, reach nothing; batches of either kind merge."""
  rollouts = tiny.random_rollouts()
  expected = on_policy.metrics(rollouts)
  dirty = tiny.random_rollouts(3)._replace(sampled=np.zeros(8, np.float32))
  join = lambda *parts: jax.tree.map(lambda *x: np.concatenate(x), *parts)
  both = on_policy.metrics(join(rollouts._replace(sampled=np.ones(8, np.float32)), dirty))
  assert {name: tuple(map(float, value)) for name, value in both.items()} == {
      name: tuple(map(float, value)) for name, value in expected.items()
  }
  alone = on_policy.metrics(dirty)
  assert alone == {name: Mean(0, 0) for name in expected} and combine(alone, expected) == expected


@pytest.mark.parametrize('temperature', [1.0, 0.7, 0.0])
def test_sampled_tokens_are_scored_at_the_temperature_of_sampling(temperature, folder, student):
  """A teacher that is the student has no opinion of what it wrote."""
  recipe = build(folder, rollouts=dict(temperature=temperature), x=policy())
  rollouts = recipe.source.next(student, 0)
  frozen = {name: params for name, (_, params) in recipe.frozen.items()}
  run = jax.jit(lambda batch: recipe.objective.terms(student, recipe.objective.prepare(batch, 0), frozen, None)[1])
  metrics = run(rollouts)
  assert abs(metrics['x'].total) < 1e-4 * metrics['x'].count
  louder = rollouts._replace(sampler_logprobs=rollouts.sampler_logprobs - 0.1 * rollouts.batch.loss_mask)
  loss = run(louder)['x']
  assert float(loss.total / loss.count) == pytest.approx(-np.exp(0.1) * 0.1, rel=1e-3)
  assert recipe.objective.resolved['sampling temperature'] == temperature


TOP_K = base.term('top_k', name='forward_kl', policy='tail', options={})


@pytest.mark.parametrize('options, message', [
    (dict(x=base.divergence(rows='data')), r"loss\.terms\.x\.rows='data', but all rows are sampled; fix: config\."),
    (dict(x=policy('all'), mixing=mixing()), r"loss\.terms\.x is of sampled tokens, and there are data too; fix: row"),
    (dict(x=policy('data'), mixing=mixing('alternate')), r"loss\.terms\.x is of sampled tokens.*fix: rows='samples'"),
    (dict(x=policy(advantage='forward')), r"loss\.terms\.x\.options\.advantage 'forward' unknown"),
    (dict(x=TOP_K, mixing=mixing()), r"loss\.terms\.x: kind 'top_k' reads a teacher cache; fix: recipe 'distill'"),
    (dict(reward=policy()), r'loss\.terms\.reward: a run reports something else'),
    (dict(mixing=mixing('bot')), r"config\.recipe\.mixing\.mix 'bot' unknown \(did you mean 'both'"),
    (dict(mixing=mixing('alternate', 1.5)), r'config\.recipe\.mixing\.fraction is 1\.5; expected shares from 0 to 1'),
    (dict(mixing=mixing('alternate', dict(name='linear', start=1, end=-0.1, steps=2))), r'fraction is \{.*from 0 to 1'),
    (dict(mixing=mixing('alternate', True)), r'config\.recipe\.mixing\.fraction is True; give a number'),
    (dict(mixing=mixing('alternate', dict(name='linear', start=1.0))), r'schedule of config\.recipe\.mixing\.fraction'),
    (dict(mixing={**mixing(), 'share': 1}), r"config\.recipe\.mixing\.share: key 'share' unknown"),
    (dict(mixing=dict(mix='both')), r'config\.recipe\.mixing\.fraction is missing'),
    (dict(mixing='both'), r"config\.recipe\.mixing is 'both'; expected a section"),
    (dict(mixing=mixing(target='solutions')), r"data\.target 'solutions' unknown"),
])
def test_what_cannot_be_run_is_refused(options, message, folder):
  with pytest.raises(ConfigError, match=message):
    build(folder, **options)


def test_rewards_have_no_options_of_the_callers(folder):
  section = base.on_policy_distill(folder, tiny.data('parity'), tiny.rollouts(), base.loss(kl=base.divergence()))
  section.advantage.options = dict(valid=1)
  with pytest.raises(ConfigError, match=r"option of advantage 'group_relative' 'valid' unknown"):
    on_policy_distill.build(section, CONTEXT)


# Losses of several terms, trained.


def trained(recipe, workdir, **options):
  settings = dict(num_steps=50, learning_rate=0.01, model=dict(embed_dim=32, mlp_dim=64), seed=2) | options
  return train(tiny.train(recipe, **settings), workdir)


@pytest.fixture(scope='module')
def expert(tmp_path_factory):
  """A model that knows four examples by heart, so that its distributions are far from flat."""
  recipe = base.sft(tiny.data(count=4), tiny.batch())
  return str(trained(recipe, tmp_path_factory.mktemp('expert'), num_steps=150, learning_rate=0.02, seed=1).workdir)


@pytest.fixture(scope='module')
def beginner(tmp_path_factory):
  """A student that has seen the examples a few times: sampled tokens alone teach an untrained one very slowly."""
  recipe = base.sft(tiny.data(count=4), tiny.batch())
  return str(trained(recipe, tmp_path_factory.mktemp('beginner'), num_steps=20, learning_rate=0.02).workdir)


def composed(loss, **options):
  make = lambda teacher: base.on_policy_distill(
      teacher, tiny.data('parity', count=4), tiny.rollouts(), loss,
      mixing=base.mixing(tiny.data(count=4), tiny.batch(), **options) if options else None,
  )
  return make


COMPOSED = {  # name: (teacher -> recipe, {metric: to which part of its first value it falls})
    'gkd': (
        composed(base.loss(kl=base.divergence('jensen_shannon', beta=0.0)), mix='alternate',
                 fraction=dict(name='linear', start=0.2, end=0.8, steps=50)),
        dict(kl=0.1, cross_entropy=0.5),
    ),
    'distillm2': (
        composed(base.loss(up=base.divergence('skew_kl', 0.5, rows='data', alpha=0.1),
                           down=base.divergence('skew_reverse_kl', 0.5, rows='samples', alpha=0.1)), mix='both'),
        dict(up=0.5, down=0.5),
    ),
    'sampled tokens and rewards': (
        composed(base.loss(policy=policy(reward_weight=0.5), kl=base.divergence('reverse_kl', 0.0))), dict(kl=0.5),
    ),
    'minillm': (
        composed(base.loss(long=policy(advantage='minillm', surrogate='clipped'),
                           short=base.divergence('reverse_kl', rows='samples'),
                           cross_entropy=base.term('cross_entropy', 1.0, rows='data')), mix='both'),
        dict(long=0.3, short=0.3, cross_entropy=0.3),
    ),
    'minilm': (
        lambda teacher: base.distill(teacher, tiny.data(count=4), tiny.batch(), base.loss(relations=base.term(
            'relations', relation='minilm_v2', layers='final', options=dict(relation_heads=4)
        ))),
        dict(relations=0.1),
    ),
}


@pytest.mark.parametrize('name', COMPOSED)
def test_composed_losses_fall(name, expert, beginner, tmp_path):
  make, falls = COMPOSED[name]
  # After 50 steps some losses are in the middle of their fall, and where depends on the last bit.
  start = beginner if 'rewards' in name else ''
  rows = trained(make(expert), tmp_path, init_from=start, num_steps=75).metrics
  terms = make(expert).loss.terms.keys()
  assert {key for key in rows[0] if '/' not in key} <= {*terms, *distill.TAKEN}
  for metric, part in falls.items():
    values = [row[metric] for row in rows]
    assert np.nanmean(values[-8:]) < part * np.nanmean(values[:3]), (metric, values)
  if name == 'gkd':  # a step of data has no reward to speak of
    assert {math.isnan(row['reward']) for row in rows} == {True, False}
