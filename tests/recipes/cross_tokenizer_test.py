"""Across tokenizers: with one tokenizer it is plain distillation, with two the student learns the teacher's chunks."""

import jax
import numpy as np
import pytest

from configs import base
from srm_jax import schema
from srm_jax.data import tokenizer as tokenizers
from srm_jax.losses import distillation
from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import cross_tokenizer
from srm_jax.recipes.context import Context
from srm_jax.train import train
from srm_jax.train_step import value_and_grad
from tests import tiny
from tests.tiny import one_device, tiny_tasks  # noqa: F401  (fixtures)

STUDENT = TransformerConfig(258, 1, 16, 2, 2, 8, 32, max_length=64)
TEACHER = TransformerConfig(280, 2, 24, 2, 2, 12, 32, max_length=64)
ALL = dict(cross_entropy=0.5, chunk=1.0, shared=0.7, uld=0.3)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Teachers with the student's tokenizer, and with another one."""
  folder = tmp_path_factory.mktemp('teachers')
  texts = [tiny.SUMS.prompt(problem) + tiny.SUMS.solution(problem) for problem in tiny.SUMS.problems('train')]
  other = tokenizers.train_sentencepiece(texts, folder / 'pieces.model', vocab_size=276, symbols=('#### ',))
  return {
      'same': tiny.write_model(folder / 'same', STUDENT, seed=3, scale=2.0),
      'other': tiny.write_model(folder / 'other', TEACHER, seed=3, scale=2.0, tokenizer=other),
  }


def recipe(folder, *, rows=4, length=48, packing='plan', **options):
  section = base.cross_tokenizer(
      folder, tiny.data(), tiny.batch(rows, length, packing), teacher_length=40, **{**ALL, **options}
  )
  return cross_tokenizer.build(section, Context(STUDENT, tokenizers.load('byte'), 1, 10))


@pytest.fixture(scope='module')
def params():
  return {'model': jax.jit(transformer.init_params, static_argnums=0)(STUDENT, jax.random.key(0))}


def run(made, params, batch, *, microbatches=1):
  frozen = {name: tree for name, (_, tree) in made.frozen.items()}
  step = jax.jit(lambda *args: value_and_grad(made.objective, *args, jax.random.key(0), microbatches=microbatches))
  return step(params, batch, frozen)


def test_with_one_tokenizer_it_is_forward_kl_on_every_token(folders, params):
  made = recipe(folders['same'], cross_entropy=0.0, chunk=0.0, shared=1.0, uld=0.0)
  batch = made.source.next(None, 0)
  loss, _, metrics = run(made, params, batch)
  logits = [
      transformer.Transformer(config).apply(
          {'params': tree}, batch.batch.inputs, positions=batch.batch.positions, segment_ids=batch.batch.segment_ids
      ).logits
      for config, tree in ((STUDENT, params['model']), made.frozen['teacher'])
  ]
  mask = batch.batch.loss_mask
  expected = np.sum(distillation.forward_kl(*logits) * mask) / mask.sum()
  # What is not shared (padding's id) is one more outcome; both models give it next to nothing.
  np.testing.assert_allclose(loss, expected, rtol=2e-2)
  assert metrics['exact_groups'].total == metrics['exact_groups'].count == mask.sum()


def test_microbatches_change_nothing(folders, params):
  made = recipe(folders['other'])
  batch = made.source.next(None, 0)
  (whole, grads, _), (split, parts, _) = (run(made, params, batch, microbatches=count) for count in (1, 4))
  np.testing.assert_allclose(split, whole, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), grads, parts)
  assert {name for name, value in made.objective.denominators(batch).items() if value > 0} == set(ALL)


def test_gradients_are_those_of_finite_differences(folders, params):
  made = recipe(folders['other'])
  batch = made.source.next(None, 0)
  _, grads, _ = run(made, params, batch)
  norm = jax.numpy.sqrt(sum(jax.numpy.sum(x**2) for x in jax.tree.leaves(grads)))
  direction = jax.tree.map(lambda x: x / norm, grads)
  step = 3e-3
  ends = [run(made, jax.tree.map(lambda x, d: x + sign * step * d, params, direction), batch)[0] for sign in (1, -1)]
  expected = sum(float(jax.numpy.sum(g * d)) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction)))
  np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), expected, rtol=2e-2)


def test_a_student_learns_a_teacher_of_another_tokenizer(folders, tmp_path):
  section = base.cross_tokenizer(
      folders['other'], tiny.data(), tiny.batch(4, 48), teacher_length=40, cross_entropy=0.1, chunk=1.0,
      chunk_loss='k2', shared=1.0,
  )
  made = tiny.train(section, num_steps=60, overfit_one_batch=True, learning_rate=1e-2)
  rows = train(made, tmp_path).metrics
  assert rows[-1]['chunk'] < 0.2 * rows[0]['chunk'] and rows[-1]['shared'] < 0.5 * rows[0]['shared']


def test_resume_wants_the_same_texts_on_both_sides(folders):
  made = recipe(folders['other'])
  state = made.source.get_state()
  recipe(folders['other']).source.set_state(state)
  with pytest.raises(ValueError, match='data_hash'):
    recipe(folders['same']).source.set_state(state)


@pytest.mark.parametrize('options, message', [
    (dict(chunk_loss='k4'), "chunk_loss 'k4' unknown"), (dict(divergence='kl'), "divergence 'kl' unknown"),
    (dict(temperature=0.0), r'temperature=0 must be positive'), (dict.fromkeys(ALL, 0.0), 'nothing would be learnt'),
    (dict(chunk_options=dict(heat=1.0)), "'heat' unknown"),
    (dict(chunk_options=dict(temperature=0.0)), 'chunk_options: temperature 0.0 of binary_kl must be positive'),
    (dict(chunk_options=dict(temperature=float('nan'))), 'temperature nan of binary_kl must be positive'),
    (dict(chunk_options=dict(temperature='a')), 'chunk_options: '),
    (dict(uld=1.0, temperature=float('nan')), 'temperature=nan must be positive'),
])
def test_what_cannot_be_run_is_a_config_error(folders, options, message):
  with pytest.raises(schema.ConfigError, match=message):
    recipe(folders['other'], **options)
