"""Layers against plain formulas, which layer follows which, what is learnt beside the model, and what does not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from srm_jax.losses.features import BATCH_FEATURES, FEATURES
from srm_jax.losses.relations import RELATIONS
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import layer_terms
from srm_jax.recipes.layer_terms import LAYER_TERMS
from srm_jax.schema import ConfigError
from tests import tiny
from tests.recipes import dense

STUDENT = TransformerConfig(64, 2, 16, 2, 2, 8, 32)
TEACHER = TransformerConfig(64, 4, 24, 2, 1, 12, 32)
RELATION_OPTIONS = {'minilm': {}, 'minilm_v2': {'relation_heads': 4}}


@pytest.fixture(scope='module')
def setting():
  """(student's taps, teacher's taps, batch), random; the last row is padding."""
  rng, batch = np.random.default_rng(0), tiny.random_batch()
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)

  def taps(config):
    at = (config.num_layers, *batch.inputs.shape)
    heads = lambda count: normal(*at, count, config.head_dim)
    return {
        'hidden': normal(*at, config.embed_dim), 'q': heads(config.num_heads), 'k': heads(config.num_kv_heads),
        'v': heads(config.num_kv_heads),
    }

  return taps(STUDENT), taps(TEACHER), batch


def build(term, student=STUDENT, teacher=TEACHER):
  return LAYER_TERMS[term['kind']](term['options'], 'loss.terms.x.options', student, teacher)


def relations(name='minilm_v2', layers='final', **options):
  return base.term('relations', relation=name, layers=layers, options={**RELATION_OPTIONS.get(name, {}), **options})


def assert_alike(setting, term, plain, projectors=None):
  """Values under the mask, and gradients of their sum, are those of the plain formula; the teacher gets none."""
  ours, theirs, batch = setting
  opened = build(term)
  mask = batch.loss_mask

  def total(fn):
    def value(ours, projectors, theirs):
      values = fn(ours, theirs, projectors)
      return jnp.sum(jnp.where(mask > 0, values, 0.0) if values.ndim else values), values

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))

  own = lambda ours, theirs, projectors: opened.fn(ours, jax.lax.stop_gradient(theirs), projectors, batch, mask)
  tapped = lambda model: {name: model[name] for name in opened.taps}  # it reads what it says, and nothing else
  (_, values), gradient = total(own)(tapped(ours), projectors, tapped(theirs))
  (_, expected), plain_gradient = total(plain)(tapped(ours), projectors, tapped(theirs))
  keep = mask > 0 if expected.ndim else ...
  np.testing.assert_allclose(values[keep], expected[keep], rtol=1e-5)
  assert np.all(np.abs(expected[keep]) > 1e-3)
  for left, right in zip(jax.tree.leaves(gradient), jax.tree.leaves(plain_gradient), strict=True):
    np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)
  assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))
  assert opened.coupled == (expected.ndim == 0)


@pytest.mark.parametrize('feature', FEATURES)
def test_hidden_states_through_projectors(setting, feature):
  """The mean over pairs of layers, each with its own projector."""
  term = base.hidden(feature, layers='skip')
  projectors = build(term).init(jax.random.key(0))
  assert {key: value.shape for key, value in projectors.items()} == {'0': (16, 24), '1': (16, 24)}
  assert np.abs(projectors['0'] - projectors['1']).max() > 0.1

  def plain(ours, theirs, projectors):
    gaps = [
        dense.FEATURES[feature](ours['hidden'][s] @ projectors[str(s)], theirs['hidden'][t])
        for s, t in ((0, 1), (1, 3))
    ]
    return (gaps[0] + gaps[1]) / 2

  assert_alike(setting, term, plain, projectors)


@pytest.mark.parametrize('feature', FEATURES)
def test_hidden_states_without_projector(setting, feature):
  ours, _, batch = setting
  term = base.hidden(feature, layers=[(1, 0)], projector='none')
  opened = build(term, STUDENT, STUDENT)
  assert opened.init is None
  values = opened.fn(ours, ours, None, batch, batch.loss_mask)
  np.testing.assert_allclose(values, dense.FEATURES[feature](ours['hidden'][1], ours['hidden'][0]), rtol=1e-5)


@pytest.mark.parametrize('name', RELATIONS)
def test_relations(setting, name):
  batch = setting[2]
  layer = lambda taps, number: tuple(taps[tap][number] for tap in 'qkv')

  def plain(ours, theirs, projectors):
    del projectors
    gaps = [
        dense.RELATIONS[name](layer(ours, s), layer(theirs, t), batch.segment_ids, **RELATION_OPTIONS[name])
        for s, t in ((0, 0), (1, 2))
    ]
    return (gaps[0] + gaps[1]) / 2

  assert_alike(setting, relations(name, layers=[(0, 0), (1, 2)]), plain)


@pytest.mark.parametrize('feature', BATCH_FEATURES)
def test_alignment(setting, feature):
  batch = setting[2]

  def plain(ours, theirs, projectors):
    del projectors
    pairs = [(ours['hidden'][s], theirs['hidden'][t]) for s, t in ((0, 2), (1, 3))]
    return sum(dense.BATCH_FEATURES[feature](*pair, batch.loss_mask) for pair in pairs) / 2

  assert_alike(setting, base.term('alignment', feature=feature, layers='last'), plain)


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
  assert layer_terms.layer_map([[2, 0], [0, 11]], 3, 12) == [(2, 0), (0, 11)]  # as JSON gives them


def test_terms_say_what_they_are():
  assert build(base.hidden()).spoken == 'cosine of hidden states over layers [(0, 1), (1, 3)]'
  assert build(relations()).spoken == 'minilm_v2 relations over layers [(1, 3)]'
  assert build(base.term('alignment', feature='linear_cka', layers='final')).spoken == 'linear_cka over layers [(1, 3)]'


def test_there_is_a_test_of_every_kind():
  assert LAYER_TERMS.keys() == {'hidden', 'relations', 'alignment'}
  assert RELATION_OPTIONS.keys() == RELATIONS.keys()


HERE = r'loss\.terms\.x\.options'


@pytest.mark.parametrize('layers, message', [
    ('frist', rf"{HERE}\.layers 'frist' unknown; choose from \['final', 'last', 'skip'\]"),
    ([(2, 0)], rf'{HERE}\.layers pairs layer 2 of the student with layer 0 of the teacher; they have 2 and 4'),
    ([(0, 4)], rf'{HERE}\.layers pairs layer 0 of the student with layer 4 of the teacher; they have 2 and 4'),
    ([(-1, 0)], rf'{HERE}\.layers pairs layer -1 of the student'),
    ([(0, 0), (0, 1)], rf'{HERE}\.layers=\[\(0, 0\), \(0, 1\)\] must name at least one layer of the student, each'),
    ([], rf'{HERE}\.layers=\[\] must name at least one layer'),
    ([0, 1], rf'{HERE}\.layers is \[0, 1\]; give pairs'),
    ([(0, 1, 2)], rf'{HERE}\.layers is \[\(0, 1, 2\)\]; give pairs'),
    ([(0.5, 1)], rf'{HERE}\.layers is \[\(0\.5, 1\)\]; give pairs'),
    (2, rf'{HERE}\.layers is 2; give pairs'),
    (None, rf'{HERE}\.layers is None; give pairs'),
])
@pytest.mark.parametrize('make', [
    lambda layers: base.hidden(layers=layers), lambda layers: relations(layers=layers),
    lambda layers: base.term('alignment', feature='linear_cka', layers=layers),
])
def test_layers_that_are_not_there_are_refused(make, layers, message):
  with pytest.raises(ConfigError, match=message):
    build(make(layers))


MORE_HEADS = dataclasses.replace(TEACHER, num_heads=3)


@pytest.mark.parametrize('term, teacher, message', [
    (base.hidden('cosin'), TEACHER, rf"{HERE}\.feature 'cosin' unknown \(did you mean 'cosine'"),
    (base.hidden('linear_cka'), TEACHER, rf"{HERE}\.feature 'linear_cka' unknown"),
    (base.hidden(projector='linear'), TEACHER, rf"{HERE}\.projector 'linear' unknown .*from \['learned', 'none'\]"),
    (base.hidden(projector='none'), TEACHER,
     rf"{HERE}\.projector='none', but the student is 16 wide and the teacher 24; fix: 'learned'"),
    (base.term('hidden', feature='cosine', layers='skip'), TEACHER, rf'{HERE}\.projector is missing'),
    (relations('minilm_v3'), TEACHER, rf"{HERE}\.relation 'minilm_v3' unknown"),
    (relations(relation_head=4), TEACHER, r"'relation_head' unknown \(did you mean 'relation_heads'"),
    (base.term('relations', relation='minilm_v2', layers='final', options={}), TEACHER,
     r"'minilm_v2' needs the options \['relation_heads'\]"),
    (relations(relation_heads=3), TEACHER, rf'{HERE}: relation_heads 3 of minilm_v2 does not divide the width 16'),
    (relations(relation_heads=8), TEACHER, rf'{HERE}: relation_heads 8 of minilm_v2 does not divide the width 12'),
    (relations(relation_heads=0), TEACHER, rf'{HERE}: relation_heads 0 of minilm_v2'),
    (relations(relation_heads=2.0), TEACHER, rf'{HERE}: '),
    (relations(relation_heads='2'), TEACHER, rf'{HERE}: '),
    (relations(block=0), TEACHER, rf'{HERE}: block 0 of a relation'),
    (relations('minilm'), MORE_HEADS, rf'{HERE}: minilm compares .* the student has 2 heads and the teacher 3'),
    (base.term('alignment', feature='cosine', layers='final'), TEACHER, rf"{HERE}\.feature 'cosine' unknown"),
    (base.term('alignment', feature='linear_cka', layers='final', projector='none'), TEACHER,
     rf"{HERE}\.projector: key 'projector' unknown"),
])
def test_what_the_models_do_not_fit_is_refused(term, teacher, message):
  with pytest.raises(ConfigError, match=message):
    build(term, teacher=teacher)
