"""On-policy distillation: the student samples, the teacher's distribution corrects every token that it visited.

  loss = sum_i w_i / C_i  sum_t m_i,t D_i(p(. | x, y_<t), q(. | x, y_<t)),  y ~ q, no gradient through sampling

The terms are those of `distill`; rows='samples' and rows='data' tell them apart where both kinds of rows are there:

  mixing None      every step samples
  mix 'alternate'  a step samples with probability `fraction`, a number or a schedule, and else reads the data (GKD)
  mix 'both'       every batch holds rows of both (DistiLLM's and DistiLLM-2's contrast)

Left out: samples from a mixture of teacher and student (MiniLLM's), a replay buffer of samples.
Reference: Agarwal et al., GKD, arXiv:2306.13649; Gu et al., MiniLLM, arXiv:2306.08543; Ko et al., DistiLLM-2,
arXiv:2503.07067.
"""

import dataclasses
from typing import Any

import numpy as np

from srm_jax import schema, sharding
from srm_jax.losses.advantages import ADVANTAGES
from srm_jax.recipes import cached, distill, on_policy, schedules
from srm_jax.recipes.context import BatchConfig, Context, DataConfig, dataset, load_teacher
from srm_jax.recipes.policy_terms import PolicyTerm
from srm_jax.rollout import all_sampled, beside, from_data
from srm_jax.types import Objective, Recipe, Source


@dataclasses.dataclass(frozen=True)
class MixConfig:
  """mix: see the module. fraction: of the steps that sample ('alternate'). data, batch: what the other rows learn."""

  mix: str
  fraction: Any
  data: DataConfig
  batch: BatchConfig


@dataclasses.dataclass(frozen=True)
class OnPolicyDistillConfig:
  """data: whose prompts are sampled for. advantage: from ADVANTAGES, of the task's rewards, where a term reads them.
  mixing: rows that are not sampled; None where there are none.
  """

  name: str
  teacher: str
  data: DataConfig
  rollouts: on_policy.RolloutConfig
  loss: distill.LossConfig
  advantage: schema.ChoiceConfig
  mixing: MixConfig | None


def objective(loss: distill.LossConfig, student, teacher, *, temperature=1.0) -> Objective:
  """The objective of `distill` on Rollouts sampled at `temperature` (0 is greedy), with rollout metrics."""
  inner = distill.objective(loss, student, teacher, temperature=temperature or 1.0)

  def terms(params, prepared: distill.Prepared, frozen, rng):
    found, metrics = inner.terms(params, prepared, frozen, rng)
    return found, {**metrics, **on_policy.metrics(prepared.rollouts._replace(batch=prepared.batch))}

  resolved = {'mask': 'tokens that the student sampled, and data', 'sampling temperature': temperature}
  return inner._replace(terms=terms, resolved={**inner.resolved, **resolved})


def _alternate(mixing: MixConfig, sampled: Source, data: Source, seed: int):
  fraction = schedules.schedule(mixing.fraction, 'config.recipe.mixing.fraction')
  if not all(0 <= end <= 1 for end in schedules.ends(mixing.fraction)):
    raise schema.ConfigError(f'config.recipe.mixing.fraction is {mixing.fraction!r}; expected shares from 0 to 1')

  def draw(params, step: int):
    draws = float(np.random.default_rng((seed, step)).random()) < float(fraction(step))
    return all_sampled(sampled.next(params, step)) if draws else from_data(data.next(params, step))

  return draw


def _both(mixing: MixConfig, sampled: Source, data: Source, seed: int):
  del mixing, seed
  return lambda params, step: beside(sampled.next(params, step), data.next(params, step))


MIXES = {'alternate': _alternate, 'both': _both}


def _mixed(config: OnPolicyDistillConfig, sampled: Source, context: Context) -> Source:
  """The sampled source, with rows of data in between or beside."""
  if config.mixing is None:
    return sampled
  make = schema.choose('config.recipe.mixing.mix', config.mixing.mix, MIXES)
  data = dataset(config.mixing.data, config.mixing.batch, context)
  draw = make(config.mixing, sampled, data, context.seed)

  def get_state():
    return {'sampled': sampled.get_state(), 'data': {**data.get_state(), 'step': 0}}  # both follow the run's step

  def set_state(state):
    sampled.set_state(state['sampled'])
    data.set_state(state['data'])

  return Source(draw, get_state, set_state)


def _check_rows(config: OnPolicyDistillConfig, terms):
  """Raises ConfigError where a term counts rows that never come."""
  for name, one in terms.items():
    if config.mixing is None and one.config.rows == 'data':
      raise schema.ConfigError(f"loss.terms.{name}.rows='data', but all rows are sampled; fix: config.recipe.mixing")
    if isinstance(one.term, PolicyTerm) and config.mixing is not None and one.config.rows != 'samples':
      raise schema.ConfigError(f"loss.terms.{name} is of sampled tokens, and there are data too; fix: rows='samples'")


def build(section, context: Context) -> Recipe:
  """Opens config.recipe for on-policy distillation."""
  config = schema.parse(OnPolicyDistillConfig, section, 'config.recipe')
  otherwise = "a teacher of the student's tokenizer, or recipe 'cross_tokenizer', which reads a data set"
  teacher = load_teacher(config.teacher, context, otherwise=otherwise)
  terms = distill.open_terms(config.loss, context.model, teacher.config)
  _check_rows(config, terms)
  cached.check(terms, None, context.model.vocab_size)  # what the student samples is in no cache
  advantage = schema.bind(
      'advantage', config.advantage.name, config.advantage.options, ADVANTAGES, given=('valid',)
  )
  rewarded = any(isinstance(one.term, PolicyTerm) and one.term.rewarded for one in terms.values())
  drawn = on_policy.source(config.rollouts, config.data, context, advantage=advantage if rewarded else None)
  sampled = drawn._replace(next=lambda params, step: sharding.own_rows(drawn.next(params, step)))
  return Recipe(
      objective(config.loss, context.model, teacher.config, temperature=config.rollouts.temperature),
      _mixed(config, sampled, context),
      {'teacher': (teacher.config, teacher.params)}, distill.projectors(config.loss, context.model, teacher.config),
  )
