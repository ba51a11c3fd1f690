"""Distillation: nothing to learn from oneself, which layer follows which, and what the hidden-state term divides by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from srm_jax import schema
from srm_jax.losses.distillation import DIVERGENCES
from srm_jax.losses.features import FEATURES
from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import context, distill, layer_terms
from srm_jax.types import Rollouts
from tests import tiny

STUDENT = TransformerConfig(64, 2, 16, 2, 2, 8, 32)
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
      kl=base.divergence('forward_kl', 0.5, temperature=2.0, scaled=True), plain=base.divergence(temperature=2.0, weight=0),
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


@pytest.mark.parametrize('name', layer_terms.LAYER_MAPS)
def test_layer_maps_stay_inside_and_end_at_the_top(name):
  for student in range(1, 9):
    for teacher in range(1, 9):
      pairs = layer_terms.layer_map(name, student, teacher)
      assert pairs[-1] == (student - 1, teacher - 1)
      assert all(0 <= s < student and 0 <= t < teacher for s, t in pairs), (student, teacher, pairs)
      assert pairs == sorted(set(pairs)) and len({s for s, _ in pairs}) == len(pairs)


def test_layer_maps_by_hand():
  assert layer_terms.layer_map('skip', 3, 12) == [(0, 3), (1, 7), (2, 11)]
  assert layer_terms.layer_map('last', 2, 4) == [(0, 2), (1, 3)]
  assert layer_terms.layer_map('last', 4, 2) == [(2, 0), (3, 1)]
  assert layer_terms.layer_map('final', 3, 12) == [(2, 11)]
  with pytest.raises(schema.ConfigError, match="layers 'frist' unknown"):
    layer_terms.layer_map('frist', 3, 12)


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
      FEATURES[feature](ours[s], theirs[t], projector=trained['projectors']['hidden'][str(s)]) for s, t in ((0, 1), (1, 3))
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
