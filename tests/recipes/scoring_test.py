"""What a model says of given tokens, through the chunked head: the numbers of whole logits, also where rows share the
pass of their prompt.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax import sharding
from srm_jax.data import packing
from srm_jax.models import heads, transformer
from srm_jax.models.config import RopeScaling, TransformerConfig
from srm_jax.recipes import scoring
from srm_jax.recipes.scoring import Groups
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


# Rows that share the pass of their prompt.

WIDTH, SIZE, ROWS = 7, 4, 16
SHAPES = {
    'global': MODEL, 'windows': dataclasses.replace(MODEL, num_layers=3, window=4, pattern='lg'),
    'remat': dataclasses.replace(MODEL, num_layers=2, num_kv_heads=1, remat='full'),
}


def grouped(seed=0):
  """Groups of SIZE completions of random lengths behind prompts of 2 to WIDTH tokens, which end at slot WIDTH."""
  rng = np.random.default_rng(seed)
  draw = lambda count: rng.integers(1, 64, count).tolist()
  prompts = [prompt for length in (2, WIDTH, 5, 3) for prompt in [draw(length)] * SIZE]
  completions = [draw(int(length)) for length in rng.integers(1, 10, ROWS)]
  return packing.completions_batch(prompts, completions, length=WIDTH + 9, prompt_width=WIDTH)[0]


def scores_and_gradient(model, params, batch, groups):
  """Numbers on the completions' tokens, and the gradient of a weighted sum of them."""
  weights = np.random.default_rng(1).normal(size=(2, *batch.inputs.shape)) * np.asarray(batch.loss_mask)

  def total(params):
    found = scoring.score(model, params, batch, temperature=0.8, chunk=16, groups=groups)
    return jnp.sum(weights[0] * found['logprobs'] + weights[1] * found['entropy']), found

  (_, found), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
  return {name: x * batch.loss_mask for name, x in found.items()}, gradient


def _params(model):
  params = jax.jit(transformer.init_params, static_argnums=0)(model, jax.random.key(0))
  return {**params, 'embedding': params['embedding'] * 3}


def _same(found, expected):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


@pytest.mark.parametrize('name', SHAPES)
def test_a_shared_prompt_changes_neither_scores_nor_gradients(name):
  model, batch = SHAPES[name], grouped()
  params = _params(model)
  alone = scores_and_gradient(model, params, batch, scoring.ALONE)
  _same(scores_and_gradient(model, params, batch, Groups(SIZE, WIDTH)), alone)
  assert np.abs(alone[0]['logprobs']).max() > 5


def test_values_of_rows_that_share_a_prompt():
  batch, params = grouped(), _params(MODEL)
  head = heads.init_value_head(jax.random.key(1), 16)
  values = lambda groups: scoring.score(
      MODEL, params, batch, temperature=1.0, chunk=None, value_head=head, groups=groups
  )['values'] * batch.loss_mask
  np.testing.assert_allclose(values(Groups(SIZE, WIDTH)), values(scoring.ALONE), atol=1e-5)


@pytest.mark.parametrize('mesh, together', [((1, 4, 1), 4), ((1, 8, 1), 2), ((2, 4, 1), 2), ((1, 2, 4), 4)])
def test_devices_share_what_they_hold(mesh, together, monkeypatch):
  """Sixteen rows in groups of four: on eight devices a group is on two of them, and each computes its prompt."""
  asked, whole = [], transformer.Transformer.__call__

  def watched(self, inputs, **options):
    asked.append(options.get('branches', 1))
    return whole(self, inputs, **options)

  batch, params = grouped(), _params(MODEL)
  alone = scores_and_gradient(MODEL, params, batch, scoring.ALONE)
  monkeypatch.setattr(scoring.Transformer, '__call__', watched)
  devices = jax.devices()[: int(np.prod(mesh))]
  with jax.set_mesh(sharding.make_mesh(mesh, devices)) as mesh:
    placed = sharding.shard_rows(batch, jax.sharding.get_mesh())
    found = scores_and_gradient(MODEL, params, placed, Groups(SIZE, WIDTH))
  assert set(asked) == {together}
  _same(found, alone)


def test_the_prompt_runs_once_a_group():
  """Counted in the products that are compiled: a third of the rows' tokens are left."""
  batch, params = grouped(), _params(MODEL)
  cost = lambda groups: jax.jit(lambda params: scoring.score(
      MODEL, params, batch, temperature=1.0, chunk=0, groups=groups
  )['logprobs']).lower(params).compile().cost_analysis()['flops']
  tokens = lambda trunk, rows: 4 * trunk + 16 * rows
  expected = tokens(WIDTH - 1, 9) / tokens(0, WIDTH + 9)
  assert cost(Groups(SIZE, WIDTH)) / cost(scoring.ALONE) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize('model, groups', [
    (dataclasses.replace(MODEL, rope_scaling=RopeScaling('longrope', original_length=8)), Groups(SIZE, WIDTH)),
    (MODEL, Groups(SIZE, 1)), (MODEL, Groups(1, WIDTH)),
], ids=['LongRoPE', 'prompts of one token', 'groups of one'])
def test_nothing_is_shared_where_there_is_nothing_to_share(model, groups):
  assert scoring._together(model, groups, ROWS) == 1
