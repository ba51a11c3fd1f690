import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec as P

from srm_jax.losses import vocabulary

LOGITS = jnp.array([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 1.0, -2.0]])
TARGETS = jnp.array([3, 1])


def mesh():
  return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ('data', 'tensor'))


def every_function(logits, targets, axis_name=None):
  """A sum that depends on the logits through each reduction: [..., V] -> [...]."""
  log_p = vocabulary.log_softmax(logits, axis_name=axis_name)
  ids = vocabulary.vocab_ids(logits, axis_name=axis_name).astype(jnp.float32)
  weighted = vocabulary.vocab_sum(jnp.exp(log_p) * (log_p + ids[None, :]), axis_name=axis_name)
  chosen = vocabulary.select(log_p, targets, axis_name=axis_name)
  return weighted + 3 * chosen + vocabulary.log_normalizer(logits, axis_name=axis_name)


def test_log_softmax_matches_jax_and_survives_large_logits():
  logits = LOGITS * 1e4
  np.testing.assert_allclose(vocabulary.log_softmax(logits), jax.nn.log_softmax(logits), rtol=1e-6)
  np.testing.assert_allclose(vocabulary.log_normalizer(LOGITS), jax.nn.logsumexp(LOGITS, axis=-1), rtol=1e-6)


def test_log_probs_are_float32_whatever_the_logits():
  assert vocabulary.log_softmax(LOGITS.astype(jnp.bfloat16)).dtype == jnp.float32
  assert vocabulary.log_normalizer(LOGITS.astype(jnp.bfloat16)).dtype == jnp.float32


def test_maximum_has_no_gradient():
  np.testing.assert_array_equal(jax.grad(lambda x: vocabulary.vocab_max(x).sum())(LOGITS), jnp.zeros_like(LOGITS))


def test_gradient_of_the_normalizer_is_the_softmax():
  gradient = jax.grad(lambda x: vocabulary.log_normalizer(x).sum())(LOGITS)
  np.testing.assert_allclose(gradient, jax.nn.softmax(LOGITS), atol=1e-6)


def test_select_picks_the_target_and_sends_its_gradient_there():
  np.testing.assert_array_equal(vocabulary.select(LOGITS, TARGETS), [-1.0, 3.0])
  gradient = jax.grad(lambda x: vocabulary.select(x, TARGETS).sum())(LOGITS)
  np.testing.assert_array_equal(gradient, jax.nn.one_hot(TARGETS, 4))


def test_select_outside_the_vocabulary_is_zero():
  np.testing.assert_array_equal(vocabulary.select(LOGITS, jnp.array([-1, 4])), [0.0, 0.0])


@pytest.mark.parametrize('gradient_inside', [False, True])
def test_split_vocabulary_equals_whole_one_in_values_and_gradients(gradient_inside):
  split, rows = P('data', 'tensor'), P('data')

  def local(logits, targets):
    return every_function(logits, targets, axis_name='tensor')

  def local_with_gradient(logits, targets):
    gradient = jax.grad(lambda x: local(x, targets).sum())(logits)
    return local(logits, targets), gradient

  if gradient_inside:
    both = jax.shard_map(local_with_gradient, mesh=mesh(), in_specs=(split, rows), out_specs=(rows, split))
    values, gradient = jax.jit(both)(LOGITS, TARGETS)
  else:
    sharded = jax.jit(jax.shard_map(local, mesh=mesh(), in_specs=(split, rows), out_specs=rows))
    values = sharded(LOGITS, TARGETS)
    gradient = jax.grad(lambda x: sharded(x, TARGETS).sum())(LOGITS)
  np.testing.assert_allclose(values, every_function(LOGITS, TARGETS), rtol=1e-6)
  expected = jax.grad(lambda x: every_function(x, TARGETS).sum())(LOGITS)
  np.testing.assert_allclose(gradient, expected, atol=1e-6)
