"""Any recipe on a frozen base: params = {'adapters': ...}, and the base is one more frozen model.

  terms'(params, batch, frozen) = terms({'model': base with adapters}, batch, frozen)

Optimizer state, gradients, average and checkpoints are of the adapters alone. A frozen model that is the base itself,
such as the reference policy of a run that starts from it, shares its memory.
Reference: Hu et al., LoRA, arXiv:2106.09685; Dettmers et al., QLoRA, arXiv:2305.14314.
"""

import functools

import jax

from srm_jax import checkpoints, sharding
from srm_jax.models import adapters
from srm_jax.models.adapters import AdapterConfig
from srm_jax.models.config import TransformerConfig, num_params
from srm_jax.schema import ConfigError
from srm_jax.types import Objective, Params, Recipe

BASE = 'base'  # its name among the frozen models


def check(config: TransformerConfig, adapter: AdapterConfig):
  """Raises ConfigError where the section does not fit the model; nothing is computed."""
  try:
    adapters.targeted(config, adapter)
    if adapter.base:
      adapters.quantized_names(config, adapter.base)
  except ValueError as error:
    raise ConfigError(f'config.adapters: {error}') from error
  if not adapter.targets:
    raise ConfigError(f"config.adapters.rank={adapter.rank} without targets; give some, such as ('attention/*',)")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _bind(config, adapter, tree):
  return adapters.bind(config, adapter, tree)


def joined(config: TransformerConfig, adapter: AdapterConfig, params: Params, base: Params) -> Params:
  """params = {'adapters': ..., 'projectors': ...} as recipes know them: {'model': base with adapters, ...}."""
  rest = {name: tree for name, tree in params.items() if name != 'adapters'}
  return {'model': {**base, 'adapters': _bind(config, adapter, params['adapters'])}, **rest}


def objective(inner: Objective, config: TransformerConfig, adapter: AdapterConfig) -> Objective:
  """The same objective of adapters, over frozen[BASE]."""

  def terms(params, batch, frozen, rng):
    if 'average' in frozen:
      frozen = {**frozen, 'average': joined(config, adapter, frozen['average'], frozen[BASE])}
    return inner.terms(joined(config, adapter, params, frozen[BASE]), batch, frozen, rng)

  trained, whole = adapters.num_adapter_params(config, adapter), num_params(config)
  said = (
      f'{adapter.kind} of rank {adapter.rank}, scale {adapter.scale:g}, on {list(adapters.targeted(config, adapter))}: '
      f'{trained:,} parameters are trained, {whole:,} are frozen{f" in {adapter.base}" if adapter.base else ""}'
  )
  return inner._replace(terms=terms, resolved={**inner.resolved, 'adapters': said})


def adapt(recipe: Recipe, config: TransformerConfig, adapter: AdapterConfig, base: Params, mesh) -> Recipe:
  """The recipe on a frozen base.

  Args:
    recipe: as its builder made it, for {'model': ...}.
    base: dense, on the mesh; quantised here where adapter.base says so.

  Returns:
    A recipe of {'adapters': ...} (and the extra parameters of the inner one), with the base among its frozen models.
  """
  same = [name for name, (_, params) in recipe.frozen.items() if _same(params, base)]
  base = quantized(config, adapter, base, mesh)
  frozen = {name: (its, base if name in same else params) for name, (its, params) in recipe.frozen.items()}

  def draw(params, step):
    return recipe.source.next(joined(config, adapter, params, base), step)

  return recipe._replace(
      objective=objective(recipe.objective, config, adapter), source=recipe.source._replace(next=draw),
      frozen={**frozen, BASE: (config, base)},
  )


def _same(left, right) -> bool:
  shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
  return shapes(left) == shapes(right) and checkpoints.fingerprint(left) == checkpoints.fingerprint(right)


def quantized(config: TransformerConfig, adapter: AdapterConfig, base: Params, mesh) -> Params:
  """The base as adapter.base keeps it, sharded by the same rules."""
  if not adapter.base:
    return base
  make = functools.partial(adapters.quantize, config, kind=adapter.base)
  names = adapters.quantized_names(config, adapter.base)
  return jax.jit(make, out_shardings=sharding.shardings(names, jax.eval_shape(make, base), mesh))(base)
