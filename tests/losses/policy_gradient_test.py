import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.losses import policy_gradient, reductions
from srm_jax.losses.policy_gradient import SURROGATES

STUDENT = jnp.array([2.0, 1.0, 0.0, -1.0])
TEACHER = jnp.array([1.0, 2.0, 0.5, -0.5])
REVERSE_GRADIENT = np.array([0.420199, -0.319183, -0.073849, -0.027167])

# Completions of lengths 3 and 2; the last token of the second is masked.
LOGPROBS = jnp.array([[-0.5, -1.0, -0.2], [-1.0, -2.0, -0.3]])
OLD = jnp.array([[-0.6, -0.9, -0.4], [-1.2, -1.8, -0.9]])
ADVANTAGES = jnp.array([[1.0, 1.0, 1.0], [-2.0, -2.0, -2.0]])
MASK = jnp.array([[1, 1, 1], [1, 1, 0]])


def at_ratio(ratio, advantage, **options):
  """(value, gradient on log pi) of `clipped` for one token with pi / pi_old = ratio."""
  ones = jnp.ones((1, 1))

  def loss(logprobs):
    return policy_gradient.clipped(logprobs, -ones, advantage * ones, ones, **options)[0, 0]

  value, gradient = jax.value_and_grad(loss)(jnp.log(ratio) - ones)
  return value, gradient[0, 0]


def gradient_of(name, logprobs=LOGPROBS, **options):
  return jax.grad(lambda x: SURROGATES[name](x, OLD, ADVANTAGES, MASK, **options).sum())(logprobs)


@pytest.mark.parametrize(
    'advantage, ratio, value, gradient',
    [
        (1.0, 0.5, -0.5, -0.5),
        (1.0, 1.0, -1.0, -1.0),
        (1.0, 1.5, -1.2, 0.0),
        (-1.0, 0.5, 0.8, 0.0),
        (-1.0, 1.0, 1.0, 1.0),
        (-1.0, 1.5, 1.5, 1.5),
    ],
)
def test_clip_gradient_truth_table(advantage, ratio, value, gradient):
  np.testing.assert_allclose(at_ratio(ratio, advantage), (value, gradient), atol=1e-6)


def test_clip_bounds_are_separate():
  np.testing.assert_allclose(at_ratio(1.5, 1.0, clip_high=0.6), (-1.5, -1.5), atol=1e-6)
  np.testing.assert_allclose(at_ratio(1.5, 1.0, clip_low=0.6), (-1.2, 0.0), atol=1e-6)
  np.testing.assert_allclose(at_ratio(0.5, -1.0, clip_low=0.6), (0.5, 0.5), atol=1e-6)
  np.testing.assert_allclose(at_ratio(0.5, -1.0, clip_high=0.6), (0.8, 0.0), atol=1e-6)


def test_dual_clip_bounds_negative_advantages_only():
  np.testing.assert_allclose(at_ratio(2.5, -1.0, dual_clip=3.0), (2.5, 2.5), atol=1e-6)
  np.testing.assert_allclose(at_ratio(4.0, -1.0, dual_clip=3.0), (3.0, 0.0), atol=1e-6)
  np.testing.assert_allclose(at_ratio(4.0, 1.0, dual_clip=3.0), at_ratio(4.0, 1.0), atol=1e-6)
  np.testing.assert_allclose(at_ratio(0.5, 1.0, dual_clip=3.0), (-0.5, -0.5), atol=1e-6)


def test_reinforce_by_hand():
  np.testing.assert_allclose(policy_gradient.reinforce(LOGPROBS, OLD, ADVANTAGES, MASK), -ADVANTAGES * LOGPROBS * MASK)
  np.testing.assert_allclose(gradient_of('reinforce'), -ADVANTAGES * MASK)


def test_importance_sampling_by_hand():
  expected = -jnp.exp(LOGPROBS - OLD) * ADVANTAGES * MASK
  np.testing.assert_allclose(policy_gradient.importance_sampling(LOGPROBS, OLD, ADVANTAGES, MASK), expected, rtol=1e-6)
  np.testing.assert_allclose(gradient_of('importance_sampling'), expected, rtol=1e-6)


def test_cispo_caps_the_weight_and_keeps_every_gradient():
  ratio = jnp.exp(LOGPROBS - OLD)
  expected = -jnp.minimum(ratio, 1.1) * ADVANTAGES * MASK
  np.testing.assert_allclose(gradient_of('cispo', max_ratio=1.1), expected, rtol=1e-6)
  value = policy_gradient.cispo(LOGPROBS, OLD, ADVANTAGES, MASK, max_ratio=1.1)
  np.testing.assert_allclose(value, expected * LOGPROBS, rtol=1e-6)
  assert np.any(ratio > 1.1)


def test_gspo_golden_ratio_and_truth_of_its_clip():
  wide = {'clip_low': 0.5, 'clip_high': 0.5}
  value = policy_gradient.gspo(LOGPROBS, OLD, ADVANTAGES, MASK, **wide)
  np.testing.assert_allclose(value[0], -1.0689391 * jnp.ones(3), atol=1e-6)
  np.testing.assert_allclose(value[1], [2.0, 2.0, 0.0], atol=1e-6)
  np.testing.assert_allclose(gradient_of('gspo', **wide), value, atol=1e-6)
  # s = 1.0689 with a positive advantage is past the clip as a whole, also where the token's own ratio is below 1.
  np.testing.assert_array_equal(gradient_of('gspo')[0], jnp.zeros(3))


def test_gspo_token_form_has_the_gradient_of_the_sequence_form():
  def token_form(logprobs):
    loss = policy_gradient.gspo(logprobs, OLD, ADVANTAGES, MASK, clip_low=0.5, clip_high=0.5)
    total, count = reductions.sequence_mean_token_mean(loss, MASK)
    return total / count

  def sequence_form(logprobs):
    ratio = jnp.exp(jnp.sum((logprobs - OLD) * MASK, axis=-1) / jnp.sum(MASK, axis=-1))
    return -jnp.mean(ratio * ADVANTAGES[:, 0])

  np.testing.assert_allclose(token_form(LOGPROBS), sequence_form(LOGPROBS), rtol=1e-6)
  np.testing.assert_allclose(jax.grad(token_form)(LOGPROBS), jax.grad(sequence_form)(LOGPROBS), atol=1e-6)


@pytest.mark.parametrize('name', SURROGATES)
def test_expected_gradient_on_policy_is_the_full_vocabulary_reverse_kl_gradient(name):
  def expected_loss(logits):
    logprobs = jax.nn.log_softmax(logits)[:, None]
    sampler = jax.lax.stop_gradient(logprobs)
    advantages = jax.nn.log_softmax(TEACHER)[:, None] - sampler
    loss = SURROGATES[name](logprobs, sampler, advantages, jnp.ones((4, 1)))
    return jnp.sum(jnp.exp(sampler) * loss)

  np.testing.assert_allclose(jax.grad(expected_loss)(STUDENT), REVERSE_GRADIENT, atol=1e-6)


@pytest.mark.parametrize('name', SURROGATES)
def test_only_logprobs_receive_a_gradient(name):
  def loss(logprobs, sampler, advantages, old):
    return SURROGATES[name](logprobs, sampler, advantages, MASK, old_logprobs=old).sum()

  gradients = jax.grad(loss, argnums=(0, 1, 2, 3))(OLD, LOGPROBS, ADVANTAGES, OLD)
  assert np.any(gradients[0])
  for gradient in gradients[1:]:
    np.testing.assert_array_equal(gradient, jnp.zeros_like(OLD))


@pytest.mark.parametrize('name', SURROGATES)
def test_old_logprobs_stand_in_for_the_samplers(name):
  given = SURROGATES[name](LOGPROBS, LOGPROBS - 1, ADVANTAGES, MASK, old_logprobs=OLD)
  np.testing.assert_array_equal(given, SURROGATES[name](LOGPROBS, OLD, ADVANTAGES, MASK))


@pytest.mark.parametrize('name', SURROGATES)
@pytest.mark.parametrize('garbage', [np.nan, np.inf, -np.inf])
def test_nothing_outside_the_mask_is_seen(name, garbage):
  dirty = [jnp.where(MASK > 0, array, garbage) for array in (LOGPROBS, OLD, ADVANTAGES)]

  def loss(logprobs, sampler, advantages):
    return SURROGATES[name](logprobs, sampler, advantages, MASK)

  np.testing.assert_array_equal(loss(*dirty), loss(LOGPROBS, OLD, ADVANTAGES))
  gradient = jax.grad(lambda x: loss(x, *dirty[1:]).sum())(dirty[0])
  np.testing.assert_array_equal(gradient, gradient_of(name))
  assert gradient[1, 2] == 0


@pytest.mark.parametrize('name', SURROGATES)
def test_extreme_ratios_and_empty_rows_stay_finite(name):
  for logprobs, mask in ((OLD + 1000, MASK), (OLD - 1000, MASK), (OLD, 0 * MASK)):
    value, gradient = jax.value_and_grad(lambda x: SURROGATES[name](x, OLD, ADVANTAGES, mask).sum())(logprobs)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


@pytest.mark.parametrize('name', SURROGATES)
def test_contract(name):
  arrays = [LOGPROBS, OLD, ADVANTAGES, MASK]
  values = SURROGATES[name](*(array.astype(jnp.bfloat16) for array in arrays[:3]), MASK > 0)
  assert values.shape == MASK.shape and values.dtype == jnp.float32
  for i in range(4):
    with pytest.raises(AssertionError):
      SURROGATES[name](*(array[:, :1] if i == j else array for j, array in enumerate(arrays)))
  with pytest.raises(AssertionError):
    SURROGATES[name](*arrays, old_logprobs=OLD[:1])
  with pytest.raises(AssertionError):
    SURROGATES[name](*(array[0] for array in arrays))


@pytest.mark.parametrize(
    'name, options',
    [
        ('clipped', {'clip_low': -0.2}),
        ('clipped', {'clip_high': -0.2}),
        ('clipped', {'dual_clip': 1.0}),
        ('cispo', {'max_ratio': 0.0}),
        ('gspo', {'clip_high': -1e-4}),
        ('sapo', {'positive': 0.0}),
    ],
)
def test_bad_options_raise(name, options):
  with pytest.raises(ValueError, match=f'{next(iter(options))}.* of {name}'):
    SURROGATES[name](LOGPROBS, OLD, ADVANTAGES, MASK, **options)


@pytest.mark.parametrize('advantage, tau', [(1.0, 1.0), (-1.0, 1.05)])
@pytest.mark.parametrize('ratio', [0.5, 1.0, 1.5])
def test_sapo_fades_as_the_ratio_leaves_one(advantage, tau, ratio):
  """d/d log pi of -(4 / tau) sigmoid(tau (rho - 1)) A is -4 s (1 - s) rho A: the policy gradient where rho is 1."""
  ones = jnp.ones((1, 1))
  loss = lambda logprobs: policy_gradient.sapo(logprobs, -ones, advantage * ones, ones)[0, 0]
  value, gradient = jax.value_and_grad(loss)(jnp.log(ratio) - ones)
  gate = 1 / (1 + np.exp(-tau * (ratio - 1)))
  np.testing.assert_allclose(value, -4 / tau * gate * advantage, rtol=1e-5)
  np.testing.assert_allclose(gradient[0, 0], -4 * gate * (1 - gate) * ratio * advantage, rtol=1e-5)


def test_importance_weights_are_ratios_up_to_a_cap():
  old, sampler = jnp.log(jnp.array([[0.5, 0.3, 0.2]])), jnp.log(jnp.array([[0.4, 0.1, jnp.nan]]))
  weights = policy_gradient.truncated_importance(old, sampler, jnp.array([[1, 1, 0]]))
  np.testing.assert_allclose(weights, [[1.25, 2.0, 1.0]], rtol=1e-6)
  wide = policy_gradient.truncated_importance(old, sampler, jnp.array([[1, 1, 0]]), cap=5.0)
  np.testing.assert_allclose(wide, [[1.25, 3.0, 1.0]], rtol=1e-6)
  gradient = jax.grad(lambda x: policy_gradient.truncated_importance(x, OLD, MASK).sum())(LOGPROBS)
  np.testing.assert_array_equal(gradient, jnp.zeros_like(LOGPROBS))
  with pytest.raises(ValueError, match='cap 0.0 of the importance weights'):
    policy_gradient.truncated_importance(LOGPROBS, OLD, MASK, cap=0.0)
