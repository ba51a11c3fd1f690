"""The train step, written once for every cell of objective x source.

  loss = sum over terms of  weight * total / count

Counts are taken on the global batch before the microbatch scan; each microbatch contributes its totals over those
counts, so gradients add and the result does not depend on how the batch was split.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from srm_jax import sharding
from srm_jax.types import Max, Mean, Objective, TrainState


def init_state(params, tx: optax.GradientTransformation, *, ema: bool = False) -> TrainState:
  """A state at step 0; with `ema`, a copy of the parameters to average into."""
  average = jax.tree.map(jnp.copy, params) if ema else None
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), average)


def split_microbatches(batch, count: int, *, group: int = 1):
  """[B, ...] leaves -> [count, B / count, ...], rows j, j + count, ... in microbatch j.

  The split is strided, so that rows stay on their device. Of groups of rows that belong together, runs of rows take the
  rows' place: as long as a microbatch's share of a device allows.

  Raises:
    ValueError: count does not divide the rows.
  """

  def split(x):
    rows = x.shape[0]
    if rows % count:
      raise ValueError(f'{rows} rows do not divide into {count} microbatches; change batch_size or microbatches')
    run = sharding.rows_together(group, rows // count)
    runs = jnp.swapaxes(x.reshape(rows // count // run, count, run, *x.shape[1:]), 0, 1)
    return runs.reshape(count, rows // count, *x.shape[1:])

  return jax.tree.map(split, batch)


def combine(left, right):
  """Adds Means and takes the larger of Maxes, key by key."""

  def one(a, b):
    return Max(jnp.maximum(a.value, b.value)) if isinstance(a, Max) else Mean(a.total + b.total, a.count + b.count)

  return jax.tree.map(one, left, right, is_leaf=lambda x: isinstance(x, (Mean, Max)))


def value_and_grad(objective: Objective, params, batch, frozen, rng, *, step=0, microbatches: int = 1):
  """Loss, gradient and metrics of one global batch.

  Args:
    objective: terms and denominators.
    params: trained parameters.
    batch: Batch, Rollouts or Pairs; leaves [B, ...].
    frozen: {name: params} of frozen models.
    rng: key; microbatch j folds j in.
    step: for schedules.
    microbatches: in how many parts to run.

  Returns:
    (float32 scalar, tree like params in float32, {name: Mean | Max}).
  """
  if objective.indivisible and microbatches > 1:
    raise ValueError(f'microbatches={microbatches}, but {objective.indivisible}; fix: microbatches=1')
  if objective.prepare is not None:
    batch = objective.prepare(batch, step)
  counts = {name: jnp.maximum(count, 1).astype(jnp.float32) for name, count in objective.denominators(batch).items()}

  def loss(params, part, key):
    terms, metrics = objective.terms(params, part, frozen, key)
    missing = set(terms) ^ set(counts)
    if missing:
      raise ValueError(f'terms {sorted(missing)} have a total or a count but not both')
    total = sum(weight * value / counts[name] for name, (weight, value) in terms.items())
    shares = {f'loss/{name}': Mean(value, jnp.zeros(())) for name, (_, value) in terms.items()}
    return total, {**metrics, **shares}

  gradient = jax.value_and_grad(loss, has_aux=True)
  if microbatches == 1:
    (total, metrics), grads = gradient(params, batch, rng)
  else:
    parts = split_microbatches(batch, microbatches, group=objective.group)
    total, grads, metrics = _accumulate(gradient, params, parts, rng, microbatches)
  metrics = {
      name: Mean(value.total, counts[name[5:]]) if name.startswith('loss/') else value
      for name, value in metrics.items()
  }
  return total, grads, metrics


def _accumulate(gradient, params, parts, rng, microbatches):
  """Sums value, gradient (float32) and metrics over the leading axis of parts."""

  def run(index):
    part = jax.tree.map(lambda x: x[index], parts)
    (value, metrics), grads = gradient(params, part, jax.random.fold_in(rng, index))
    return value, jax.tree.map(lambda g: g.astype(jnp.float32), grads), metrics

  def step(carry, index):
    value, grads, metrics = run(index)
    return (carry[0] + value, jax.tree.map(jnp.add, carry[1], grads), combine(carry[2], metrics)), None

  # Starting from the first microbatch would compile the model twice.
  start = jax.tree.map(_neutral, jax.eval_shape(run, 0), is_leaf=lambda x: isinstance(x, Max))
  return jax.lax.scan(step, start, jnp.arange(microbatches))[0]


def _neutral(x):
  return Max(jnp.full(x.value.shape, -jnp.inf, x.value.dtype)) if isinstance(x, Max) else jnp.zeros(x.shape, x.dtype)


def build_train_step(
    objective: Objective, tx: optax.GradientTransformation, *, microbatches: int = 1, ema_decay: float = 0.0
) -> Callable:
  """(state, batch, frozen, rng) -> (state, metrics), to be jitted with the state donated.

  A step whose loss or gradient norm is not finite leaves parameters, optimizer and average untouched and reports
  metrics['finite'] = 0: the caller stops with a good state in hand.
  """

  def step(state: TrainState, batch, frozen, rng):
    models = frozen if state.ema is None else {**frozen, 'average': state.ema}
    loss, grads, metrics = value_and_grad(
        objective, state.params, batch, models, rng, step=state.step, microbatches=microbatches
    )
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    def keep(new, old):
      return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    params, opt_state = keep(params, state.params), keep(opt_state, state.opt_state)
    ema = state.ema
    if ema is not None:
      ema = keep(jax.tree.map(lambda mean, p: ema_decay * mean + (1 - ema_decay) * p, ema, params), ema)
    one = jnp.ones(())
    extra = {'loss': Mean(loss, one), 'grad_norm': Mean(norm, one), 'finite': Mean(finite.astype(jnp.float32), one)}
    return TrainState(state.step + finite.astype(jnp.int32), params, opt_state, ema), {**metrics, **extra}

  return step
