"""What a model says of given tokens, through the chunked head: the numbers of whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.models import heads, transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import scoring
from tests import tiny

MODEL = TransformerConfig(64, 1, 16, 2, 2, 8, 32, max_length=64)


@pytest.mark.parametrize('temperature', [1.0, 0.5])
def test_scores_are_those_of_whole_logits(temperature):
  params = jax.jit(transformer.init_params, static_argnums=0)(MODEL, jax.random.key(0))
  params = {**params, 'embedding': params['embedding'] * 3}
  batch = tiny.random_batch()
  value_head = heads.init_value_head(jax.random.key(1), 16)
  found = scoring.score(MODEL, params, batch, temperature=temperature, chunk=32, value_head=value_head)
  out = transformer.Transformer(MODEL).apply(
      {'params': params}, batch.inputs, positions=batch.positions, segment_ids=batch.segment_ids,
  )
  logprobs = jax.nn.log_softmax(out.logits / temperature, axis=-1)
  taken = jnp.take_along_axis(logprobs, batch.targets[..., None], axis=-1)[..., 0]
  inside = batch.segment_ids > 0
  np.testing.assert_allclose(found['logprobs'][inside], taken[inside], atol=1e-4)
  np.testing.assert_allclose(found['entropy'][inside], -(jnp.exp(logprobs) * logprobs).sum(-1)[inside], atol=1e-4)
  np.testing.assert_allclose(
      found['values'][inside], (out.hidden @ value_head['kernel'] + value_head['bias'])[inside], atol=1e-4
  )
  assert 'values' not in scoring.score(MODEL, params, batch, temperature=temperature, chunk=None)
