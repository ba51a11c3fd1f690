"""Optimizers from a config: schedule, clipping, and which parameter goes where."""

import dataclasses
from collections.abc import Callable

import jax
import optax
from jax.sharding import PartitionSpec
from optax.contrib import MuonDimensionNumbers

from srm_jax import schema
from srm_jax.models.layers import INPUT_AXES
from srm_jax.types import Params


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """learning_rate is the peak. warmup_steps rise linearly; then `schedule` runs to the end of training.

  matrix_learning_rate is Muon's, for the block matrices (0 elsewhere); the rest goes to Adam at learning_rate.
  """

  name: str
  learning_rate: float
  matrix_learning_rate: float
  schedule: str
  warmup_steps: int
  weight_decay: float
  b1: float
  b2: float
  clip_norm: float


def _constant(peak, steps):
  del steps
  return optax.constant_schedule(peak)


def _linear(peak, steps):
  return optax.linear_schedule(peak, 0.0, steps)


def _cosine(peak, steps):
  return optax.cosine_decay_schedule(peak, steps)


SCHEDULES: dict[str, Callable] = {'constant': _constant, 'linear': _linear, 'cosine': _cosine}


def schedule(config: OptimizerConfig, peak: float, num_steps: int):
  """Linear warm-up to `peak`, then the named decay over the remaining steps: step -> learning rate."""
  decay = schema.choose('schedule', config.schedule, SCHEDULES)
  after = decay(peak, max(1, num_steps - config.warmup_steps))
  if not config.warmup_steps:
    return after
  warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
  return optax.join_schedules([warmup, after], [config.warmup_steps])


def muon_dimensions(names: Params):
  """MuonDimensionNumbers for block matrices, None for all else, from a tree of logical names.

  Embedding, head, norms, biases, projectors and value heads go to Adam: only matrices inside the layers have the
  spectral geometry that orthogonalisation assumes.
  """

  def one(axes):
    axes = tuple(axes)
    batch = 1 if axes[:1] == ('layers',) else 0
    inputs = INPUT_AXES.get(axes[batch:])
    if inputs is None or not batch:
      return None
    last = len(axes)
    return MuonDimensionNumbers(
        reduction_axis=tuple(range(batch, batch + inputs)), output_axis=tuple(range(batch + inputs, last))
    )

  return jax.tree.map(one, names, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _adamw(config, num_steps, names):
  del names
  rate = schedule(config, config.learning_rate, num_steps)
  return optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=_decayed)


def _muon(config, num_steps, names):
  return optax.contrib.muon(
      schedule(config, config.matrix_learning_rate, num_steps),
      adam_learning_rate=schedule(config, config.learning_rate, num_steps),
      adam_b1=config.b1, adam_b2=config.b2, weight_decay=config.weight_decay,
      muon_weight_dimension_numbers=muon_dimensions(names),
  )


OPTIMIZERS: dict[str, Callable] = {'adamw': _adamw, 'muon': _muon}


def _decayed(params):
  """Weight decay for matrices only: norms, biases and magnitudes have at most one axis beside 'layers'."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: not any(str(getattr(key, 'key', '')) in ('scale', 'bias', 'magnitude') for key in path), params
  )


def make_optimizer(config: OptimizerConfig, num_steps: int, names: Params) -> optax.GradientTransformation:
  """The gradient transformation: global-norm clipping (clip_norm 0 switches it off), then the named optimizer.

  Args:
    config: section `optimizer`.
    num_steps: length of the schedule.
    names: tree of logical axis names, of the structure of the parameters.

  Raises:
    ConfigError: optimizer or schedule unknown.

  Reference: Loshchilov and Hutter, AdamW, arXiv:1711.05101; Jordan et al., Muon (2024), as in optax.contrib.
  """
  tx = schema.choose('optimizer', config.name, OPTIMIZERS)(config, num_steps, names)
  if config.clip_norm:
    tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)
  return tx
