"""The objective of supervised fine-tuning against log-probabilities taken from the whole logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import sft
from tests import tiny

MODEL = TransformerConfig(64, 1, 16, 2, 2, 8, 32)


@pytest.fixture(scope='module')
def params():
  return {'model': jax.jit(transformer.init_params, static_argnums=0)(MODEL, jax.random.key(0))}


@pytest.fixture(scope='module')
def logits(params):
  batch = tiny.random_batch()
  model = functools.partial(
      transformer.Transformer(MODEL).apply, positions=batch.positions, segment_ids=batch.segment_ids,
  )
  return np.asarray(jax.jit(lambda params: model({'params': params}, batch.inputs).logits)(params['model']))


@pytest.mark.parametrize('head_chunk', [0, 24])
def test_the_loss_is_the_cross_entropy_of_supervised_targets(params, logits, head_chunk):
  batch, objective = tiny.random_batch(), sft.objective(MODEL, head_chunk=head_chunk)
  terms, metrics = jax.jit(objective.terms)(params, batch, {}, jax.random.key(0))
  logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  chosen = np.take_along_axis(logprobs, batch.targets[..., None], -1)[..., 0]
  np.testing.assert_allclose(terms['cross_entropy'][1], -(chosen * batch.loss_mask).sum(), rtol=1e-5)
  assert terms['cross_entropy'][0] == 1.0
  assert objective.denominators(batch) == {'cross_entropy': batch.loss_mask.sum()}
  right = (logits.argmax(-1) == batch.targets) * batch.loss_mask
  assert metrics['token_accuracy'].total == right.sum() and metrics['token_accuracy'].count == batch.loss_mask.sum()


def test_what_is_masked_has_no_influence(params):
  batch, objective = tiny.random_batch(), sft.objective(MODEL, head_chunk=0)
  terms = jax.jit(lambda batch: objective.terms(params, batch, {}, jax.random.key(0))[0]['cross_entropy'][1])
  masked = jnp.where(batch.loss_mask > 0, batch.targets, 63)
  assert terms(batch) == terms(batch._replace(targets=masked))


def test_the_resolved_loss_says_what_is_divided_by_what():
  assert 'supervised tokens' in sft.objective(MODEL, head_chunk=0).resolved['denominator']
