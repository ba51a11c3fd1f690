"""One model, however it is driven: scanned or unrolled, with or without a cache, packed or alone, on one device or
eight.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax import sharding
from srm_jax.models import cache as kv
from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig, num_params
from srm_jax.models.transformer import TAPS, Transformer

CONFIG = TransformerConfig(
    vocab_size=40, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=24, max_length=32,
    tie_embeddings=False, qkv_bias=True, qk_norm=True,
)
T = 10


@functools.partial(jax.jit, static_argnums=0)
def _init(config):
  return transformer.init_params(config, jax.random.key(0))


@pytest.fixture(scope='module')
def params():
  """Random everywhere: norms near one, biases that are not zero."""
  made = _init(CONFIG)
  leaves, tree = jax.tree.flatten(made)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  noise = [0.2 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(tree, [leaf + n for leaf, n in zip(leaves, noise, strict=True)])


def _tokens(rows=2, length=T, seed=0):
  return jnp.asarray(np.random.default_rng(seed).integers(1, CONFIG.vocab_size, (rows, length)), jnp.int32)


@functools.partial(jax.jit, static_argnames=('config', 'taps'))
def _apply(params, tokens, *, config=CONFIG, taps=(), **options):
  return Transformer(config).apply({'params': params}, tokens, taps=taps, **options)


@functools.partial(jax.jit, static_argnames='config')
def _loss_and_gradient(params, tokens, *, config=CONFIG):
  def loss(params):
    logits = Transformer(config).apply({'params': params}, tokens).logits
    return jnp.mean(jnp.square(jax.nn.log_softmax(logits)))

  return jax.value_and_grad(loss)(params)


def _same(left, right, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), left, right)


def test_init_has_the_counted_parameters_and_unit_logits():
  made = _init(CONFIG)
  assert sum(leaf.size for leaf in jax.tree.leaves(made)) == num_params(CONFIG)
  assert float(jnp.std(_apply(made, _tokens()).logits)) == pytest.approx(1.0, abs=0.2)


def test_causality_by_gradient(params):
  """hidden[t] depends on the embedding of token s exactly when s <= t: every token of the row is another one."""
  tokens = jnp.arange(1, T + 1, dtype=jnp.int32)[None]

  def hidden(embedding):
    changed = {**params, 'embedding': embedding}
    return Transformer(CONFIG).apply({'params': changed}, tokens, logits_at=()).hidden[0].sum(-1)

  by_token = jax.jit(jax.jacrev(hidden))(params['embedding'])[:, 1 : T + 1]  # [t, s, D]
  influence = jnp.abs(by_token).max(-1)
  assert float(jnp.triu(influence, 1).max()) == 0
  assert bool((influence > 0)[np.tril_indices(T)].all())


@pytest.mark.parametrize('splits', [(T,), (3, 1, 3, 3), (1, 3, 3, 1, 1, 1)])
def test_cache_equals_full_forward(params, splits):
  tokens, cache, parts, start = _tokens(), kv.init_cache(CONFIG, 2, 16), [], 0
  for size in splits:
    output = _apply(params, tokens[:, start : start + size], cache=cache)
    cache, start = output.cache, start + size
    parts.append(output.logits)
  assert int(cache.index) == T
  np.testing.assert_allclose(jnp.concatenate(parts, axis=1), _apply(params, tokens).logits, atol=2e-5)


def test_left_padding_changes_nothing(params):
  tokens, missing = _tokens(), 3
  expected = _apply(params, tokens[1:, missing:]).logits
  slots = jnp.arange(T)[None]
  segments = jnp.concatenate([jnp.ones_like(slots), (slots >= missing).astype(jnp.int32)])
  positions = jnp.concatenate([slots, jnp.maximum(slots - missing, 0)])
  filled = tokens.at[1, :missing].set(0)
  whole = _apply(params, filled, positions=positions, segment_ids=segments).logits
  np.testing.assert_allclose(whole[1:, missing:], expected, atol=2e-5)
  first = _apply(
      params, filled[:, :6], positions=positions[:, :6], segment_ids=segments[:, :6], cache=kv.init_cache(CONFIG, 2, 16)
  )
  rest = _apply(
      params, filled[:, 6:], positions=positions[:, 6:], segment_ids=segments[:, 6:], cache=kv.grow(first.cache, 24)
  )
  np.testing.assert_allclose(rest.logits[1:], expected[:, 6 - missing :], atol=2e-5)
  np.testing.assert_allclose(rest.logits[:1], _apply(params, tokens).logits[:1, 6:], atol=2e-5)


def test_packing_changes_nothing(params):
  tokens = _tokens(1)
  segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0, 0, 0]])
  positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 0, 0, 0]])
  packed = _apply(params, tokens, positions=positions, segment_ids=segments).logits[0]
  for start, stop in ((0, 4), (4, 7)):
    np.testing.assert_allclose(packed[start:stop], _apply(params, tokens[:, start:stop]).logits[0], atol=2e-5)
  assert bool(jnp.isfinite(packed).all())


@pytest.mark.parametrize('change', [{'unroll': 2}, {'remat': 'dots'}, {'remat': 'full'}])
def test_unroll_and_remat_change_nothing(params, change):
  tokens = _tokens()
  changed = _loss_and_gradient(params, tokens, config=dataclasses.replace(CONFIG, **change))
  _same(changed, _loss_and_gradient(params, tokens), rtol=2e-4, atol=2e-6)


# Seven layers: periods of the pattern, and a rest. Locals see three tokens and have a rotary base of their own.
MIXED = dataclasses.replace(
    CONFIG, num_layers=7, pattern='lgn', window=3, local_rope_base=50.0, norm_offset=1.0, post_norms=True,
    embed_scale=2.0, activation='gelu_tanh', rope_dim=4, query_scale=0.3,
)
EXPERTS = dataclasses.replace(CONFIG, num_experts=5, experts_per_token=2)


@functools.cache
def _random(config):
  made = _init(config)
  return jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), made)


@pytest.mark.parametrize('config', [MIXED, EXPERTS])
def test_scan_equals_unrolled_decoding(config):
  tokens, cache, parts = _tokens(), kv.init_cache(config, 2, 16), []
  for start, stop in ((0, 4), (4, 5), (5, T)):
    output = _apply(_random(config), tokens[:, start:stop], config=config, cache=cache)
    cache = output.cache
    parts.append(output.logits)
  whole = _apply(_random(config), tokens, config=config).logits
  np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=5e-5)


@pytest.mark.parametrize('change', [{'remat': 'full'}, {'remat': 'dots'}])
def test_remat_of_a_mixed_pattern_changes_nothing(change):
  changed = _loss_and_gradient(_random(MIXED), _tokens(), config=dataclasses.replace(MIXED, **change))
  _same(changed, _loss_and_gradient(_random(MIXED), _tokens(), config=MIXED), rtol=5e-4, atol=5e-6)


def test_taps_of_a_mixed_pattern_are_in_the_order_of_layers():
  whole = _apply(_random(MIXED), _tokens(), config=MIXED, taps=('hidden', 'attention'))
  cached = _apply(_random(MIXED), _tokens(), config=MIXED, taps=('hidden',), cache=kv.init_cache(MIXED, 2, T))
  assert whole.taps['hidden'].shape[0] == MIXED.num_layers
  np.testing.assert_allclose(whole.taps['hidden'], cached.taps['hidden'], atol=5e-5)
  weights = np.asarray(whole.taps['attention'])  # [N, B, H, T, S]
  beyond = np.tril(np.ones((T, T), bool), -MIXED.window)
  for layer in range(MIXED.num_layers):
    assert (weights[layer][..., beyond].max() > 0) == (MIXED.kind(layer) != 'l')


def test_the_window_ends_what_a_layer_can_see():
  """With local layers alone, token t depends on the last layers * (window - 1) tokens before it, and on no other."""
  config = dataclasses.replace(CONFIG, pattern='l', window=3)
  tokens = jnp.arange(1, T + 1, dtype=jnp.int32)[None]

  def hidden(embedding):
    return Transformer(config).apply(
        {'params': {**_random(config), 'embedding': embedding}}, tokens, logits_at=()
    ).hidden[0].sum(-1)

  influence = jnp.abs(jax.jit(jax.jacrev(hidden))(_random(config)['embedding'])[:, 1 : T + 1]).max(-1)
  reach = config.num_layers * (config.window - 1)
  expected = np.tril(np.ones((T, T), bool)) & ~np.tril(np.ones((T, T), bool), -reach - 1)
  np.testing.assert_array_equal(np.asarray(influence > 0), expected)


def test_layers_without_positions_do_not_know_the_order_of_what_they_see():
  config = dataclasses.replace(CONFIG, num_layers=1, pattern='n')
  tokens = _tokens(1)
  turned = tokens.at[0, :-1].set(tokens[0, :-1][::-1])
  last = [_apply(_random(config), x, config=config).logits[0, -1] for x in (tokens, turned)]
  np.testing.assert_allclose(*last, atol=1e-5)
  rotary = dataclasses.replace(config, pattern='g')
  last = [_apply(_random(rotary), x, config=rotary).logits[0, -1] for x in (tokens, turned)]
  assert float(jnp.abs(last[0] - last[1]).max()) > 0.01


def test_remat_keeps_less(params):
  """Bytes that the backward pass needs: everything > products with weights > inputs of the layers."""

  def kept(remat):
    config = dataclasses.replace(CONFIG, remat=remat, mlp_dim=96)
    shapes = nn.meta.unbox(transformer.abstract_params(config))
    forward = lambda p: Transformer(config).apply({'params': p}, _tokens(), logits_at=()).hidden
    residuals = jax.eval_shape(lambda p: jax.vjp(forward, p)[1], shapes)
    return sum(leaf.size for leaf in jax.tree.leaves(residuals)) - num_params(config)

  none, dots, full = map(kept, ('none', 'dots', 'full'))
  assert none > 1.3 * dots and dots > 1.3 * full


def test_every_parameter_has_logical_axes():
  names, abstract = transformer.param_names(CONFIG), nn.meta.unbox(transformer.abstract_params(CONFIG))
  is_spec = lambda x: isinstance(x, jax.sharding.PartitionSpec)
  for axes, leaf in zip(jax.tree.leaves(names, is_leaf=is_spec), jax.tree.leaves(abstract), strict=True):
    assert len(axes) == leaf.ndim and None not in axes
    assert set(axes) <= set(sharding.RULES)
  assert tuple(names['layers']['attention']['k']['kernel']) == ('layers', 'embed', 'kv_heads', 'head_dim')
  assert tuple(names['embedding']) == ('vocab', 'embed')


def test_mesh_equals_one_device(params):
  tokens, mesh = _tokens(4), sharding.make_mesh((2, 2, 2))
  placed = jax.device_put(params, sharding.shardings(transformer.param_names(CONFIG), params, mesh))
  assert len(placed['layers']['mlp']['up']['kernel'].sharding.device_set) == 8
  assert placed['layers']['mlp']['up']['kernel'].addressable_shards[0].data.shape == (2, 8, 12)
  with jax.set_mesh(mesh):
    loss, gradient = _loss_and_gradient(placed, sharding.shard_rows(tokens, mesh))
  _same(jax.device_get((loss, gradient)), _loss_and_gradient(params, tokens), rtol=2e-4, atol=2e-6)


def test_taps(params):
  tokens = _tokens()
  output = _apply(params, tokens, taps=TAPS)
  shapes = {name: tap.shape for name, tap in output.taps.items()}
  assert shapes == {
      'hidden': (2, 2, T, 16), 'q': (2, 2, T, 4, 6), 'k': (2, 2, T, 2, 6), 'v': (2, 2, T, 2, 6),
      'attention': (2, 2, 4, T, T),
  }
  np.testing.assert_allclose(output.logits, _apply(params, tokens).logits, atol=2e-5)
  np.testing.assert_allclose(output.taps['attention'].sum(-1), 1, atol=1e-5)
  assert float(jnp.triu(output.taps['attention'], 1).max()) == 0
  # The last block's output, normalised, is what the head reads.
  last = np.asarray(output.taps['hidden'][-1])
  scale = np.asarray(params['final_norm']['scale'])
  normed = last / np.sqrt(np.mean(np.square(last), -1, keepdims=True) + CONFIG.norm_eps) * scale
  np.testing.assert_allclose(output.hidden, normed, atol=1e-5)
  cached = _apply(params, tokens, taps=('hidden', 'q'), cache=kv.init_cache(CONFIG, 2, T))
  _same(cached.taps, {name: output.taps[name] for name in ('hidden', 'q')}, atol=2e-5)
  with pytest.raises(ValueError, match=r"taps \['keys'\] unknown; choose from"):
    Transformer(CONFIG).apply({'params': params}, tokens, taps=('q', 'keys'))


def test_logits_at(params):
  tokens, everywhere = _tokens(), _apply(params, _tokens()).logits
  some = jnp.array([[9, 0], [3, 3]])
  chosen = _apply(params, tokens, logits_at=some).logits
  expected = np.take_along_axis(np.asarray(everywhere), np.asarray(some)[..., None], 1)
  np.testing.assert_allclose(chosen, expected, atol=1e-5)
  assert _apply(params, tokens, logits_at=()).logits is None


def test_bfloat16_stays_near_float32(params):
  tokens, config = _tokens(), dataclasses.replace(CONFIG, dtype='bfloat16')
  exact, rounded = _apply(params, tokens), _apply(params, tokens, config=config)
  assert rounded.hidden.dtype == jnp.bfloat16 and rounded.logits.dtype == jnp.float32
  relative = jnp.linalg.norm(rounded.logits - exact.logits) / jnp.linalg.norm(exact.logits)
  assert 1e-5 < float(relative) < 0.03
  gradient = _loss_and_gradient(params, tokens, config=config)[1]
  assert {leaf.dtype.name for leaf in jax.tree.leaves(gradient)} == {'float32'}


def test_unstacked_layers_are_the_stacked_ones(params):
  loose = transformer.unstack_layers(params)
  assert len(loose['layers']) == 2
  np.testing.assert_array_equal(loose['layers'][1]['mlp']['up']['kernel'], params['layers']['mlp']['up']['kernel'][1])
  tokens, cache = _tokens(), kv.init_cache(CONFIG, 2, T)
  np.testing.assert_allclose(_apply(loose, tokens, cache=cache).logits, _apply(params, tokens).logits, atol=2e-5)


def test_cast_leaves_integers_alone():
  cast = transformer.cast({'a': jnp.ones(2), 'b': jnp.ones(2, jnp.int32)}, 'bfloat16')
  assert cast['a'].dtype == jnp.bfloat16 and cast['b'].dtype == jnp.int32
