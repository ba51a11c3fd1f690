"""Codes by hand, the table by the quantiles that it is made of, errors within half of the widest gap, gradients."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.models import quantization
from srm_jax.models.quantization import BLOCK, NF4, QUANTIZERS, Quantized, dequantize, quantize


def test_the_table_is_made_of_normal_quantiles():
  """Eight evenly spaced probabilities above one half and seven below, up to that of the outermost value."""
  outermost = (1 - 1 / 30 + 1 - 1 / 32) / 2
  quantile = statistics.NormalDist().inv_cdf
  above = [quantile(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
  below = [-quantile(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
  expected = np.sort(np.array([*above, 0.0, *below])) / above[0]
  np.testing.assert_allclose(NF4, expected, atol=1e-6)
  assert NF4[7] == 0.0 and NF4[0] == -1.0 and NF4[15] == 1.0


def test_int8_by_hand():
  stored = quantize(jnp.array([[1.0, -4.0, 0.0], [-0.5, 2.01, 0.0]]), 'int8')
  np.testing.assert_array_equal(stored.codes, [[127, -127, 0], [-64, 64, 0]])  # -63.5 goes to the even code
  np.testing.assert_array_equal(stored.absmax, [[1.0, 4.0, 0.0]])
  np.testing.assert_allclose(dequantize(stored), [[1, -4, 0], [-64 / 127, 256 / 127, 0]], rtol=1e-6)


def test_nf4_by_hand():
  """Two blocks of one output: values that are in the table come back exactly, two codes share a byte."""
  block = jnp.tile(jnp.array(NF4), BLOCK // 16)
  stored = quantize(jnp.concatenate([block, -4 * block])[:, None], 'nf4')
  assert stored.codes.dtype == jnp.uint8 and stored.codes.shape == (BLOCK, 1)
  np.testing.assert_array_equal(stored.codes[:8, 0], [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF])
  np.testing.assert_array_equal(stored.absmax[:, 0], [1.0, 4.0])
  found = dequantize(stored)[:, 0]
  np.testing.assert_array_equal(found[:BLOCK], block)
  between = jnp.zeros((BLOCK, 1)).at[:3, 0].set(jnp.array([1.0, 0.0397, 0.0399]))  # either side of NF4[8] / 2
  np.testing.assert_array_equal(dequantize(quantize(between, 'nf4'))[:3, 0], np.float32([1, 0, NF4[8]]))


def test_both_lookups_agree():
  codes = jnp.arange(16, dtype=jnp.uint8)
  np.testing.assert_array_equal(quantization._lookup(codes), np.float32(NF4))
  np.testing.assert_array_equal(quantization._lookup_by_selects(codes), np.float32(NF4))


@pytest.mark.parametrize('kind, bound, typical', [('int8', 1 / 254, 0.02), ('nf4', (NF4[1] - NF4[0]) / 2, 0.12)])
def test_errors_are_bounded(kind, bound, typical):
  """By half of the widest gap times the absmax, and relative to normally distributed values of what the paper says."""
  matrix = jax.random.normal(jax.random.key(0), (3, 2 * BLOCK, 5))
  stored = quantize(matrix, kind)
  assert stored.codes.shape[0] == stored.absmax.shape[0] == 3
  found = jnp.stack([dequantize(jax.tree.map(lambda leaf: leaf[i], stored)) for i in range(3)])
  absmax = jnp.repeat(stored.absmax, 2 * BLOCK // stored.absmax.shape[1], axis=1)
  assert float(jnp.max(jnp.abs(found - matrix) / absmax)) <= bound * 1.0001
  relative = float(jnp.linalg.norm(found - matrix) / jnp.linalg.norm(matrix))
  assert typical / 4 < relative < typical


@pytest.mark.parametrize('kind', QUANTIZERS)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_product_and_its_gradient_are_those_of_the_dense_matrix(kind, dtype):
  stored = quantize(jax.random.normal(jax.random.key(0), (BLOCK, 6)), kind)
  x = jax.random.normal(jax.random.key(1), (2, 3, BLOCK)).astype(dtype)
  weights = jnp.arange(1.0, 7.0)[None, None].astype(dtype)
  gradient = jax.grad(lambda x, f: jnp.sum(f(x) * weights).astype(jnp.float32))
  exact = lambda x: x @ dequantize(stored, dtype)
  np.testing.assert_array_equal(quantization.matmul(x, stored), exact(x))
  np.testing.assert_array_equal(
      gradient(x, lambda x: quantization.matmul(x, stored)), gradient(x, exact)
  )


@pytest.mark.parametrize('kind', QUANTIZERS)
def test_no_dense_matrix_waits_for_the_backward_pass(kind):
  """Whatever the block's remat keeps: between the passes lie codes and absmax alone."""
  stored = quantize(jax.random.normal(jax.random.key(0), (4 * BLOCK, 32)), kind)
  kept = jax.eval_shape(
      lambda x, stored: jax.vjp(lambda x: quantization.matmul(x, stored), x)[1], jnp.ones((1, 4 * BLOCK)), stored
  )
  bytes_of = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  assert bytes_of(kept) <= bytes_of(stored) < 4 * BLOCK * 32 * 4 / 3


def test_what_cannot_be_quantised():
  with pytest.raises(ValueError, match=r"quantization 'int4' unknown; choose from \['int8', 'nf4'\]"):
    quantize(jnp.ones((64, 2)), 'int4')
  with pytest.raises(ValueError, match='80 inputs do not divide into blocks of 64'):
    quantize(jnp.ones((80, 2)), 'nf4')


def test_zero_blocks_stay_zero():
  for kind in QUANTIZERS:
    stored = quantize(jnp.zeros((BLOCK, 2)), kind)
    assert isinstance(stored, Quantized) and not np.any(dequantize(stored))
