"""What reads hidden states: the unembedding, projectors between widths, and a scalar head."""

import jax
import jax.numpy as jnp

from srm_jax.models.config import TransformerConfig
from srm_jax.types import Params


def unembedding(params: Params, rows: int | None = None) -> jax.Array:
  """The [D, V] matrix from hidden states to logits (the transposed embedding where the head is tied).

  rows: only the first so many of the vocabulary, where models of one tokenizer pad it differently.
  """
  kernel = params['head'] if 'head' in params else params['embedding'].T
  return kernel if rows is None or rows == kernel.shape[1] else kernel[:, :rows]


def logits(config: TransformerConfig, params: Params, hidden: jax.Array) -> jax.Array:
  """hidden [..., D] -> float32 logits [..., V]; the product runs in the compute dtype."""
  kernel = unembedding(params).astype(config.dtype)
  return jnp.matmul(hidden.astype(config.dtype), kernel, preferred_element_type=jnp.float32)


def init_projector(rng: jax.Array, student_dim: int, teacher_dim: int) -> jax.Array:
  """A [Ds, Dt] matrix that keeps the scale of unit-variance features."""
  return jax.random.normal(rng, (student_dim, teacher_dim), jnp.float32) / jnp.sqrt(student_dim)


def init_value_head(rng: jax.Array, embed_dim: int) -> Params:
  """A [D] vector and a bias; scores of unit-variance features begin with unit variance.

  Reference: Stiennon et al., Learning to Summarize from Human Feedback, arXiv:2009.01325.
  """
  kernel = jax.random.normal(rng, (embed_dim,), jnp.float32) / jnp.sqrt(embed_dim + 1)
  return {'kernel': kernel, 'bias': jnp.zeros((), jnp.float32)}


def value(head: Params, hidden: jax.Array) -> jax.Array:
  """hidden [..., D] -> float32 [...]: a reward or a value of the text up to and with each token."""
  return jnp.matmul(hidden.astype(jnp.float32), head['kernel'], precision='highest') + head['bias']
