"""On-policy distillation: the student samples, the teacher's distribution corrects every token that it visited.

  loss = (1 / N) sum over sampled tokens of D(p(. | x, y_<t), q(. | x, y_<t)),  y ~ q, no gradient through sampling

Left out: the lambda mix with data (use `distill`), rewards, sampled-token forms.
Reference: Agarwal et al., GKD, arXiv:2306.13649.
"""

import dataclasses

from srm_jax import schema
from srm_jax.recipes import distill, on_policy
from srm_jax.recipes.context import Context, DataConfig, load_teacher
from srm_jax.types import Objective, Recipe


@dataclasses.dataclass(frozen=True)
class OnPolicyDistillConfig:
  name: str
  teacher: str
  data: DataConfig
  rollouts: on_policy.RolloutConfig
  loss: distill.LossConfig


def objective(loss: distill.LossConfig, student, teacher) -> Objective:
  """The divergence objective on the batch of a Rollouts, with rollout metrics."""
  inner = distill.objective(loss, student, teacher)

  def terms(params, rollouts, frozen, rng):
    found, metrics = inner.terms(params, rollouts, frozen, rng)
    return found, {**metrics, **on_policy.metrics(rollouts)}

  return inner._replace(terms=terms, resolved={**inner.resolved, 'mask': 'tokens that the student sampled'})


def build(section, context: Context) -> Recipe:
  """Opens config.recipe for on-policy distillation."""
  config = schema.parse(OnPolicyDistillConfig, section, 'config.recipe')
  teacher = load_teacher(config.teacher, context)
  return Recipe(
      objective(config.loss, context.model, teacher.config),
      on_policy.source(config.rollouts, config.data, context, advantage=None),
      {'teacher': (teacher.config, teacher.params)}, distill.projectors(config.loss, context.model, teacher.config),
  )
