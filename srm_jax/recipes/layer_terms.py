"""Terms of a loss that compare layers of student and teacher: hidden states, relations between tokens, alignment."""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from srm_jax import schema
from srm_jax.losses.features import BATCH_FEATURES, FEATURES
from srm_jax.losses.relations import QKV, RELATIONS
from srm_jax.models import heads
from srm_jax.models.config import TransformerConfig
from srm_jax.types import Batch


class LayerTerm(NamedTuple):
  """How two models' layers differ.

  fn(student taps, teacher taps, projectors, batch, mask [B, T]) -> [B, T], or a scalar where `coupled`; the mean over
  pairs of layers. taps: what it reads of both models. init(rng) -> its projectors {student layer: [Ds, Dt]}, or None.
  """

  fn: Callable[..., Any]
  taps: tuple[str, ...]
  init: Callable[[Any], Mapping[str, Any]] | None
  coupled: bool
  spoken: str


@dataclasses.dataclass(frozen=True)
class HiddenConfig:
  """feature: from FEATURES. layers: a name in LAYER_MAPS, or pairs ((student, teacher), ...) counted from 0.

  projector: 'learned' maps the student's width to the teacher's and is dropped after; 'none' needs equal widths.
  """

  feature: str
  layers: Any
  projector: str


@dataclasses.dataclass(frozen=True)
class RelationsConfig:
  """relation: from RELATIONS, with its options (relation_heads of minilm_v2)."""

  relation: str
  layers: Any
  options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class AlignmentConfig:
  """feature: from BATCH_FEATURES, which see all tokens of the batch at once."""

  feature: str
  layers: Any


def _skip(student: int, teacher: int):
  return [(l, max(1, round((l + 1) * teacher / student)) - 1) for l in range(student)]


def _last(student: int, teacher: int):
  return [(l, teacher - student + l) for l in range(max(0, student - teacher), student)]


def _final(student: int, teacher: int):
  return [(student - 1, teacher - 1)]


LAYER_MAPS = {'skip': _skip, 'last': _last, 'final': _final}
PROJECTORS = ('learned', 'none')


def layer_map(layers: str | Sequence, student: int, teacher: int, where: str = 'layers') -> list[tuple[int, int]]:
  """(student layer, teacher layer) pairs: of a named map, or as given.

  'skip' spreads the student's layers evenly, 'last' aligns the tops, 'final' takes the last layer alone.

  Raises:
    ConfigError: neither a known name nor pairs, a layer that one of the models does not have, or one of the student
      twice.
  """
  if isinstance(layers, str):
    return schema.choose(where, layers, LAYER_MAPS)(student, teacher)
  try:
    pairs = [(operator.index(s), operator.index(t)) for s, t in layers]
  except (TypeError, ValueError) as error:
    raise schema.ConfigError(
        f'{where} is {layers!r}; give pairs ((student, teacher), ...) or a name from {sorted(LAYER_MAPS)}'
    ) from error
  for s, t in pairs:
    if not (0 <= s < student and 0 <= t < teacher):
      raise schema.ConfigError(
          f'{where} pairs layer {s} of the student with layer {t} of the teacher; they have {student} and {teacher}, '
          'counted from 0'
      )
  if not pairs or len({s for s, _ in pairs}) < len(pairs):
    raise schema.ConfigError(f'{where}={pairs} must name at least one layer of the student, each once')
  return pairs


def _hidden(options, where, student: TransformerConfig, teacher: TransformerConfig) -> LayerTerm:
  config = schema.parse(HiddenConfig, options, where)
  feature = schema.choose(f'{where}.feature', config.feature, FEATURES)
  schema.choose(f'{where}.projector', config.projector, dict.fromkeys(PROJECTORS))
  pairs = layer_map(config.layers, student.num_layers, teacher.num_layers, f'{where}.layers')
  learned = config.projector == 'learned'
  if not learned and student.embed_dim != teacher.embed_dim:
    raise schema.ConfigError(
        f"{where}.projector='none', but the student is {student.embed_dim} wide and the teacher {teacher.embed_dim}; "
        "fix: 'learned'"
    )

  def fn(ours, theirs, projectors, batch, mask):
    del batch, mask
    gaps = [
        feature(ours['hidden'][s], theirs['hidden'][t], projector=projectors[str(s)] if learned else None)
        for s, t in pairs
    ]
    return sum(gaps) / len(gaps)

  def init(rng):
    keys = jax.random.split(rng, len(pairs))
    made = (heads.init_projector(key, student.embed_dim, teacher.embed_dim) for key in keys)
    return {str(s): projector for (s, _), projector in zip(pairs, made)}

  spoken = f'{config.feature} of hidden states over layers {pairs}'
  return LayerTerm(fn, ('hidden',), init if learned else None, False, spoken)


def _relations(options, where, student, teacher) -> LayerTerm:
  config = schema.parse(RelationsConfig, options, where)
  relation = schema.bind(f'{where}.relation', config.relation, config.options, RELATIONS)
  pairs = layer_map(config.layers, student.num_layers, teacher.num_layers, f'{where}.layers')

  def fn(ours, theirs, projectors, batch: Batch, mask):
    del projectors, mask
    layer = lambda taps, number: QKV(*(taps[name][number] for name in ('q', 'k', 'v')))
    gaps = [relation(layer(ours, s), layer(theirs, t), batch.segment_ids) for s, t in pairs]
    return sum(gaps) / len(gaps)

  _try(relation, student, teacher, where)
  return LayerTerm(fn, ('q', 'k', 'v'), None, False, f'{config.relation} relations over layers {pairs}')


def _try(relation, student, teacher, where):
  """Traces a relation on the models' shapes, so that head counts that do not fit are found before anything compiles."""

  def taps(config):
    heads_of = lambda count: jax.ShapeDtypeStruct((1, 2, count, config.head_dim), 'float32')
    return QKV(heads_of(config.num_heads), heads_of(config.num_kv_heads), heads_of(config.num_kv_heads))

  try:
    jax.eval_shape(relation, taps(student), taps(teacher), jax.ShapeDtypeStruct((1, 2), 'int32'))
  except (TypeError, ValueError) as error:
    raise schema.ConfigError(f'{where}: {error}') from error


def _alignment(options, where, student, teacher) -> LayerTerm:
  config = schema.parse(AlignmentConfig, options, where)
  feature = schema.choose(f'{where}.feature', config.feature, BATCH_FEATURES)
  pairs = layer_map(config.layers, student.num_layers, teacher.num_layers, f'{where}.layers')

  def fn(ours, theirs, projectors, batch, mask):
    del projectors, batch
    gaps = [feature(ours['hidden'][s], theirs['hidden'][t], mask) for s, t in pairs]
    return sum(gaps) / len(gaps)

  return LayerTerm(fn, ('hidden',), None, True, f'{config.feature} over layers {pairs}')


LAYER_TERMS: dict[str, Callable[..., LayerTerm]] = {
    'hidden': _hidden,
    'relations': _relations,
    'alignment': _alignment,
}
