"""Adapters inside the block are the merged matrices: scanned, with a cache, on a mesh, over quantised weights; and
nothing but adapters has a gradient.
"""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax import sharding
from srm_jax.models import adapters, layers, transformer
from srm_jax.models import cache as kv
from srm_jax.models.adapters import AdapterConfig
from srm_jax.models.config import TransformerConfig
from srm_jax.models.quantization import QUANTIZERS, Quantized
from srm_jax.models.transformer import Transformer

CONFIG = TransformerConfig(
    vocab_size=40, num_layers=3, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=128, qkv_bias=True,
    remat='full',
)
MIXED = dataclasses.replace(CONFIG, pattern='gl', window=4)  # a period of two layers, and a rest that is not scanned
T = 8
EVERYTHING = AdapterConfig(rank=3, alpha=6.0, targets=('*',))
CONFIGS = {
    'lora': EVERYTHING,
    'rslora': dataclasses.replace(EVERYTHING, scaling='alpha/sqrt(r)'),
    'dora': dataclasses.replace(EVERYTHING, kind='dora'),
    'some layers': dataclasses.replace(EVERYTHING, kind='dora', targets=('attention/[qv]', '2/mlp/*', '0/*/out')),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 40, (4, T)), jnp.int32)


@functools.cache
def _params(kind=''):
  made = jax.jit(functools.partial(transformer.init_params, CONFIG))(jax.random.key(0))
  return jax.jit(lambda params: adapters.quantize(CONFIG, params, kind))(made) if kind else made


def _fresh(config, params=None):
  params = _params() if params is None else params
  init = jax.jit(functools.partial(adapters.init_adapters, CONFIG, config))
  return init(jax.random.key(1), params)


def _moved(tree):
  """As after training: B is not zero, magnitudes are not the norms."""
  keys = jax.random.split(jax.random.key(2), len(jax.tree.leaves(tree)))
  keys = jax.tree.unflatten(jax.tree.structure(tree), list(keys))
  return jax.tree.map(lambda x, key: x + 0.2 * jax.random.normal(key, x.shape), tree, keys)


@functools.partial(jax.jit, static_argnums=0)
def _joined(config, params, tree):
  return adapters.join(CONFIG, config, params, tree)


@functools.partial(jax.jit, static_argnames='config')
def _logits(params, tokens=TOKENS, cache=None, config=CONFIG):
  out = Transformer(config).apply(transformer.variables(params), tokens, cache=cache)
  return out.logits, out.cache


_merged = jax.jit(functools.partial(adapters.merge, CONFIG))


def test_fresh_lora_changes_nothing_bit_for_bit():
  expected = _logits(_params())[0]
  np.testing.assert_array_equal(_logits(_joined(EVERYTHING, _params(), _fresh(EVERYTHING)))[0], expected)
  dora = _logits(_joined(CONFIGS['dora'], _params(), _fresh(CONFIGS['dora'])))[0]
  np.testing.assert_allclose(dora, expected, atol=1e-5)


@pytest.mark.parametrize('name', CONFIGS)
def test_inside_the_block_is_what_merging_gives(name):
  joined = _joined(CONFIGS[name], _params(), _moved(_fresh(CONFIGS[name])))
  config = MIXED if name == 'some layers' else CONFIG
  logits = functools.partial(_logits, config=config)
  inside, merged = logits(joined)[0], _merged(joined)
  np.testing.assert_allclose(inside, logits(merged)[0], atol=2e-4)
  assert float(jnp.max(jnp.abs(inside - logits(_params())[0]))) > 0.1
  cached = logits(joined, cache=kv.init_cache(config, 4, T))[0]
  np.testing.assert_allclose(cached, inside, atol=2e-4)
  assert jax.tree.structure(merged) == jax.tree.structure(_params())


def test_merging_by_hand():
  """W + s A B in the targeted layers of q, and not a bit elsewhere."""
  config = AdapterConfig(2, 3.0, ('0/attention/q', '2/attention/q'), scaling='alpha/sqrt(r)')
  tree = _moved(_fresh(config))
  merged = _merged(_joined(config, _params(), tree))
  before, after = (p['layers']['attention']['q']['kernel'].reshape(3, 64, 64) for p in (_params(), merged))
  factors = tree['layers']['attention']['q']
  change = 3.0 / 2**0.5 * np.asarray(factors['a']) @ np.asarray(factors['b'])
  np.testing.assert_allclose(after, before + np.stack([change[0], 0 * change[0], change[1]]), atol=1e-5)
  np.testing.assert_array_equal(after[1], before[1])
  np.testing.assert_array_equal(merged['layers']['mlp']['up']['kernel'], _params()['layers']['mlp']['up']['kernel'])
  with jax.numpy_dtype_promotion('strict'):
    assert config.scale == pytest.approx(3.0 / 2**0.5) and dataclasses.replace(config, scaling='alpha/r').scale == 1.5


def test_dora_by_hand():
  """One output (3, 4) of norm 5, changed by s A B = 2 * (0, 4) to (3, 12), of norm sqrt(153)."""
  kernel, a, b = jnp.array([[3.0], [4.0]]), jnp.array([[0.0], [2.0]]), jnp.array([[2.0]])
  factors = dict(a=a, b=b, scale=jnp.float32(2.0), magnitude=jnp.array([10.0]))
  x = jnp.array([[1.0, 1.0]])
  np.testing.assert_allclose(layers.column_norms(kernel, a, b, 2.0), [153**0.5], rtol=1e-6)
  np.testing.assert_allclose(layers.adapt(x, x @ kernel, kernel, factors), [[10 * 15 / 153**0.5]], rtol=1e-6)
  value = lambda b: layers.adapt(x, x @ kernel, kernel, factors | {'b': b})[0, 0]
  # The norm is held: d/db = m / norm * s x A, without what the norm itself would add.
  np.testing.assert_allclose(jax.grad(value)(b), [[10 / 153**0.5 * 2 * 2]], rtol=1e-6)


def _loss(tree, params, adapter, config=CONFIG):
  joined = adapters.join(config, adapter, params, tree)
  return jnp.mean(jnp.square(jax.nn.log_softmax(Transformer(config).apply(
      transformer.variables(joined), TOKENS).logits)))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _value_and_grad(tree, params, adapter, config=CONFIG):
  return jax.value_and_grad(_loss)(tree, params, adapter, config)


def _same(left, right, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), left, right)


def test_gradients_are_those_of_the_merged_model_and_the_weights_have_none():
  tree = _moved(_fresh(EVERYTHING))

  def through_merging(tree):
    merged = adapters.merge(CONFIG, adapters.join(CONFIG, EVERYTHING, _params(), tree))
    logits = Transformer(CONFIG).apply({'params': merged}, TOKENS).logits
    return jnp.mean(jnp.square(jax.nn.log_softmax(logits)))

  expected = jax.jit(jax.grad(through_merging))(tree)
  assert all(float(jnp.max(jnp.abs(leaf))) > 1e-4 for leaf in jax.tree.leaves(expected))
  _same(_value_and_grad(tree, _params(), EVERYTHING)[1], expected, rtol=1e-3, atol=2e-5)
  of_weights = jax.jit(jax.grad(lambda p: _loss(tree, {**_params(), 'layers': p}, EVERYTHING)))(_params()['layers'])
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_weights))


def test_no_layer_trains_that_is_not_targeted():
  config = CONFIGS['some layers']
  tree = _fresh(config)
  assert jax.tree.map(lambda leaf: leaf.shape[0], tree['layers']['mlp']['up']) == {'a': 1, 'b': 1, 'magnitude': 1}
  assert tree['layers']['attention']['out']['a'].shape == (1, 64, 3)
  assert tree['layers']['attention']['q']['b'].shape == (3, 3, 64)
  assert 'k' not in tree['layers']['attention'] and adapters.targeted(CONFIG, config)['mlp/down'] == (2,)
  count = 3 * (64 * 3 + 3 * 64 + 64) + 3 * (64 * 3 + 3 * 32 + 32) + (64 * 3 + 3 * 64 + 64) + 2 * (
      64 * 3 + 3 * 128 + 128) + (128 * 3 + 3 * 64 + 64)
  assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == adapters.num_adapter_params(CONFIG, config) == count


def _products_of_weights(compiled) -> set[str]:
  """Shapes of matrix products of the shape of mlp kernels: only a weight gradient has it."""
  return set(re.findall(r'= f32\[((?:64,128|128,64))\]\S* dot\(', compiled.as_text()))


def test_no_weight_gradient_is_computed():
  tree, params = _fresh(EVERYTHING), _params()
  frozen = jax.jit(jax.grad(_loss), static_argnums=2).lower(tree, params, EVERYTHING).compile()
  assert not _products_of_weights(frozen)
  whole = lambda p: jnp.mean(jnp.square(Transformer(CONFIG).apply({'params': p}, TOKENS).logits))
  assert _products_of_weights(jax.jit(jax.grad(whole)).lower(params).compile())


def test_a_mesh_changes_nothing():
  adapter, mesh = CONFIGS['dora'], sharding.make_mesh((2, 2, 2))
  tree = _moved(_fresh(adapter))
  expected = jax.device_get(_value_and_grad(tree, _params(), adapter))
  names = adapters.adapter_names(CONFIG, adapter)
  placed = jax.device_put(tree, sharding.shardings(names, tree, mesh))
  params = jax.device_put(_params(), sharding.shardings(transformer.param_names(CONFIG), _params(), mesh))
  up = placed['layers']['mlp']['up']
  assert up['a'].addressable_shards[0].data.shape == (3, 32, 3)
  assert up['b'].addressable_shards[0].data.shape == (3, 3, 64)
  assert up['magnitude'].addressable_shards[0].data.shape == (3, 64)
  with jax.set_mesh(mesh):
    found = jax.device_get(_value_and_grad(placed, params, adapter))
  _same(found, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize('pattern', ['attention/o', 'mlp', '3/mlp/up', 'embedding', 'attention_norm'])
def test_a_target_that_matches_nothing_names_what_there_is(pattern):
  config = AdapterConfig(2, 4.0, ('mlp/*', pattern))
  with pytest.raises(ValueError, match=rf"adapter target '{pattern}' matches nothing.*'attention/q'.*'mlp/up'"):
    adapters.targeted(CONFIG, config)


@pytest.mark.parametrize('change, message', [
    (dict(rank=-1), 'rank=-1'), (dict(alpha=0.0), 'alpha=0.0'), (dict(kind='loha'), r"kind 'loha' unknown; choose"),
    (dict(scaling='1/r'), r"scaling '1/r' unknown; choose from \['alpha/r'"), (dict(base='fp4'), "base 'fp4' unknown"),
])
def test_what_cannot_be_is_refused(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(EVERYTHING, **change)


def test_dora_needs_the_weights():
  with pytest.raises(ValueError, match="kind 'dora' starts from the norms of the frozen weights; give params"):
    adapters.init_adapters(CONFIG, CONFIGS['dora'], jax.random.key(0))


def test_kernels_of_a_mixture_leave_out_experts_and_router():
  mixture = dataclasses.replace(CONFIG, num_experts=4, experts_per_token=2)
  assert set(adapters.kernels(mixture)) == {f'attention/{name}' for name in ('q', 'k', 'v', 'out')}
  assert adapters.kernels(CONFIG)['attention/out'].matrix == (64, 64)
  assert adapters.kernels(CONFIG)['attention/k'].matrix == (64, 32)


# --- quantised weights


@pytest.mark.parametrize('kind, name', [('int8', 'lora'), ('nf4', 'dora')])
def test_quantised_weights_are_their_dense_numbers(kind, name):
  adapter, stored = CONFIGS[name], _params(kind)
  assert isinstance(stored['layers']['mlp']['up']['kernel'], Quantized)
  tree = _moved(_fresh(adapter, stored))
  exact = _merged(stored)
  _same(_fresh(adapter, stored), _fresh(adapter, exact), rtol=1e-5)
  found, expected = _value_and_grad(tree, stored, adapter), _value_and_grad(tree, exact, adapter)
  _same(found, expected, rtol=1e-3, atol=2e-5)
  whole = _logits(_params())[0]
  assert 1e-3 < float(jnp.linalg.norm(_logits(stored)[0] - whole) / jnp.linalg.norm(whole)) < 0.5
  _same(_merged(_joined(adapter, stored, tree)), _merged(_joined(adapter, exact, tree)), rtol=1e-5, atol=1e-6)


def test_quantise_by_pattern():
  stored = adapters.quantize(CONFIG, _params(), 'int8', ('mlp/*', 'attention/out'))
  found = {name for name in adapters.kernels(CONFIG)
           if isinstance(adapters._at(stored['layers'], name)['kernel'], Quantized)}
  assert found == {'mlp/gate', 'mlp/up', 'mlp/down', 'attention/out'}
  with pytest.raises(ValueError, match=r"pattern '0/mlp/up' matches no kernel; choose from \['attention/"):
    adapters.quantize(CONFIG, _params(), 'int8', ('0/mlp/up',))
  odd = dataclasses.replace(CONFIG, mlp_dim=80)
  with pytest.raises(ValueError, match=r"inputs of mlp/down \(80\) do not divide into nf4's blocks of 64"):
    adapters.quantized_names(odd, 'nf4')


@pytest.mark.parametrize('kind', QUANTIZERS)
def test_quantised_weights_on_a_mesh(kind):
  mesh, stored = sharding.make_mesh((2, 2, 2)), _params(kind)
  names = adapters.quantized_names(CONFIG, kind)
  placed = jax.device_put(stored, sharding.shardings(names, stored, mesh))
  up = placed['layers']['mlp']['up']['kernel']
  assert up.codes.addressable_shards[0].data.size * 4 == up.codes.size
  with jax.set_mesh(mesh):
    found = _logits(placed)[0]
  np.testing.assert_allclose(found, _logits(stored)[0], atol=2e-4)


@pytest.mark.parametrize('kind, remat', [('', 'full'), ('int8', 'full'), ('nf4', 'dots')])
def test_memory_does_not_hold_two_dense_layers(kind, remat):
  """Temporaries of a training step over eight layers: neither the stack a second time, nor dense matrices of two."""
  config = TransformerConfig(
      vocab_size=16, num_layers=8, embed_dim=256, num_heads=2, num_kv_heads=2, head_dim=64, mlp_dim=1024, remat=remat,
  )
  layer = 4 * sum(size[0] * size[1] for size in (kernel.matrix for kernel in adapters.kernels(config).values()))

  def params(key):
    made = transformer.init_params(config, key)
    return adapters.quantize(config, made, kind) if kind else made

  def loss(tree, params, tokens):
    joined = adapters.join(config, EVERYTHING, params, tree)
    return jnp.mean(Transformer(config).apply(transformer.variables(joined), tokens, logits_at=()).hidden)

  tree, stored = jax.eval_shape(
      lambda key: (adapters.init_adapters(config, EVERYTHING, key), nn.meta.unbox(params(key))), jax.random.key(0)
  )
  step = jax.jit(jax.grad(loss)).lower(tree, stored, jax.ShapeDtypeStruct((1, 4), jnp.int32)).compile()
  assert step.memory_analysis().temp_size_in_bytes < 2 * layer
