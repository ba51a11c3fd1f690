"""Learning from preferences: of two completions the better one is to become likelier than the worse one.

  loss = sum_i w_i l(scores of the chosen one, scores of the rejected one) / sum_i w_i

l is from `losses.preference`; a score is the log-probability of a completion, and that of a frozen reference policy
where l compares with one. Pairs come from graded annotations, a right and a wrong completion of a problem, or from the
student as it learns (online DPO), the best and the worst of a group; groups without a difference have weight 0. kto
reads the same rows as desirable and undesirable completions, of annotations without regard to whose problem they are.

Left out: several epochs over one set of rollouts, a learned judge, a cross-entropy term beside DPO.
Reference: Rafailov et al., DPO, arXiv:2305.18290; online: Guo et al., Direct Language Model Alignment from Online AI
Feedback, arXiv:2402.04792. The losses name theirs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from srm_jax import schema, sharding
from srm_jax.data import pairs as pairing
from srm_jax.losses import cross_entropy, lm_head, preference
from srm_jax.losses.preference import PREFERENCES, REFERENCED, UNPAIRED, Scores
from srm_jax.models import heads
from srm_jax.recipes import on_policy
from srm_jax.recipes.context import BatchConfig, Context, DataConfig, annotations, forward, load_teacher, open_data
from srm_jax.types import Batch, Mean, Objective, Pairs, Recipe, Source


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
  """loss: from PREFERENCES. reference: workdir of the frozen policy, '' for losses that compare with none.

  Off-line data.records is a file of annotations, batch.size counts completions, two a pair, and per_problem bounds the
  pairs of a problem (of kto its right and its wrong completions); rollouts is None. Online batch is None, and
  rollouts.prompts is the number of pairs.
  """

  name: str
  data: DataConfig
  batch: BatchConfig | None
  rollouts: on_policy.RolloutConfig | None
  per_problem: int
  loss: schema.ChoiceConfig
  reference: str
  head_chunk: int | None


class Bound(NamedTuple):
  """A loss with its options: fn(chosen, rejected, **{'baseline': ...} where it is unpaired) -> values."""

  fn: Callable[..., Any]
  beta: float
  referenced: bool
  unpaired: bool


def open_loss(config: PreferenceConfig) -> Bound:
  """The loss of a config.

  Raises:
    ConfigError: an unknown name, an impossible option, a reference that is missing or that nothing reads.
  """
  name, options = config.loss.name, config.loss.options
  fn = schema.bind('loss', name, options, PREFERENCES, given=('baseline',))
  bound = Bound(fn, options['beta'], name in REFERENCED, name in UNPAIRED)
  if bound.referenced and not config.reference:
    raise schema.ConfigError(
        f'recipe.reference is empty, but {name} compares with a frozen policy; fix: the workdir of a model, such as '
        'config.init_from'
    )
  if config.reference and not bound.referenced:
    raise schema.ConfigError(f"recipe.reference={config.reference}, but {name} compares with none; fix: reference=''")
  one = np.zeros(1, np.float32)
  given = {'baseline': np.float32(0)} if bound.unpaired else {}
  try:  # traced on one pair, so that an impossible option is found when a config is opened
    jax.eval_shape(lambda: fn(*(Scores(one, one, one if bound.referenced else None),) * 2, **given))
  except (TypeError, ValueError) as error:
    raise schema.ConfigError(f'recipe.loss {name}: {error}') from error
  return bound


def token_logprobs(student_logits, teacher_logits, targets, *, temperature, axis_name):
  """Log-probability of every token of a completion."""
  del teacher_logits
  logprobs = cross_entropy.token_logprobs(student_logits, targets, temperature=temperature, axis_name=axis_name)
  return {'logprobs': logprobs}


def objective(config: PreferenceConfig, model, reference_model=None) -> Objective:
  """A preference loss on Pairs."""
  loss = open_loss(config)
  temperature = (config.rollouts.temperature if config.rollouts else 1.0) or 1.0
  fn = functools.partial(token_logprobs, temperature=temperature)

  def logprobs(model, params, batch):
    head = lm_head.Head(forward(model, params, batch).hidden, heads.unembedding(params))
    mesh = sharding.current_mesh()
    return lm_head.per_token(fn, head, batch.targets, chunk=config.head_chunk, mesh=mesh, split=True)['logprobs']

  def score(params, frozen, batch: Batch) -> Scores:
    reference = logprobs(reference_model, frozen['reference'], batch) if loss.referenced else None
    return preference.score(logprobs(model, params, batch), batch.loss_mask, reference)

  def terms(params, folded: Pairs, frozen, rng):
    del rng
    pairs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), folded)
    scores = score(params['model'], frozen, pairs.batch)
    chosen, rejected = (jax.tree.map(lambda x, side=side: x[side::2], scores) for side in (0, 1))
    weights, metrics, given = pairs.weights[::2], {}, {}
    if loss.unpaired:
      others = score(jax.lax.stop_gradient(params['model']), frozen, pairs.mismatched)
      given = {'baseline': preference.kl_baseline(others, pairs.weights)}
      metrics = {'baseline': Mean(given['baseline'], jnp.ones(()))}
    values = loss.fn(chosen, rejected, **given)
    total = _weighted(values, jnp.tile(weights, len(values) // len(weights)))
    return {'preference': (1.0, total)}, {**_metrics(chosen, rejected, weights, loss), **_online(pairs), **metrics}

  def denominators(folded: Pairs):
    return {'preference': jnp.sum(folded.weights if loss.unpaired else folded.weights[:, 0])}

  why = f'the baseline of {config.loss.name} is a mean over the batch' if loss.unpaired else ''
  return Objective(terms, denominators, _resolved(config, loss, temperature), lambda pairs, step: fold(pairs), why)


def fold(pairs: Pairs) -> Pairs:
  """Leaves [2 P, ...] -> [P, 2, ...], so that microbatches take whole pairs."""
  return jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), pairs)


def _weighted(values, weights):
  return jnp.sum(jnp.where(weights > 0, weights * values, 0.0))


def _metrics(chosen: Scores, rejected: Scores, weights, loss: Bound) -> dict:
  """What training is to move, as means over the pairs that count."""
  kind = 'log_ratio' if loss.referenced else 'mean_logprob'
  ours, theirs = (jax.lax.stop_gradient(preference.reward(scores)) for scores in (chosen, rejected))
  margin, count = loss.beta * (ours - theirs), jnp.sum(weights)
  found = {
      'margin': margin, 'accuracy': (margin > 0).astype(jnp.float32),
      f'chosen_{kind}': ours, f'rejected_{kind}': theirs,
      'chosen_tokens': chosen.lengths, 'rejected_tokens': rejected.lengths,
  }
  return {name: Mean(_weighted(values, weights), count) for name, values in found.items()}


def _online(pairs: Pairs) -> dict:
  """The mean reward of all samples, and the share of groups with a difference."""
  if pairs.rewards is None:
    return {}
  rows = jnp.asarray(len(pairs.weights), jnp.float32)
  return {'reward': Mean(jnp.sum(pairs.rewards), rows), 'informative': Mean(jnp.sum(pairs.weights), rows)}


def _resolved(config: PreferenceConfig, loss: Bound, temperature):
  online = 'the best and the worst of a group that the student sampled'
  offline = 'right and wrong annotations, of whatever problems' if loss.unpaired else 'right and wrong annotations'
  return {
      'loss': f'{config.loss.name} {dict(config.loss.options)}', 'reference': config.reference or 'none',
      'pairs': online if config.rollouts else offline, 'temperature': temperature,
      'denominator': f'{"completions" if loss.unpaired else "pairs"} of the global batch',
      'mask': 'completion and end-of-text',
  }


def _annotated(config: PreferenceConfig, context: Context, loss: Bound) -> Source:
  """Pairs of annotations."""
  data, batch = config.data, config.batch
  if data.target != 'unfiltered_completion':
    raise schema.ConfigError(
        f'data.target is {data.target!r}; pairs need wrong completions as well; fix: '
        "data.target='unfiltered_completion'"
    )
  if batch.packing != 'one_per_row' or batch.size % 2 or config.per_problem < 1:
    raise schema.ConfigError(
        f'batch.size={batch.size}, batch.packing={batch.packing!r}, per_problem={config.per_problem}; a completion has '
        "a row to itself and a pair has two; fix: an even size, packing 'one_per_row', per_problem at least 1"
    )
  found = annotations(data)
  draw = pairing.across_problems if loss.unpaired else pairing.by_problem
  table = draw(found, per_problem=config.per_problem, seed=context.seed)
  if len(table) < 1 + loss.unpaired:
    raise _no_pairs(data.records, found, loss)
  prompting = open_data(data, context.tokenizer)
  used = np.unique(table)
  examples = [
      prompting.example(found[i].id, found[i].problem, found[i].completion, finished=found[i].finished) for i in used
  ]
  try:
    return pairing.dataset_source(
        examples, np.searchsorted(used, table), size=batch.size // 2, length=batch.length, seed=context.seed,
        mismatched=loss.unpaired, process_index=jax.process_index(), process_count=jax.process_count(),
    )
  except ValueError as error:
    raise schema.ConfigError(f'recipe.batch: {error}') from error


def _no_pairs(path, found, loss: Bound):
  right = sum(bool(one.correct) for one in found)
  found_in = f'{len({one.problem.id for one in found})} problems, {len(found)} annotations, {right} of them right'
  missing = 'three completions, of both grades,' if loss.unpaired else 'problem with a right and a wrong one'
  return schema.ConfigError(
      f'{path}: no {missing} among {found_in}; fix: annotate with more samples (config.sampling.samples), at '
      'temperature 1, or problems that the model solves at times'
  )


def _sampled(config: PreferenceConfig, context: Context, loss: Bound) -> Source:
  """Pairs of what the student samples: a pure function of (params, seed, step), as its rollouts are."""
  prompts, samples = config.rollouts.prompts, config.rollouts.samples
  if samples < 2 or prompts < 1 + loss.unpaired:
    raise schema.ConfigError(
        f'rollouts.samples={samples}, rollouts.prompts={prompts}; fix: at least two samples, of which one is better'
        f'{", and for the baseline of kto two prompts" if loss.unpaired else ""}'
    )
  inner = on_policy.source(config.rollouts, config.data, context, advantage=None, teaches=on_policy.within_groups)

  def next_pairs(params, step: int) -> Pairs:
    rollouts = inner.next(params, step)
    return sharding.own_rows(pairing.of_rollouts(rollouts, samples=samples, mismatched=loss.unpaired))

  return inner._replace(next=next_pairs)


def build(section, context: Context) -> Recipe:
  """Opens config.recipe for learning from preferences."""
  config = schema.parse(PreferenceConfig, section, 'config.recipe')
  if (config.batch is None) == (config.rollouts is None):
    raise schema.ConfigError(
        'recipe.batch and recipe.rollouts are both given, or neither; fix: batch for pairs of annotations, rollouts '
        'for pairs that the student samples, None for the other'
    )
  loss = open_loss(config)
  source = (_sampled if config.rollouts else _annotated)(config, context, loss)
  frozen, shape = {}, None
  if loss.referenced:
    reference = load_teacher(config.reference, context)
    frozen, shape = {'reference': (reference.config, reference.params)}, reference.config
  return Recipe(objective(config, context.model, shape), source, frozen)
