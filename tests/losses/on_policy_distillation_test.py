import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.losses import distillation, on_policy_distillation
from srm_jax.losses.on_policy_distillation import TEACHER_ADVANTAGES
from srm_jax.losses.policy_gradient import SURROGATES

STUDENT = jnp.array([2.0, 1.0, 0.0, -1.0])
TEACHER = jnp.array([1.0, 2.0, 0.5, -0.5])

# r = log p - log q is 1, 2, 3, 4 in the first row; the second is cut to its first and last token.
LOG_Q = jnp.array([[-3.0, -4.0, -5.0, -6.0], [-1.0, -2.0, -1.0, -2.5]])
LOG_P = jnp.array([[-2.0, -2.0, -2.0, -2.0], [-1.5, -9.0, -9.0, -2.0]])
MASK = jnp.array([[1, 1, 1, 1], [1, 0, 0, 1]])


def test_reverse_kl_by_hand():
  advantages = on_policy_distillation.reverse_kl(LOG_P, LOG_Q, MASK)
  np.testing.assert_allclose(advantages, [[1, 2, 3, 4], [-0.5, 0, 0, 0.5]], atol=1e-6)
  discounted = on_policy_distillation.reverse_kl(LOG_P, LOG_Q, MASK, discount=0.5)
  np.testing.assert_allclose(discounted, [[3.25, 4.5, 5, 4], [-0.25, 0, 0, 0.5]], atol=1e-6)


def test_minillm_by_hand():
  advantages = on_policy_distillation.minillm(LOG_P, LOG_Q, MASK)
  np.testing.assert_allclose(advantages, [[9 / 3, 7 / 2, 4, 0], [0.5, 0, 0, 0]], atol=1e-6)
  discounted = on_policy_distillation.minillm(LOG_P, LOG_Q, MASK, discount=0.5)
  np.testing.assert_allclose(discounted, [[2.25 / 3, 2.5 / 2, 2, 0], [0.25, 0, 0, 0]], atol=1e-6)
  released = on_policy_distillation.minillm(LOG_P, LOG_Q, MASK, offset=0)
  np.testing.assert_allclose(released, [[10 / 4, 9 / 3, 7 / 2, 4], [0, 0, 0, 0.5]], atol=1e-6)


@pytest.mark.parametrize('surrogate', SURROGATES)
def test_expected_gradient_is_that_of_reverse_kl_over_the_vocabulary(surrogate):
  def expected_loss(logits):
    log_q = jax.nn.log_softmax(logits)[:, None]
    sampler = jax.lax.stop_gradient(log_q)
    ones = jnp.ones((4, 1))
    advantages = on_policy_distillation.reverse_kl(jax.nn.log_softmax(TEACHER)[:, None], sampler, ones)
    return jnp.sum(jnp.exp(sampler) * SURROGATES[surrogate](log_q, sampler, advantages, ones))

  exact = jax.grad(lambda logits: distillation.reverse_kl(logits, TEACHER))(STUDENT)
  np.testing.assert_allclose(jax.grad(expected_loss)(STUDENT), exact, atol=1e-6)


# A language of two tokens over three words: logits of the first, and of the second after each first.
WORDS = 3
COMPLETIONS = jnp.array(list(itertools.product(range(WORDS), repeat=2)))


def language(seed):
  return jax.random.normal(jax.random.key(seed), (1 + WORDS, WORDS))


def completion_logprobs(logits):
  """[9, 2] log-probabilities of both tokens of every completion."""
  table = jax.nn.log_softmax(logits)
  first, second = COMPLETIONS.T
  return jnp.stack([table[0, first], table[1 + first, second]], axis=1)


@jax.jit
def sequence_kl(logits, teacher):
  log_q, log_p = (completion_logprobs(x).sum(axis=1) for x in (logits, teacher))
  return jnp.sum(jnp.exp(log_q) * (log_q - log_p))


@jax.jit
def expected_surrogate(logits, advantages, sampler):
  """Expectation over completions that `sampler` [9, 2] draws of the importance-sampled loss."""
  ones = jnp.ones_like(sampler)
  loss = SURROGATES['importance_sampling'](completion_logprobs(logits), sampler, advantages, ones)
  return jnp.sum(jnp.exp(sampler.sum(axis=1)) * loss.sum(axis=1))


def test_return_to_go_descends_the_kl_of_completions():
  student, teacher = language(0), language(1)
  sampler = completion_logprobs(student)
  advantages = on_policy_distillation.reverse_kl(
      completion_logprobs(teacher), sampler, jnp.ones((9, 2)), discount=1.0
  )
  gradient = jax.grad(expected_surrogate)(student, advantages, sampler)
  np.testing.assert_allclose(gradient, jax.grad(sequence_kl)(student, teacher), atol=1e-6)
  shortsighted = on_policy_distillation.reverse_kl(completion_logprobs(teacher), sampler, jnp.ones((9, 2)))
  assert not np.allclose(jax.grad(expected_surrogate)(student, shortsighted, sampler), gradient, atol=1e-2)


def test_minillm_and_its_single_step_term_descend_the_kl_of_completions():
  student, teacher = language(0), language(1)
  sampler = completion_logprobs(student)
  long_term = on_policy_distillation.minillm(completion_logprobs(teacher), sampler, jnp.ones((9, 2)))
  visits = jnp.concatenate([jnp.ones(1), jnp.exp(jax.nn.log_softmax(student)[0])])

  def loss(logits):
    single_step = jnp.sum(visits * distillation.reverse_kl(logits, teacher))
    return single_step + expected_surrogate(logits, long_term, sampler)

  np.testing.assert_allclose(jax.grad(loss)(student), jax.grad(sequence_kl)(student, teacher), atol=1e-6)


def test_mixture_is_what_samples_and_its_ratio_corrects_for_it():
  log_q, log_p = (jax.nn.log_softmax(x)[:, None] for x in (STUDENT, TEACHER))
  log_mixture = on_policy_distillation.mixture(log_p, log_q, teacher_share=0.2)
  np.testing.assert_allclose(jnp.exp(log_mixture), 0.2 * jnp.exp(log_p) + 0.8 * jnp.exp(log_q), rtol=1e-6)
  assert np.max(jnp.exp(log_q - log_mixture)) <= 1 / 0.8
  advantages = on_policy_distillation.reverse_kl(log_p, log_q, jnp.ones((4, 1)))

  def expected_loss(logits):
    logprobs = jax.nn.log_softmax(logits)[:, None]
    loss = SURROGATES['importance_sampling'](logprobs, log_mixture, advantages, jnp.ones((4, 1)))
    return jnp.sum(jnp.exp(log_mixture) * loss)

  exact = jax.grad(lambda logits: distillation.reverse_kl(logits, TEACHER))(STUDENT)
  np.testing.assert_allclose(jax.grad(expected_loss)(STUDENT), exact, atol=1e-6)


def test_mixture_ends_at_student_and_teacher():
  for share, expected in ((0, LOG_Q), (1.0, LOG_P)):
    got = on_policy_distillation.mixture(LOG_P, LOG_Q, teacher_share=share)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    traced = jax.jit(lambda a: on_policy_distillation.mixture(LOG_P, LOG_Q, teacher_share=a))(share)
    np.testing.assert_allclose(traced, expected, rtol=1e-6)
  gradient = jax.grad(lambda q: on_policy_distillation.mixture(LOG_P, q, teacher_share=0.2).sum())(LOG_Q)
  assert not np.any(gradient)
  with pytest.raises(ValueError, match='teacher_share 1.2 of mixture'):
    on_policy_distillation.mixture(LOG_P, LOG_Q, teacher_share=1.2)
  with pytest.raises(AssertionError):
    on_policy_distillation.mixture(LOG_P, LOG_Q[:1], teacher_share=0.2)


@pytest.mark.parametrize('name', TEACHER_ADVANTAGES)
def test_contract(name):
  advantage = TEACHER_ADVANTAGES[name]
  arrays = [LOG_P, LOG_Q, MASK]
  assert advantage(LOG_P.astype(jnp.bfloat16), LOG_Q.astype(jnp.bfloat16), MASK > 0).dtype == jnp.float32
  assert not np.any(advantage(LOG_Q, LOG_Q, MASK)) and not np.any(advantage(LOG_P, LOG_Q, 0 * MASK))
  for gradient in jax.grad(lambda p, q: advantage(p, q, MASK).sum(), argnums=(0, 1))(LOG_P, LOG_Q):
    np.testing.assert_array_equal(gradient, jnp.zeros_like(LOG_P))
  for garbage in (np.nan, np.inf, -np.inf):
    dirty = (jnp.where(MASK > 0, array, garbage) for array in arrays[:2])
    np.testing.assert_array_equal(advantage(*dirty, MASK), advantage(*arrays))
  for i in range(3):
    with pytest.raises(AssertionError):
      advantage(*(array[:, :1] if i == j else array for j, array in enumerate(arrays)))
  with pytest.raises(AssertionError):
    advantage(*(array[0] for array in arrays))
  with pytest.raises(ValueError, match=f'discount 1.5 of {name}'):
    advantage(*arrays, discount=1.5)


def test_an_offset_that_is_no_paper_raises():
  with pytest.raises(ValueError, match='offset 2 of minillm'):
    on_policy_distillation.minillm(LOG_P, LOG_Q, MASK, offset=2)
