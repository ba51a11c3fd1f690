"""Distillation: nothing to learn from oneself, every term and their sum against plain formulas, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from srm_jax import schema
from srm_jax.data import tokenizer
from srm_jax.losses.distillation import DIVERGENCES
from srm_jax.losses.features import FEATURES
from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import context, distill
from srm_jax.train_step import value_and_grad
from srm_jax.types import Rollouts
from tests import tiny
from tests.recipes import dense, every_term
from tests.recipes.every_term import STEP, STUDENT, TEACHER, TERMS, changing, jit_once, now, policy, selected
from tests.tiny import tiny_tasks  # noqa: F401

OTHER = TransformerConfig(64, 4, 24, 2, 2, 12, 32)


def loss_config(divergence='forward_kl', **options):
  return schema.parse(distill.LossConfig, base.distillation(divergence, **options), 'loss')


def terms_of(objective, params, batch, teacher):
  """({term: total}, metrics) of a batch at step 0."""
  found, metrics = objective.terms(params, objective.prepare(batch, 0), {'teacher': teacher}, None)
  assert all(weight == 1.0 for weight, _ in found.values())  # it is in the total
  return {name: total for name, (_, total) in found.items()}, metrics


@pytest.fixture(scope='module')
def params():
  return jax.jit(transformer.init_params, static_argnums=0)(STUDENT, jax.random.key(0))


@pytest.fixture(scope='module')
def totals(params):
  """{(divergence, teacher): (total, metrics)} of all divergences, with the student or a distorted copy as its
  teacher.
  """
  distorted = jax.tree.map(lambda x: x * 1.5 + 0.02, params)

  @jax.jit
  def run(params):
    return {
        (name, kind): terms_of(
            distill.objective(loss_config(name), STUDENT, STUDENT), {'model': params}, tiny.random_batch(), teacher,
        )
        for name in DIVERGENCES for kind, teacher in (('itself', params), ('another', distorted))
    }

  return {key: (float(terms['tokens']), metrics) for key, (terms, metrics) in run(params).items()}


@pytest.mark.parametrize('name', DIVERGENCES)
def test_a_student_that_equals_its_teacher_has_no_loss(totals, name):
  own, other = totals[name, 'itself'][0], totals[name, 'another'][0]
  assert abs(own) < 3e-6 < 2e-3 < other  # a mean of 39 tokens
  metrics = totals[name, 'another'][1]
  np.testing.assert_allclose(metrics[name].total / metrics[name].count, other, rtol=1e-5)
  assert metrics[name].count == tiny.random_batch().loss_mask.sum() and metrics['cross_entropy'].total > 0


def test_weights_temperature_and_rollouts(params):
  """loss = ce * cross-entropy + w T^2 divergence(T), means over supervised tokens; a Rollouts is read as its batch."""
  teacher = jax.tree.map(lambda x: x * 1.5 + 0.02, params)
  config = base.loss(
      kl=base.divergence('forward_kl', 0.5, temperature=2.0, scaled=True),
      plain=base.divergence(temperature=2.0, weight=0),
      ce=base.term('cross_entropy', 0.25),
  )
  objective = distill.objective(schema.parse(distill.LossConfig, config, 'loss'), STUDENT, STUDENT)
  run = jax.jit(lambda batch: terms_of(objective, {'model': params}, batch, teacher))
  batch = tiny.random_batch()
  terms, metrics = run(batch)
  mean = {name: float(value.total / value.count) for name, value in metrics.items()}
  np.testing.assert_allclose(terms['tokens'], 0.25 * mean['ce'] + 0.5 * 4 * mean['plain'], rtol=1e-5)
  np.testing.assert_allclose(mean['kl'], 4 * mean['plain'], rtol=1e-5)
  assert mean['cross_entropy'] == mean['ce']  # measured in any case
  rollouts = Rollouts(batch, np.zeros_like(batch.loss_mask))
  assert run(rollouts)[0]['tokens'] == terms['tokens']
  assert 'T=2' in objective.resolved['loss'] and 'T=2' in objective.resolved['measured']


@pytest.mark.parametrize('feature', FEATURES)
def test_hidden_states_by_hand(params, feature):
  """sum over mapped layers and supervised tokens of the feature distance, over tokens times layers."""
  config = loss_config(weight=0.0, hidden_weight=0.5, feature=feature, layers='skip')
  teacher = jax.jit(transformer.init_params, static_argnums=0)(OTHER, jax.random.key(1))
  trained = {'model': params, **distill.projectors(config, STUDENT, OTHER)(jax.random.key(2))}
  objective, batch = distill.objective(config, STUDENT, OTHER), tiny.random_batch()

  @jax.jit
  def run(trained, teacher):
    states = [
        context.forward(model, tree, batch, taps=('hidden',)).taps['hidden']
        for model, tree in ((STUDENT, trained['model']), (OTHER, teacher))
    ]
    return terms_of(objective, trained, batch, teacher)[0], *states

  terms, ours, theirs = run(trained, teacher)
  distances = [
      FEATURES[feature](ours[s], theirs[t], projector=trained['projectors']['hidden'][str(s)])
      for s, t in ((0, 1), (1, 3))
  ]
  expected = sum((np.asarray(distance) * batch.loss_mask).sum() for distance in distances)
  np.testing.assert_allclose(terms['hidden'], 0.5 * expected / (2 * batch.loss_mask.sum()), rtol=1e-5)
  assert {key: value.shape for key, value in trained['projectors']['hidden'].items()} == {'0': (16, 24), '1': (16, 24)}


def test_without_hidden_states_there_is_nothing_to_project():
  assert distill.projectors(loss_config(), STUDENT, OTHER) is None


def test_the_teacher_gets_no_gradient(params):
  objective = distill.objective(loss_config(hidden_weight=1.0, feature='fitnets'), STUDENT, STUDENT)
  projectors = {'hidden': {str(i): jnp.eye(16) for i in range(2)}}

  def loss(teacher):
    trained = {'model': params, 'projectors': projectors}
    return sum(terms_of(objective, trained, tiny.random_batch(), teacher)[0].values())

  grads = jax.jit(jax.grad(loss))(jax.tree.map(lambda x: x * 1.1, params))
  assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(grads))


# Every term, and their sum, against plain formulas: no sweep over the lm head, no masks or counts made beforehand.


def plain_terms(record, teacher):
  """params -> {term: its mean over its own rows}."""
  rows = {'all': np.ones(8), 'data': 1 - record.sampled, 'samples': record.sampled}
  taps = ('hidden', 'q', 'k', 'v')
  logits, seen = jax.jit(lambda tree: dense.outputs(TEACHER, tree, record.batch, taps))(teacher)
  theirs = (logits[..., :64], seen)
  sampled = np.asarray(dense.logprobs(theirs[0] / every_term.TEMPERATURE, record.batch.targets))

  def means(params):
    ours, found = dense.outputs(STUDENT, params['model'], record.batch, taps), {}
    for name, term in TERMS.items():
      mask = record.batch.loss_mask * rows[term['rows']][:, None].astype(np.float32)
      values = dense.term_values(
          now(term), record, mask, ours, theirs, params['projectors'].get(name), sampled,
          temperature=every_term.TEMPERATURE,
      )
      found[name] = jnp.sum(jnp.where(mask > 0, values, 0.0)) / np.sum(mask) if values.ndim else values
    return found

  return means


@pytest.fixture(scope='module')
def mixed():
  return every_term.setting()


@pytest.fixture(scope='module')
def found(mixed):
  """(chosen terms, step) -> (loss, gradient, metrics) of the recipe."""
  params, teacher, record = mixed
  run = every_term.program(TERMS)
  return lambda *chosen, step=np.int32(STEP): run(selected(TERMS, *chosen), params, record, teacher, step=step)


@pytest.fixture(scope='module')
def expected(mixed):
  """({term: mean}, {term: its gradient})."""
  params, teacher, record = mixed
  means = plain_terms(record, teacher)
  return jit_once(lambda params: (means(params), jax.jacrev(means)(params)))(params)


def assert_close(actual, wanted):
  norm = optax.tree.norm(wanted)
  assert norm > 1e-3
  assert optax.tree.norm(jax.tree.map(jnp.subtract, actual, wanted)) < 1e-5 * norm


@pytest.mark.parametrize('name', TERMS)
def test_every_term_is_its_plain_formula(found, expected, name):
  """Value and gradient: weight at the step, over the tokens of the term's own rows."""
  loss, gradient, metrics = found(name)
  weight = now(TERMS[name]['weight'])
  np.testing.assert_allclose(loss, weight * expected[0][name], rtol=1e-5)
  assert_close(gradient, jax.tree.map(lambda x: weight * x, expected[1][name]))
  np.testing.assert_allclose(metrics[name].total / metrics[name].count, expected[0][name], rtol=1e-5)


def test_the_loss_is_the_sum_of_the_terms(found, expected, mixed):
  loss, gradient, metrics = found(*TERMS)
  weights = [now(term['weight']) for term in TERMS.values()]
  weighted = lambda *terms: sum(weight * term for weight, term in zip(weights, terms, strict=True))
  np.testing.assert_allclose(loss, weighted(*(expected[0][name] for name in TERMS)), rtol=1e-5)
  assert_close(gradient, jax.tree.map(weighted, *(expected[1][name] for name in TERMS)))
  mask, sampled = mixed[2].batch.loss_mask, mixed[2].sampled[:, None]
  counts = {'all': mask.sum(), 'data': (mask * (1 - sampled)).sum(), 'samples': (mask * sampled).sum()}
  assert len(set(counts.values())) == 3
  for name, term in TERMS.items():
    assert metrics[name].count == (1 if term['kind'] == 'alignment' else counts[term['rows']]), name


def test_schedules_follow_the_step(found):
  """At the ends of what changes: cross-entropy goes from 0.2 to 0.6."""
  (first, _, one), (last, _, _) = (found('cross_entropy', step=np.int32(step)) for step in (0, 9))
  mean = one['cross_entropy'].total / one['cross_entropy'].count
  np.testing.assert_allclose([first, last], [0.2 * mean, 0.6 * mean], rtol=1e-5)


# What cannot be run is said when the config is opened.

HERE = r'loss\.terms\.x'


@pytest.mark.parametrize('terms, message', [
    (dict(x=base.term('kl')), rf"{HERE}\.kind 'kl' unknown; choose from \['alignment', 'cross_entropy', 'divergence'"),
    (dict(x=base.divergence(rows='sample')), rf"{HERE}\.rows 'sample' unknown \(did you mean 'samples'"),
    (dict(x=5), rf'{HERE} is 5; expected a section'),
    (dict(x=dict(kind='divergence')), rf'{HERE}\.weight is missing'),
    (dict(x=base.divergence() | dict(wait=1)), rf"{HERE}\.wait: key 'wait' unknown"),
    (dict(x=base.divergence() | dict(options=1)), rf'{HERE}\.options is 1 \(int\); expected Mapping'),
    (dict(x=base.divergence(weight=True)), rf'{HERE}\.weight is True; give a number'),
    (dict(x=base.divergence(weight='1')), rf"{HERE}\.weight is '1'; give a number"),
    (dict(x=base.divergence(weight=changing(1.0, 'a'))), rf"{HERE}\.weight\.end is 'a'; expected a number"),
    (dict(x=base.divergence(weight=0)), r"loss\.terms \['cross_entropy', 'x'\] have no weight; nothing would be"),
    (dict(x=base.divergence(weight=changing(0, 0.0))), r"loss\.terms .* have no weight"),
    (dict(), r"loss\.terms \['cross_entropy'\] have no weight"),
    *[
        ({name: base.hidden()}, rf"loss\.terms\.{name}: a run reports something else as '{name}'")
        for name in distill.TAKEN
    ],
])
def test_terms_that_cannot_be_are_refused(terms, message):
  with pytest.raises(schema.ConfigError, match=message):
    distill.open_terms(schema.parse(distill.LossConfig, base.loss(**terms), 'loss'), STUDENT, TEACHER)


@pytest.mark.parametrize('name', TERMS)
def test_only_some_terms_do_without_a_teacher(name):
  loss = schema.parse(distill.LossConfig, base.loss(x=TERMS[name]), 'loss')
  if TERMS[name]['kind'] in distill.WITHOUT_TEACHER:
    assert distill.open_terms(loss, STUDENT, None)
    return
  with pytest.raises(schema.ConfigError, match=rf"{HERE}: '\w+' needs a teacher"):
    distill.open_terms(loss, STUDENT, None)


BYTES = TransformerConfig(258, 1, 16, 2, 2, 8, 32, max_length=64)
CONTEXT = context.Context(BYTES, tokenizer.load('byte'), 1, 10)


def build(teacher, **terms):
  return distill.build(base.distill(teacher, tiny.data(), tiny.batch(), base.loss(**terms)), CONTEXT)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
  return tiny.write_model(tmp_path_factory.mktemp('teacher'), BYTES)


@pytest.mark.parametrize('term, rows', [
    (policy(1.0, 'reverse_kl', 0.0), 'samples'), (base.divergence(rows='samples'), 'samples'),
    (policy(1.0, 'minillm', 0.0) | {'rows': 'all'}, 'all'),
])
def test_a_data_set_has_no_samples(term, rows, teacher):
  message = rf"{HERE} counts what the student samples \(kind '{term['kind']}', rows '{rows}'\).*'on_policy_distill'"
  with pytest.raises(schema.ConfigError, match=message):
    build(teacher, x=term, y=base.divergence())
  assert build(teacher, x=base.divergence(rows='data'), y=base.divergence()).objective.indivisible == ''


def test_a_teacher_of_other_tokens_is_sent_to_another_recipe(tmp_path):
  texts = [tiny.SUMS.prompt(problem) + tiny.SUMS.solution(problem) for problem in tiny.SUMS.problems('train')]
  pieces = tokenizer.train_sentencepiece(texts, tmp_path / 'tokenizer.model', vocab_size=275)
  teacher = tiny.write_model(tmp_path / 'teacher', dataclasses.replace(BYTES, vocab_size=275), tokenizer=pieces)
  message = rf"teacher {teacher} has tokenizer .* of 275 pieces, the student byte of 258; .*recipe 'cross_tokenizer'"
  with pytest.raises(schema.ConfigError, match=message):
    build(teacher, x=base.divergence())


def test_a_batch_that_is_coupled_is_not_split(mixed, tmp_path):
  section = base.loss(near=base.term('alignment', feature='linear_cka', layers='final'), kl=base.divergence())
  objective = distill.objective(schema.parse(distill.LossConfig, section, 'loss'), STUDENT, TEACHER)
  message = r"microbatches=2, but the terms \['near'\] see the whole batch at once; fix: microbatches=1"
  with pytest.raises(ValueError, match=message):
    value_and_grad(objective, mixed[0], mixed[2], {}, jax.random.key(0), microbatches=2)


def test_a_coupled_term_without_rows_is_not_measured(mixed):
  """Where a batch holds none of its rows it adds nothing, and its mean over steps does not count the batch."""
  params, teacher, record = mixed
  section = base.loss(near=base.term('alignment', rows='data', feature='linear_cka', layers='final'))
  objective = distill.objective(schema.parse(distill.LossConfig, section, 'loss'), STUDENT, TEACHER)
  run = jax.jit(lambda record: terms_of(objective, params, record, teacher))
  terms, metrics = run(record._replace(sampled=np.ones(8, np.float32)))
  assert terms['near'] == 0 and metrics['near'] == (0, 0)
  terms, metrics = run(record)
  assert terms['near'] == pytest.approx(float(metrics['near'].total), rel=1e-6)  # two sums of one program
  assert terms['near'] > 0 and metrics['near'].count == 1
