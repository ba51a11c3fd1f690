"""A term of every kind and of every entry of the registries, each with its weight and rows, and what they run on."""

import functools

import jax
import numpy as np

from configs import base
from srm_jax import schema
from srm_jax.losses.distillation import DIVERGENCES
from srm_jax.losses.features import BATCH_FEATURES, FEATURES
from srm_jax.losses.on_policy_distillation import TEACHER_ADVANTAGES
from srm_jax.losses.relations import RELATIONS
from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import distill
from srm_jax.train_step import value_and_grad
from tests import tiny
from tests.recipes import dense

STUDENT = TransformerConfig(64, 2, 16, 2, 2, 8, 32)
TEACHER = TransformerConfig(72, 3, 24, 2, 1, 12, 32, tie_embeddings=False)  # 8 rows of padding in its vocabulary
STEP, TEMPERATURE = 1, 0.8  # of all checks, and of sampling
SAMPLED = np.array([1, 0, 1, 1, 0, 1, 1, 0], np.float32)  # which rows the student wrote
jit_once = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})  # to compile is the work


def changing(start, end):
  return dict(name='linear', start=start, end=end, steps=4)


def now(value):
  """A section as it is at STEP, with numbers in the place of schedules."""
  if not isinstance(value, dict):
    return value
  if value.get('name') == 'linear':
    return value['start'] + (value['end'] - value['start']) * STEP / 4
  return {key: now(one) for key, one in value.items()}


def policy(weight, advantage, reward_weight, **options):
  return base.policy(advantage, weight, rows='samples', reward_weight=reward_weight, **options)


def _terms():
  rows = ['all', 'data', 'samples']
  terms = {'cross_entropy': base.term('cross_entropy', changing(0.2, 0.6), rows='data')}
  for i, name in enumerate(DIVERGENCES):
    options = dict(dense.OPTIONS[name])
    if i % 3 == 0:
      options = {key: changing(value, 0.9) for key, value in options.items()}
    terms[name] = base.divergence(
        name, 0.2 + 0.1 * i if i % 2 else changing(0.5, 0.1), temperature=changing(3.0, 1.0) if i % 4 == 1 else 1.5,
        scaled=i % 2 == 1, rows=rows[i % 3], **options,
    )
  for i, name in enumerate(TEACHER_ADVANTAGES):
    terms[f'policy_{name}'] = policy(0.3 + i, name, 0.5 * i, discount=0.9)
  for i, name in enumerate(FEATURES):
    terms[f'hidden_{name}'] = base.hidden(name, 0.7 + i, layers=[[0, 1], [1, 2]]) | {'rows': rows[i % 3]}
  for i, name in enumerate(RELATIONS):
    options = {'relation_heads': 4} if name == 'minilm_v2' else {}
    terms[name] = base.term('relations', 0.9, rows=rows[i % 3], relation=name, layers=[[1, 2]], options=options)
  for name in BATCH_FEATURES:
    terms[name] = base.term('alignment', changing(0.4, 0.8), rows='data', feature=name, layers=[[0, 1], [1, 2]])
  return terms


TERMS = _terms()


def of_kinds(*kinds):
  return [name for name, term in TERMS.items() if term['kind'] in kinds]


def loss_config(names, *, chunk=None, rows=None):
  """The section of these terms; rows: of all of them, instead of their own."""
  section = base.loss(**{name: TERMS[name] | ({'rows': rows} if rows else {}) for name in names})
  section.head_chunk = chunk
  return schema.parse(distill.LossConfig, section, 'loss')


def setting():
  """(params with all projectors, the teacher's, rollouts of which every other row or so is data)."""
  init = jax.jit(transformer.init_params, static_argnums=0)
  student, teacher = (
      jax.tree.map(lambda x: 1.5 * x, init(config, jax.random.key(i))) for i, config in enumerate((STUDENT, TEACHER))
  )
  projectors = distill.projectors(loss_config(TERMS), STUDENT, TEACHER)(jax.random.key(2))
  return {'model': student, **projectors}, teacher, tiny.random_rollouts()._replace(sampled=SAMPLED)


def program(names, *, microbatches=1, chunk=None, rows=None):
  """(selector {term: number}, params, record, teacher, step) -> (loss, gradient, metrics) of the recipe with these
  terms, each counting its weight times the selector.
  """
  inner = distill.objective(loss_config(names, chunk=chunk, rows=rows), STUDENT, TEACHER, temperature=TEMPERATURE)

  @jit_once
  def run(selector, params, record, teacher, step):
    def prepare(record, step):
      prepared = inner.prepare(record, step)
      chosen = {name: selector.get(name, 0.0) * weights for name, weights in prepared.weights.items()}
      return prepared._replace(weights=chosen)

    return value_and_grad(
        inner._replace(prepare=prepare), params, record, {'teacher': teacher}, jax.random.key(0), step=step,
        microbatches=microbatches,
    )

  return functools.partial(run, step=np.int32(STEP))


def selected(names, *chosen):
  return {name: np.float32(name in chosen) for name in names}
