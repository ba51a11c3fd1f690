import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.losses import reductions
from srm_jax.losses.reductions import DENOMINATORS, REDUCTIONS
from srm_jax.types import Mean

VALUES = jnp.array([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0], [5.0, 11.0, 9.0], [9.0, 9.0, 9.0]])
MASK = jnp.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]])
OPTIONS = {'token_mean': {}, 'sequence_mean_token_mean': {}, 'fixed_length': {'max_length': 5}}


def reduce(name, values=VALUES, mask=MASK):
  return REDUCTIONS[name](values, mask, **OPTIONS[name])


def test_every_reduction_has_a_denominator_and_is_tested():
  assert REDUCTIONS.keys() == DENOMINATORS.keys() == OPTIONS.keys()


@pytest.mark.parametrize(
    'name, total, count', [('token_mean', 26, 6), ('sequence_mean_token_mean', 14, 3), ('fixed_length', 26, 15)]
)
def test_values_by_hand(name, total, count):
  np.testing.assert_allclose(reduce(name), (total, count), rtol=1e-6)


@pytest.mark.parametrize('name', REDUCTIONS)
def test_denominator_is_the_count_from_the_mask_alone(name):
  result = reduce(name)
  assert isinstance(result, Mean)
  np.testing.assert_array_equal(DENOMINATORS[name](MASK, **OPTIONS[name]), result.count)


@pytest.mark.parametrize('name', REDUCTIONS)
@pytest.mark.parametrize('parts', [2, 4])
def test_totals_counts_and_gradients_add_over_strided_microbatches(name, parts):
  whole = reduce(name)
  pieces = [reduce(name, VALUES[i::parts], MASK[i::parts]) for i in range(parts)]
  np.testing.assert_allclose([sum(p.total for p in pieces), sum(p.count for p in pieces)], whole, rtol=1e-6)

  count = DENOMINATORS[name](MASK, **OPTIONS[name])
  expected = jax.grad(lambda values: (lambda mean: mean.total / mean.count)(reduce(name, values)))(VALUES)
  for i in range(parts):
    gradient = jax.grad(lambda values: reduce(name, values, MASK[i::parts]).total / count)(VALUES[i::parts])
    np.testing.assert_allclose(gradient, expected[i::parts], rtol=1e-6)


@pytest.mark.parametrize('name', REDUCTIONS)
def test_mean_of_microbatch_means_would_be_wrong(name):
  whole = reduce(name)
  pieces = [reduce(name, VALUES[i::2], MASK[i::2]) for i in range(2)]
  assert abs(sum(p.total / p.count for p in pieces) / 2 - whole.total / whole.count) > 0.05


@pytest.mark.parametrize('name', REDUCTIONS)
def test_constant_values_keep_their_size_and_padding_changes_nothing(name):
  ones = reduce(name, jnp.ones_like(VALUES))
  expected = 6 / 15 if name == 'fixed_length' else 1.0
  np.testing.assert_allclose(ones.total / ones.count, expected, rtol=1e-6)
  padded = reduce(name, jnp.pad(VALUES, ((0, 2), (0, 3))), jnp.pad(MASK, ((0, 2), (0, 3))))
  np.testing.assert_allclose(padded, reduce(name), rtol=1e-6)


@pytest.mark.parametrize('name', REDUCTIONS)
def test_nothing_outside_the_mask_is_seen(name):
  dirty = jnp.where(MASK > 0, VALUES, jnp.nan)
  np.testing.assert_array_equal(reduce(name, dirty), reduce(name))
  gradient = jax.grad(lambda values: reduce(name, values).total)(dirty)
  assert np.all((np.asarray(gradient) != 0) == (np.asarray(MASK) > 0))


@pytest.mark.parametrize('name', REDUCTIONS)
def test_contract(name):
  total, count = reduce(name, VALUES.astype(jnp.bfloat16), MASK > 0)
  assert total.shape == count.shape == () and total.dtype == count.dtype == jnp.float32
  np.testing.assert_array_equal(reduce(name, VALUES, 0 * MASK), (0.0, 0.0))
  with pytest.raises(AssertionError):
    reduce(name, VALUES[:, :2])
  with pytest.raises(AssertionError):
    reduce(name, VALUES[0], MASK[0])
  with pytest.raises(AssertionError):
    DENOMINATORS[name](MASK[0], **OPTIONS[name])


def test_token_mean_counts_exactly_where_bfloat16_would_not():
  assert reductions.count_tokens(jnp.ones((3, 1001), jnp.bfloat16)) == 3003


def test_fixed_length_needs_a_positive_length():
  with pytest.raises(ValueError, match='max_length 0 of fixed_length'):
    REDUCTIONS['fixed_length'](VALUES, MASK, max_length=0)
  with pytest.raises(TypeError):
    REDUCTIONS['fixed_length'](VALUES, MASK)
