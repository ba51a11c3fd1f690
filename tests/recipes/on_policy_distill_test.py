"""On-policy distillation: the teacher corrects exactly the tokens that the student sampled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from srm_jax import schema
from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import distill, on_policy_distill
from tests import tiny

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
