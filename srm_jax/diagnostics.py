"""What to say when a number is not finite: where in the model it began."""

import jax
import jax.numpy as jnp
import numpy as np

from srm_jax.models.config import TransformerConfig
from srm_jax.models.transformer import Transformer, variables
from srm_jax.types import Batch, Params


def _bad_leaf(tree) -> str | None:
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if not np.all(np.isfinite(np.asarray(leaf, np.float32))):
      return jax.tree_util.keystr(path, simple=True, separator='/')
  return None


def first_non_finite(config: TransformerConfig, params: Params, batch: Batch, grads: Params) -> str:
  """Names the first place, in the order of the forward pass, that holds a NaN or an infinity.

  Args:
    config: of the model.
    params: {'model': ...}.
    batch: fields [B, T].
    grads: like params, of this batch.

  Returns:
    'parameter ...', 'output of layer ...', 'gradient of ...' or 'the loss'.
  """
  bad = _bad_leaf(params)
  if bad is not None:
    return f'parameter {bad}'
  taps = Transformer(config).apply(
      variables(params['model']), batch.inputs, positions=batch.positions, segment_ids=batch.segment_ids,
      logits_at=(), taps=('hidden',),
  ).taps
  finite = np.asarray(jnp.all(jnp.isfinite(taps['hidden']), axis=(1, 2, 3)))
  if not finite.all():
    return f'output of layer {int(np.argmin(finite))} of {config.num_layers}'
  bad = _bad_leaf(grads)
  return 'the loss' if bad is None else f'the loss, or the gradient of {bad}'
