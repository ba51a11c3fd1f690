"""Distillation on a data set: a weighted sum of terms, each with its own rows, denominator and schedule.

  loss = sum_i w_i(step) / C_i  sum_t m_i,t D_i,t,  C_i = sum_t m_i,t over the global batch

D_i is a number of a token (cross-entropy, a divergence between next-token distributions) or of a layer (hidden states,
relations, alignment); m_i marks the supervised tokens of the term's rows: all, those of the data, or those that the
student sampled. All token terms share one sweep over the lm head, so a further term costs arithmetic, not memory.
Left out: T^2 unless `scale_by_squared_temperature`.
Reference: Hinton et al., arXiv:1503.02531; Romero et al., FitNets, arXiv:1412.6550; Sun et al., Patient KD,
arXiv:1908.09355; Wang et al., MiniLMv2, arXiv:2012.15828; Ko et al., DistiLLM, arXiv:2402.03898.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from srm_jax import schema, sharding
from srm_jax.losses import cross_entropy, lm_head
from srm_jax.models import heads
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import adaptive, cached, schedules, teachers
from srm_jax.recipes.context import ROWS, BatchConfig, Context, DataConfig, forward, load_teacher, parts_of
from srm_jax.recipes.layer_terms import LAYER_TERMS, LayerTerm
from srm_jax.recipes.policy_terms import POLICY_TERMS, PolicyTerm
from srm_jax.recipes.teachers import Teachers
from srm_jax.recipes.token_terms import TOKEN_TERMS, Tokens, TokenTerm
from srm_jax.types import Batch, Mean, Objective, Recipe, Rollouts

WITHOUT_TEACHER = ('cross_entropy', 'top_k')  # kinds
# What a run reports besides its terms, under names of their own; 'tokens' is all token terms together.
TAKEN = (
    'tokens', 'loss', 'grad_norm', 'finite', 'step', 'flops', 'seconds_per_step', 'reward', 'completion_tokens',
    'unscorable', 'truncated', 'length_right', 'length_wrong', 'pass_rate', 'zero_variance', 'drawn_tokens',
)


@dataclasses.dataclass(frozen=True)
class TermConfig:
  """kind: from TOKEN_TERMS, POLICY_TERMS or LAYER_TERMS. weight: a number or a schedule; at 0 it is only measured.

  rows: whose tokens it counts: 'all', those of the 'data', the 'samples' of the student, or the part of a mix that has
  this name. options: of the kind.
  """

  kind: str
  weight: Any
  rows: str
  options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """terms: {name: TermConfig}. head_chunk: tokens per step of the lm head; 0 forms all logits at once."""

  terms: Mapping[str, Any]
  head_chunk: int | None


@dataclasses.dataclass(frozen=True)
class DistillConfig:
  """teacher: a folder, '' where no term needs its parameters, or {name: TeacherConfig} of several. cache: folder of
  what one predicts, for terms `top_k`, or ''. adaptive: shares of a mix that follow the student, or None.
  """

  name: str
  teacher: Any
  cache: str
  data: DataConfig
  adaptive: adaptive.AdaptiveConfig | None
  batch: BatchConfig
  loss: LossConfig


class _Term(NamedTuple):
  """learnt: its weight is not 0 throughout."""

  config: TermConfig
  weight: schedules.Schedule
  term: TokenTerm | PolicyTerm | LayerTerm
  learnt: bool


class Prepared(NamedTuple):
  """A batch with what the terms need to know of the whole of it.

  weights: {term: [B, T]}, w_i(step) m_i / C_i. masks: {term: [B, T]}, m_i. numbers: {term: {option: [B, T]}}, the
  scheduled options, alike everywhere. known: {name: [B, T, ...]} of a cached teacher. rollouts: where they come from.
  """

  batch: Batch
  weights: Mapping[str, Any]
  masks: Mapping[str, Any]
  numbers: Mapping[str, Mapping[str, Any]]
  known: Mapping[str, Any]
  rollouts: Rollouts | None


def open_terms(
    loss: LossConfig, student: TransformerConfig, teacher: TransformerConfig | Teachers | None, *,
    sources: Sequence[str] = (),
) -> dict[str, _Term]:
  """The terms of a loss, checked against the models. sources: names of the parts of the data's mix.

  Raises:
    ConfigError: no term, a name that is taken, an unknown kind, name or option, or one that the models do not fit.
  """
  kinds, terms = {**TOKEN_TERMS, **POLICY_TERMS, **LAYER_TERMS}, {}
  teacher = _teachers(teacher)
  for name, section in loss.terms.items():
    where = f'loss.terms.{name}'
    if name in TAKEN:
      raise schema.ConfigError(f'{where}: a run reports something else as {name!r}; fix: another name for the term')
    config = schema.parse(TermConfig, section, where)
    build = schema.choose(f'{where}.kind', config.kind, kinds)
    schema.choose(f'{where}.rows', config.rows, dict.fromkeys((*ROWS, *sources)))
    if not teacher.configs and config.kind not in WITHOUT_TEACHER:
      raise schema.ConfigError(f"{where}: {config.kind!r} needs a teacher; fix: kind 'top_k' reads a cached one")
    if teacher.one is None and config.kind in LAYER_TERMS:
      raise schema.ConfigError(f'{where}: {config.kind!r} compares layers with those of one teacher, not of several')
    models = (student, teacher.one) if config.kind in LAYER_TERMS else ()
    term = build(config.options, f'{where}.options', *models)
    weight = schedules.schedule(config.weight, f'{where}.weight')
    terms[name] = _Term(config, weight, term, any(schedules.ends(config.weight)))
  if not any(one.learnt for one in terms.values()):
    raise schema.ConfigError(f'loss.terms {sorted(terms)} have no weight; nothing would be learnt')
  return terms


def _teachers(teacher: TransformerConfig | Teachers | None) -> Teachers:
  return teacher if isinstance(teacher, Teachers) else teachers.alone(teacher)


def objective(
    loss: LossConfig, student: TransformerConfig, teacher: TransformerConfig | Teachers | None, *, temperature=1.0,
    sources: Sequence[str] = (),
) -> Objective:
  """The weighted sum of terms on a batch, wherever it came from.

  Args:
    loss: section `recipe.loss`.
    student, teacher: configs; teacher None where only a cache of it is read, Teachers where there are several.
    temperature: at which the tokens of policy terms were sampled.
    sources: names of the parts of the data's mix.
  """
  teacher = _teachers(teacher)
  terms = open_terms(loss, student, teacher, sources=sources)
  token_terms, policy_terms, layer_terms = (_of(terms, kind) for kind in (TokenTerm, PolicyTerm, LayerTerm))
  taps = tuple(sorted({tap for one in layer_terms.values() for tap in one.term.taps}))
  coupled = [name for name, one in (policy_terms | layer_terms).items() if one.term.coupled]

  def prepare(record, step):
    return _prepare(terms, record, step, sources)

  def run(params, prepared: Prepared, frozen, rng):
    del rng
    ours = forward(student, params['model'], prepared.batch, taps=taps)
    theirs = {
        name: jax.lax.stop_gradient(forward(config, frozen[name], prepared.batch, taps=taps))
        for name, config in teacher.configs.items()
    }
    heads_of = _heads(student, teacher, params, frozen, ours, theirs)
    by_token, found, metrics = teachers.by_token(teacher, prepared.batch), {}, {}
    if token_terms:
      found['tokens'], metrics = _sweep(token_terms, prepared, heads_of, by_token, loss.head_chunk)
    if policy_terms:
      logprobs = _logprobs(prepared, heads_of, by_token, loss.head_chunk, temperature)
    for name, one in policy_terms.items():
      values = one.term.fn(logprobs['student'], logprobs['teacher'], prepared.rollouts, prepared.masks[name])
      found[name], metrics[name] = _totals(values, name, prepared)
    for name, one in layer_terms.items():
      own = params.get('projectors', {}).get(name)
      found[name], metrics[name] = _layers(one.term, name, prepared, ours.taps, *_taps(theirs), own)
    return {name: (1.0, total) for name, total in found.items()}, metrics

  def denominators(prepared):
    del prepared  # the weights are over their counts already
    return {name: jnp.ones(()) for name in (*(['tokens'] if token_terms else []), *policy_terms, *layer_terms)}

  indivisible = f'the terms {coupled} see the whole batch at once' if coupled else ''
  return Objective(run, denominators, _resolved(terms), prepare, indivisible)


def _of(terms: Mapping[str, _Term], kind: type) -> dict[str, _Term]:
  return {name: one for name, one in terms.items() if isinstance(one.term, kind)}


def _prepare(terms: Mapping[str, _Term], record, step, sources) -> Prepared:
  batch: Batch = getattr(record, 'batch', record)
  sampled = getattr(record, 'sampled', None)
  if sampled is None:
    sampled = jnp.full(batch.inputs.shape[:1], float(isinstance(record, Rollouts)))
  data = 1 - sampled[:, None]
  rows = {'all': jnp.ones_like(data), 'data': data, 'samples': 1 - data}
  rows |= {name: data * (batch.sources == place) for place, name in enumerate(sources)}
  masks = {name: batch.loss_mask * rows[one.config.rows] for name, one in terms.items()}
  weights = {
      name: one.weight(step) * masks[name] / jnp.maximum(jnp.sum(masks[name]), 1.0) for name, one in terms.items()
  }
  everywhere = lambda number: jnp.full(batch.loss_mask.shape, number, jnp.float32)
  numbers = {
      name: {key: everywhere(number(step)) for key, number in one.term.numbers.items()}
      for name, one in _of(terms, TokenTerm).items()
  }
  rollouts = record._replace(batch=None) if isinstance(record, Rollouts) else None  # its batch is there already
  known = {name: _supervised(batch.loss_mask, values) for name, values in getattr(record, 'known', {}).items()}
  return Prepared(batch, weights, masks, numbers, known, rollouts)


def _supervised(mask, values):
  """values [B, T, ...] with zeros where the mask is: what is not supervised was not asked for."""
  return jnp.where(mask.reshape(mask.shape + (1,) * (values.ndim - 2)) > 0, values, 0)


def _heads(student, teacher: Teachers, params, frozen, ours, theirs):
  """(Head of the student, Heads of the teachers), over the rows that all have; what lies beyond is padding."""
  rows = min(config.vocab_size for config in (student, *teacher.configs.values()))
  own = lm_head.Head(ours.hidden, heads.unembedding(params['model'], rows))
  return own, tuple(lm_head.Head(theirs[name].hidden, heads.unembedding(frozen[name], rows)) for name in theirs)


def _taps(theirs):
  """Of the one teacher that layer terms have."""
  return [output.taps for output in theirs.values()]


def _sweep(terms: Mapping[str, _Term], prepared: Prepared, heads_of, by_token, chunk):
  """(total, {term: Mean}) of all token terms."""
  learnt = [name for name, one in terms.items() if one.learnt]
  needs_teacher = any(one.term.teacher for one in terms.values())

  def token_loss(student_logits, teacher_logits, given, *, axis_name):
    values, teacher_logits = {}, teachers.combined(teacher_logits, given['teachers'], axis_name=axis_name)
    for name, one in terms.items():
      numbers = {key: value[0] for key, value in given['numbers'][name].items()}
      tokens = Tokens(student_logits, teacher_logits, given['targets'], numbers, given['known'], axis_name)
      values[name] = jnp.where(given['masks'][name] > 0, one.term.fn(tokens), 0.0)
    loss = sum(given['weights'][name] * values[name] for name in learnt)
    return (loss if learnt else jnp.zeros_like(next(iter(values.values())))), values

  given = {
      'targets': prepared.batch.targets, 'numbers': prepared.numbers, 'known': prepared.known,
      'weights': {name: prepared.weights[name] for name in terms},
      'masks': {name: prepared.masks[name] for name in terms}, 'teachers': by_token,
  }
  student, theirs = heads_of
  total, sums = lm_head.reduced(
      token_loss, student if learnt else jax.lax.stop_gradient(student), given, prepared.batch.loss_mask,
      teacher=theirs if needs_teacher else (), chunk=chunk, mesh=sharding.current_mesh(),
      split=not any(one.term.whole for one in terms.values()),
  )
  return total, {name: Mean(value, jnp.sum(prepared.masks[name])) for name, value in sums.items()}


def _logprobs(prepared: Prepared, heads_of, by_token, chunk, temperature):
  """{'student': [B, T], 'teacher': [B, T]} log-probabilities of the targets; gradients flow to the student."""

  def fn(student_logits, teacher_logits, given, *, axis_name):
    targets, by_token = given
    teacher_logits = teachers.combined(teacher_logits, by_token, axis_name=axis_name)
    logprobs = functools.partial(cross_entropy.token_logprobs, temperature=temperature, axis_name=axis_name)
    return {'student': logprobs(student_logits, targets), 'teacher': logprobs(teacher_logits, targets)}

  return lm_head.per_token(
      fn, heads_of[0], (prepared.batch.targets, by_token), teacher=heads_of[1], chunk=chunk,
      mesh=sharding.current_mesh(), split=True,
  )


def _totals(values, name: str, prepared: Prepared):
  """(total, Mean) of values [B, T]."""
  mask = prepared.masks[name]
  values = jnp.where(mask > 0, values, 0.0)
  return jnp.sum(values * prepared.weights[name]), Mean(jnp.sum(values * mask), jnp.sum(mask))


def _layers(term: LayerTerm, name: str, prepared: Prepared, ours, theirs, projectors):
  """(total, Mean) of one layer term."""
  gaps = term.fn(ours, jax.lax.stop_gradient(theirs), projectors, prepared.batch, prepared.masks[name])
  if term.coupled:
    any_row = jnp.any(prepared.masks[name] > 0).astype(jnp.float32)
    return gaps * jnp.sum(prepared.weights[name]), Mean(gaps * any_row, any_row)
  return _totals(gaps, name, prepared)


def _resolved(terms: Mapping[str, _Term]):
  def spoken(one):
    rows = '' if one.config.rows == 'all' else f' on {one.config.rows}'
    return f'{schedules.spoken(one.config.weight)} {one.term.spoken}{rows}'

  measured = [one.term.spoken for one in terms.values() if not one.learnt]
  resolved = {
      'loss': ' + '.join(spoken(one) for one in terms.values() if one.learnt),
      'denominator': "supervised tokens of the global batch, of each term's own rows",
      'mask': 'completion and end-of-text',
  }
  return {**resolved, **({'measured': ', '.join(measured)} if measured else {})}


def projectors(loss: LossConfig, student: TransformerConfig, teacher, *, sources: Sequence[str] = ()):
  """rng -> {'projectors': {term: {student layer: [Ds, Dt]}}}; None where no term has any."""
  terms = open_terms(loss, student, teacher, sources=sources)
  inits = {name: one.term.init for name, one in terms.items() if isinstance(one.term, LayerTerm) and one.term.init}
  if not inits:
    return None

  def make(rng):
    keys = jax.random.split(rng, len(inits)) if len(inits) > 1 else [rng]
    return {'projectors': {name: init(key) for key, (name, init) in zip(keys, inits.items())}}

  return make


def _check_rows(terms: Mapping[str, _Term]):
  """Raises ConfigError where a term counts rows that never come."""
  for name, one in terms.items():
    if isinstance(one.term, PolicyTerm) or one.config.rows == 'samples':
      raise schema.ConfigError(
          f'loss.terms.{name} counts what the student samples (kind {one.config.kind!r}, rows {one.config.rows!r}), '
          "and this recipe reads a data set; fix: recipe 'on_policy_distill'"
      )


def resident_teachers(config: DistillConfig) -> dict[str, str]:
  """{name among the frozen models: folder} of those whose parameters the terms read: none where a cache is enough."""
  where = 'loss.terms.{}'.format
  kinds = {schema.parse(TermConfig, section, where(name)).kind for name, section in config.loss.terms.items()}
  if config.cache and not isinstance(config.teacher, str):
    raise schema.ConfigError('config.recipe.cache is of one teacher, config.recipe.teacher names several')
  return {} if config.cache and kinds <= {*WITHOUT_TEACHER} else teachers.folders(config.teacher)


def _adapt(config: DistillConfig, context: Context, loaded):
  """What `dataset` is to do with the parts of a mix whose shares follow the student; None where they do not.

  Raises:
    ConfigError: there is no such mix, or not one teacher to measure the student by.
  """
  if config.adaptive is None:
    return None
  if not config.data.mix or config.data.count:
    raise schema.ConfigError('config.recipe.adaptive sets the shares of a mix; fix: data.mix with data.count=0')
  if len(loaded) != 1:
    raise schema.ConfigError(f'config.recipe.adaptive measures by one teacher; config.recipe.teacher has {len(loaded)}')
  (teacher,) = loaded.values()

  def adapt(parts):
    learnt, measured = adaptive.hold_out(parts, config.adaptive.held_out, seed=context.seed)
    return learnt, adaptive.shares(
        config.adaptive, measured, length=config.batch.length, student=context.model, teacher=teacher.config,
        teacher_params=teacher.params,
    )

  return adapt


def build(section, context: Context) -> Recipe:
  """Opens config.recipe for distillation on a data set."""
  config = schema.parse(DistillConfig, section, 'config.recipe')
  otherwise = "a teacher of the student's tokenizer, or recipe 'cross_tokenizer'"
  loaded = {
      name: load_teacher(folder, context, otherwise=otherwise) for name, folder in resident_teachers(config).items()
  }
  sources = tuple(parts_of(config.data))
  configs = {name: model.config for name, model in loaded.items()}
  models = (context.model, Teachers(configs, teachers.weights(config.teacher, sources)))
  terms = open_terms(config.loss, *models, sources=sources)
  _check_rows(terms)
  adapt = _adapt(config, context, loaded)
  source, there = cached.open_source(
      config.data, config.batch, context, config.cache, config.teacher, adapt=adapt
  )
  cached.check(terms, there, context.model.vocab_size)
  made = objective(config.loss, *models, sources=sources)
  return Recipe(
      made._replace(resolved={**made.resolved, **cached.spoken(there)}), source,
      {name: (model.config, model.params) for name, model in loaded.items()},
      projectors(config.loss, *models, sources=sources),
  )
