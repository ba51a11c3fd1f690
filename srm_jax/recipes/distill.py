"""Distillation on a data set: divergence between next-token distributions, and hidden states.

  loss = (1 / N) sum_t [ w_ce CE_t + w_kd D(p_t, q_t) ] + (w_h / (N L)) sum_t sum_l F(h_student^l W_l, h_teacher^g(l))

p teacher, q student, N supervised tokens of the global batch, L mapped layers, W_l trained and dropped after.
Left out: T^2 unless `scale_by_squared_temperature`; attention relations; several teachers.
Reference: Hinton et al., arXiv:1503.02531; Romero et al., FitNets, arXiv:1412.6550; Sun et al., Patient KD,
arXiv:1908.09355.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from srm_jax import schema, sharding
from srm_jax.losses import cross_entropy, lm_head
from srm_jax.losses.distillation import DIVERGENCES
from srm_jax.losses.features import FEATURES
from srm_jax.models import heads
from srm_jax.recipes.context import BatchConfig, Context, DataConfig, dataset, forward, load_teacher
from srm_jax.recipes.sft import count_tokens
from srm_jax.types import Mean, Objective, Recipe


@dataclasses.dataclass(frozen=True)
class HiddenConfig:
  """Hidden-state matching; weight 0 switches it off.

  layers: which teacher layer each student layer follows: 'skip' spreads evenly, 'last' aligns the tops, 'final' only
  the last.
  """

  weight: float
  feature: str
  layers: str


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """cross_entropy and divergence are weights; options go to the divergence (beta, alpha)."""

  cross_entropy: float
  weight: float
  divergence: str
  options: Mapping[str, Any]
  temperature: float
  scale_by_squared_temperature: bool
  hidden: HiddenConfig
  head_chunk: int | None


@dataclasses.dataclass(frozen=True)
class DistillConfig:
  name: str
  teacher: str
  data: DataConfig
  batch: BatchConfig
  loss: LossConfig


def _skip(student: int, teacher: int):
  return [(l, max(1, round((l + 1) * teacher / student)) - 1) for l in range(student)]


def _last(student: int, teacher: int):
  return [(l, teacher - student + l) for l in range(max(0, student - teacher), student)]


def _final(student: int, teacher: int):
  return [(student - 1, teacher - 1)]


LAYER_MAPS = {'skip': _skip, 'last': _last, 'final': _final}


def layer_map(name: str, student: int, teacher: int) -> list[tuple[int, int]]:
  """(student layer, teacher layer) pairs of a named map."""
  return schema.choose('hidden.layers', name, LAYER_MAPS)(student, teacher)


def _token_loss(loss: LossConfig):
  divergence = schema.bind('divergence', loss.divergence, loss.options, DIVERGENCES)
  scale = loss.temperature**2 if loss.scale_by_squared_temperature else 1.0

  def fn(student_logits, teacher_logits, targets, *, axis_name):
    gap = divergence(student_logits, teacher_logits, temperature=loss.temperature, axis_name=axis_name)
    nll = cross_entropy.cross_entropy(student_logits, targets, axis_name=axis_name)
    return loss.cross_entropy * nll + loss.weight * scale * gap, {'cross_entropy': nll, loss.divergence: gap}

  return fn


def _hidden_total(feature, pairs, student, teacher, projectors, mask):
  teacher = jax.lax.stop_gradient(teacher)
  gaps = (feature(student[s], teacher[t], projector=projectors[str(s)]) for s, t in pairs)
  return sum(jnp.sum(jnp.where(mask > 0, gap, 0.0) * mask) for gap in gaps)


def objective(loss: LossConfig, student, teacher) -> Objective:
  """Divergence (and hidden-state) objective on a batch, wherever it came from.

  Args:
    loss: section `recipe.loss`.
    student, teacher: TransformerConfigs.
  """
  token_loss = _token_loss(loss)
  feature = schema.choose('hidden.feature', loss.hidden.feature, FEATURES)
  pairs = layer_map(loss.hidden.layers, student.num_layers, teacher.num_layers)
  taps = ('hidden',) if loss.hidden.weight else ()
  rows = min(student.vocab_size, teacher.vocab_size)  # what lies beyond is padding of one of the two

  def terms(params, batch, frozen, rng):
    del rng
    batch = getattr(batch, 'batch', batch)  # rollouts carry their batch
    ours = forward(student, params['model'], batch, taps=taps)
    theirs = jax.lax.stop_gradient(forward(teacher, frozen['teacher'], batch, taps=taps))
    total, aux = lm_head.reduced(
        token_loss, lm_head.Head(ours.hidden, heads.unembedding(params['model'], rows)), batch.targets,
        batch.loss_mask, teacher=lm_head.Head(theirs.hidden, heads.unembedding(frozen['teacher'], rows)),
        chunk=loss.head_chunk, mesh=sharding.current_mesh(),
    )
    count = count_tokens(batch)
    found, metrics = {'tokens': (1.0, total)}, {name: Mean(value, count) for name, value in aux.items()}
    if taps:
      gap = _hidden_total(
          feature, pairs, ours.taps['hidden'], theirs.taps['hidden'], params['projectors'], batch.loss_mask,
      )
      found['hidden'] = (loss.hidden.weight, gap)
    return found, metrics

  def denominators(batch):
    count = count_tokens(getattr(batch, 'batch', batch))
    return {'tokens': count, 'hidden': count * len(pairs)} if taps else {'tokens': count}

  return Objective(terms, denominators, _resolved(loss, pairs))


def _resolved(loss: LossConfig, pairs):
  options = ''.join(f', {key}={value}' for key, value in loss.options.items())
  divergence = f'{loss.divergence}(T={loss.temperature:g}{options})'
  resolved = {
      'loss': f'{loss.cross_entropy:g} cross-entropy + {loss.weight:g} {divergence}',
      'denominator': 'supervised tokens of the global batch', 'mask': 'completion and end-of-text',
  }
  if loss.hidden.weight:
    resolved['hidden'] = f'{loss.hidden.weight:g} {loss.hidden.feature} over layers {pairs}'
  return resolved


def projectors(loss: LossConfig, student, teacher):
  """rng -> {'projectors': {student layer: [Ds, Dt]}}; None where no hidden state is matched."""
  if not loss.hidden.weight:
    return None

  def make(rng):
    pairs = layer_map(loss.hidden.layers, student.num_layers, teacher.num_layers)
    keys = jax.random.split(rng, len(pairs))
    return {
        'projectors': {
            str(s): heads.init_projector(key, student.embed_dim, teacher.embed_dim) for key, (s, _) in zip(keys, pairs)
        }
    }

  return make


def build(section, context: Context) -> Recipe:
  """Opens config.recipe for distillation on a data set."""
  config = schema.parse(DistillConfig, section, 'config.recipe')
  teacher = load_teacher(config.teacher, context)
  return Recipe(
      objective(config.loss, context.model, teacher.config), dataset(config.data, config.batch, context),
      {'teacher': (teacher.config, teacher.params)}, projectors(config.loss, context.model, teacher.config),
  )
