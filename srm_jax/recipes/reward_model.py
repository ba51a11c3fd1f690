"""Reward models: a scalar head on the student's hidden states, learnt from pairs of completions or from steps.

  outcome   - (1 / P) sum over pairs of log sigmoid(r(x, y+) - r(x, y-)) [+ c (r+ + r-)^2],  r read at the last token
  process   - (1 / S) sum over steps of y log sigmoid(s) + (1 - y) log(1 - sigmoid(s)),  s read where the step ends

P pairs, S steps of the global batch. y+ and y- are a right and a wrong completion of one problem; y is the share of a
student's continuations from the step that came out right ('soft'), or whether any did ('hard').
A batch's loss_mask marks the tokens that end a completion or a step, as targets like everywhere; their score is read at
the position after, where they have been read themselves.
Left out: margins, ties, all pairs of a problem (each completion is in one at least), a language-model loss beside.
Reference: Ouyang et al., InstructGPT, arXiv:2203.02155; Wang et al., Math-Shepherd, arXiv:2312.08935; Lightman et al.,
Let's Verify Step by Step, arXiv:2305.20050.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from srm_jax import schema
from srm_jax.data import packing, pipeline, records
from srm_jax.data.prompting import Prompting, prompt_ids
from srm_jax.data.steps import SEGMENTATIONS, Segmentation, tokens_at
from srm_jax.losses.reward_model import bradley_terry, process_bce
from srm_jax.models import heads
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes.context import (
    PLANS, BatchConfig, Context, DataConfig, annotations, forward, open_data,
)
from srm_jax.types import Batch, Mean, Objective, Params, Recipe, Source

HEAD = 'value_head'  # its name among the parameters
UNFILTERED = 'unfiltered_completion'


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
  """target: from TARGETS. data.records: annotations for 'outcome', labelled steps for 'process'; right and wrong ones.

  batch: of 'outcome', `size` pairs of rows. centering: c, of 'outcome'. labels: 'soft' or 'hard', of 'process', as is
  segmentation: how the steps end, where they were labelled and where they will be scored.
  """

  name: str
  target: str
  data: DataConfig
  batch: BatchConfig
  centering: float
  labels: str
  segmentation: str


class Compared(NamedTuple):
  """Pairs of completions, one a row: chosen and rejected, fields [B, T]; loss_mask is 1 where a completion ends."""

  chosen: Batch
  rejected: Batch

  @property
  def batch(self) -> Batch:
    """All rows, for what looks at rows alone."""
    return jax.tree.map(lambda *rows: jnp.concatenate(rows), self.chosen, self.rejected)


class Stepped(NamedTuple):
  """Packed completions; loss_mask is 1 where a step ends. labels: float32 [B, T], there."""

  batch: Batch
  labels: Any


def scores(model: TransformerConfig, params: Params, batch: Batch) -> jax.Array:
  """Float32 [B, T]: what the head says once the target of a position has been read."""
  hidden = forward(model, params['model'], batch).hidden
  return jnp.roll(heads.value(params[HEAD], hidden), -1, axis=1)  # no segment's last position has a target


def outcome_objective(config: RewardModelConfig, model: TransformerConfig) -> Objective:
  """Bradley-Terry on pairs of completions."""

  def terms(params, pairs: Compared, frozen, rng):
    del frozen, rng
    beside = lambda chosen, rejected: jnp.stack([chosen, rejected], 1).reshape(-1, chosen.shape[1])  # no row moves
    rows = jax.tree.map(beside, pairs.chosen, pairs.rejected)
    found = jnp.where(rows.loss_mask > 0, scores(model, params, rows), 0.0)
    chosen, rejected = jnp.sum(found, axis=1).reshape(-1, 2).T
    valid, count = _pairs(pairs), jnp.sum(_pairs(pairs))
    total = lambda values: jnp.sum(jnp.where(valid > 0, values, 0.0))
    metrics = {
        'accuracy': Mean(total((chosen > rejected).astype(jnp.float32)), count),
        'chosen_score': Mean(total(chosen), count), 'rejected_score': Mean(total(rejected), count),
    }
    return {'pairs': (1.0, total(bradley_terry(chosen, rejected, centering=config.centering)))}, metrics

  resolved = {
      'loss': f'Bradley-Terry, centering {config.centering:g}', 'denominator': 'pairs of the global batch',
      'mask': 'the last token of a completion',
  }
  return Objective(terms, lambda pairs: {'pairs': jnp.sum(_pairs(pairs))}, resolved)


def _pairs(pairs: Compared):
  """Float32 [B], 1 where both completions of a pair are there."""
  ended = [jnp.any(rows.loss_mask > 0, axis=1) for rows in pairs]
  return jnp.logical_and(*ended).astype(jnp.float32)


def process_objective(config: RewardModelConfig, model: TransformerConfig) -> Objective:
  """Binary cross-entropy on steps."""

  def terms(params, steps: Stepped, frozen, rng):
    del frozen, rng
    mask, found = steps.batch.loss_mask, scores(model, params, steps.batch)
    right = mask * (steps.labels >= 0.5)
    mean = lambda values, chosen: Mean(jnp.sum(jnp.where(chosen > 0, values, 0.0)), jnp.sum(chosen))
    probs = jax.nn.sigmoid(found)
    metrics = {
        'accuracy': mean(((found >= 0) == (steps.labels >= 0.5)).astype(jnp.float32), mask),
        'right_steps': Mean(jnp.sum(right), jnp.sum(mask)), 'right_score': mean(probs, right),
        'wrong_score': mean(probs, mask - right),
    }
    return {'steps': (1.0, jnp.sum(process_bce(found, steps.labels, mask)))}, metrics

  resolved = {
      'loss': f'binary cross-entropy on {config.labels} labels', 'denominator': 'labelled steps of the global batch',
      'mask': 'the token with which a step ends',
  }
  return Objective(terms, lambda steps: {'steps': jnp.sum(steps.batch.loss_mask)}, resolved)


def _read_at(example: packing.Example, places: Sequence[int]) -> packing.Example:
  """The example with its mask at some of its tokens."""
  return example._replace(loss_mask=np.isin(np.arange(len(example.tokens)), places))


def compared_annotations(annotations: Sequence[records.Annotation]) -> list[tuple[records.Annotation, ...]]:
  """Pairs (right, wrong) of distinct completions of a problem: each is in one at least, the fewer ones take turns."""
  groups: dict[str, dict[bool, dict[str, records.Annotation]]] = {}
  for one in annotations:
    if one.correct is not None:
      sides = groups.setdefault(one.problem.id, collections.defaultdict(dict))
      sides[one.correct].setdefault(one.completion, one)
  pairs = []
  for sides in groups.values():
    right, wrong = (list(sides[side].values()) for side in (True, False))
    count = max(len(right), len(wrong)) if right and wrong else 0
    pairs += [(right[i % len(right)], wrong[i % len(wrong)]) for i in range(count)]
  return pairs


def _outcome_source(config: RewardModelConfig, context: Context) -> Source:
  prompting = open_data(config.data, context.tokenizer)
  pairs = compared_annotations(annotations(config.data))
  if not pairs:
    raise schema.ConfigError(f'{config.data.records} has no problem with a right and a wrong completion to compare')

  def example(one):
    made = prompting.example(one.id, one.problem, one.completion, finished=one.finished)
    return _read_at(made, [len(made.tokens) - 1])

  sides = [[example(one) for one in side] for side in zip(*pairs)]
  longer = [max(pair, key=lambda one: len(one.tokens)) for pair in zip(*sides)]  # what must fit
  content = [[one.tokens for one in side] for side in sides]

  def lay_out(rows):
    return Compared(*(packing.lay_out(side, rows, config.batch.length) for side in sides))

  return _source(config, context, longer, content, lay_out)


def step_example(
    prompting: Prompting, tokenizer, labels: records.StepLabels, kind: str,
) -> tuple[packing.Example, dict[int, float]]:
  """(example with its mask where labelled steps end, {token: label}); of two steps in one token, the last."""
  one = labels.annotation
  made = prompting.example(one.id, one.problem, one.completion, finished=one.finished)
  start = len(prompt_ids(tokenizer, prompting.prompt(one.problem)))
  places = tokens_at(tokenizer, made.tokens[start:], one.completion, labels.ends)
  known = {start + i: LABELS[kind](rate) for i, rate in zip(places, labels.rates) if rate is not None}
  return _read_at(made, list(known)), known


def _process_source(config: RewardModelConfig, context: Context) -> Source:
  prompting = open_data(config.data, context.tokenizer)
  schema.choose('labels', config.labels, LABELS)
  made = [step_example(prompting, context.tokenizer, one, config.labels) for one in _step_labels(config)]
  made = [(example, known) for example, known in made if known]
  if not made:
    raise schema.ConfigError(f'{config.data.records} has no labelled step to learn from')
  examples, table, numbered = [example for example, _ in made], [0.0], []
  for example, known in made:  # labels are laid out by their numbers, as tokens are by their ids
    numbers = np.zeros(len(example.tokens), np.int32)
    numbers[list(known)] = len(table) + np.arange(len(known))
    table += known.values()
    numbered.append(example._replace(tokens=numbers))
  values = np.array(table, np.float32)

  def lay_out(rows):
    batch, found = (packing.lay_out(part, rows, config.batch.length) for part in (examples, numbered))
    return Stepped(batch, values[found.targets] * batch.loss_mask)

  return _source(config, context, examples, values, lay_out)


def _step_labels(config: RewardModelConfig) -> list[records.StepLabels]:
  data = config.data
  if not pathlib.Path(data.records).is_file():
    raise schema.ConfigError(f'data.records {data.records!r} does not exist; run experiments.process_labels first')
  if data.pass_rate is not None:
    raise schema.ConfigError(f'data.pass_rate {data.pass_rate} is of annotations; filter before labelling their steps')
  labels = records.read(data.records, records.StepLabels)
  others = {one.segmentation for one in labels} - {config.segmentation}
  if others:
    raise schema.ConfigError(
        f'data.records {data.records} has steps by {sorted(others)}, config.recipe.segmentation={config.segmentation!r}'
    )
  return labels


def _source(config: RewardModelConfig, context: Context, examples, content, assemble) -> Source:
  """content: what makes a batch beside the examples."""
  plan = schema.choose('batch.packing', config.batch.packing, PLANS)
  schedule = pipeline.Schedule(
      examples, batch_size=config.batch.size, length=config.batch.length, seed=context.seed, plan=plan
  )
  schedule.data_hash = records.content_hash([schedule.data_hash, content])
  return pipeline.scheduled_source(
      schedule, assemble=assemble, process_index=jax.process_index(), process_count=jax.process_count()
  )


class Target(NamedTuple):
  """objective(config, model) and source(config, context) of what a reward model learns."""

  objective: Any
  source: Any


def segmentation(section: Mapping[str, Any]) -> Segmentation | None:
  """How the steps end that a trained reward model scores, by its config.recipe; None where it scores completions."""
  return SEGMENTATIONS[section['segmentation']] if section['target'] == 'process' else None


def build(section, context: Context) -> Recipe:
  """Opens config.recipe for reward models."""
  config = schema.parse(RewardModelConfig, section, 'config.recipe')
  target = schema.choose('target', config.target, TARGETS)
  schema.choose('segmentation', config.segmentation, SEGMENTATIONS)
  if config.data.mix or config.data.target != UNFILTERED:
    raise schema.ConfigError(
        f'config.recipe.data: a reward model learns from right and wrong completions of one file; fix: no mix, '
        f'target={UNFILTERED!r}'
    )
  if config.target == 'outcome' and config.batch.packing != 'one_per_row':
    raise schema.ConfigError("config.recipe.batch.packing: pairs are not packed; fix: 'one_per_row'")
  return Recipe(
      target.objective(config, context.model), target.source(config, context), {}, extra_params(context.model)
  )


def extra_params(model: TransformerConfig):
  """rng -> {'value_head': ...}."""
  return lambda rng: {HEAD: heads.init_value_head(rng, model.embed_dim)}


LABELS = {'soft': lambda rate: rate, 'hard': lambda rate: float(rate > 0)}

TARGETS = {
    'outcome': Target(outcome_objective, _outcome_source), 'process': Target(process_objective, _process_source),
}
