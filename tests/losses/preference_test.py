"""Golden and hand values, gradients by finite differences, and the same numbers as TRL's own code."""

import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.losses import preference
from srm_jax.losses.preference import PREFERENCES, REFERENCED, UNPAIRED, Scores

OPTIONS = {
    'dpo': dict(beta=0.3, label_smoothing=0.1), 'ipo': dict(beta=0.5), 'simpo': dict(beta=2.0, gamma=0.7),
    'kto': dict(beta=0.3, baseline=0.4, desirable_weight=1.3, undesirable_weight=0.8), 'orpo': dict(beta=0.2),
}


def arrays(*values):
  return [np.array(value, np.float32).reshape(-1) for value in values]


def pair(chosen, rejected, reference_chosen, reference_rejected, lengths=(1, 1)):
  first, second, ours, theirs, *counts = arrays(chosen, rejected, reference_chosen, reference_rejected, *lengths)
  return Scores(first, counts[0], ours), Scores(second, counts[1], theirs)


def random_scores(name, pairs=6, seed=0):
  """Scores as of completions of 3 to 12 tokens; reference-free losses get no reference."""
  rng = np.random.default_rng(seed)
  made = []
  for _ in range(2):
    lengths = rng.integers(3, 13, pairs)
    logprobs, reference = (-lengths * rng.uniform(0.2, 2.0, pairs) for _ in range(2))
    logprobs, lengths, reference = arrays(logprobs, lengths, reference)
    made.append(Scores(logprobs, lengths, reference if name in REFERENCED else None))
  return made


def losses(name, chosen, rejected, **options):
  return PREFERENCES[name](chosen, rejected, **{**OPTIONS[name], **options})


def log_sigmoid(x):
  return -np.log1p(np.exp(-np.asarray(x, np.float64)))


GOLDEN = pair(-10, -14, -11, -12)  # ratios 1 and -2


def test_dpo_golden_value():
  np.testing.assert_allclose(preference.dpo(*GOLDEN, beta=0.1), [0.5543552445], atol=1e-7)
  smoothed = 0.9 * 0.5543552445 + 0.1 * 0.8543552445  # -log sigmoid(-x) = -log sigmoid(x) + x, x = 0.3
  np.testing.assert_allclose(preference.dpo(*GOLDEN, beta=0.1, label_smoothing=0.1), [smoothed], atol=1e-6)


def test_ipo_by_hand():
  """1 / 2 - (-2 / 4) - 1 / (2 0.25) = -1 with lengths 2 and 4."""
  np.testing.assert_allclose(preference.ipo(*pair(-10, -14, -11, -12, (2, 4)), beta=0.25), [1.0], atol=1e-6)
  # At the target the loss and its gradient are 0: that is where it stops, unlike DPO.
  at_target = pair(-8, -14, -10, -14)
  value, gradient = jax.value_and_grad(lambda x: preference.ipo(x, at_target[1], beta=0.25).sum())(at_target[0])
  assert value == 0 and gradient.logprobs[0] == 0


def test_simpo_by_hand():
  """Means -2 and -7, beta 0.2: 1 - gamma, whatever the reference says."""
  chosen, rejected = pair(-10, -14, 0, 0, (5, 2))
  expected = -log_sigmoid(0.2 * 5 - 0.5)
  for reference in (None, np.full(1, -3, np.float32)):
    ours, theirs = (scores._replace(reference_logprobs=reference) for scores in (chosen, rejected))
    np.testing.assert_allclose(preference.simpo(ours, theirs, beta=0.2, gamma=0.5), [expected], rtol=1e-6)


def test_orpo_by_hand():
  """p+ = 0.8 and p- = 0.5 a token: odds 4 and 1."""
  chosen, rejected = pair(3 * np.log(0.8), 2 * np.log(0.5), 0, 0, (3, 2))
  expected = -np.log(0.8) - 0.1 * np.log(4 / 5)  # sigmoid(log 4) = 4 / 5
  np.testing.assert_allclose(preference.orpo(chosen, rejected, beta=0.1), [expected], rtol=1e-5)


@pytest.mark.parametrize('certain', [0.0, -1e-9, -1e-3, -300.0])
def test_orpo_is_finite_where_a_completion_is_certain_or_impossible(certain):
  def loss(logprobs):
    return preference.orpo(Scores(logprobs, jnp.ones(1)), Scores(logprobs / 2, jnp.ones(1)), beta=0.1)[0]

  value, gradient = jax.value_and_grad(loss)(jnp.array([certain], jnp.float32))
  assert np.isfinite(value) and np.all(np.isfinite(gradient)) and gradient[0] < 0  # cross-entropy still pulls


def test_kto_by_hand():
  """Desirable ratio 1, undesirable -2, z0 0.5, beta 2: sigmoid(-1) and sigmoid(-5), weighted."""
  value = preference.kto(*GOLDEN, baseline=0.5, beta=2.0, desirable_weight=3.0, undesirable_weight=5.0)
  np.testing.assert_allclose(value, [3 / (1 + np.exp(1)), 5 / (1 + np.exp(5))], rtol=1e-6)


def test_kto_needs_no_pairs():
  ours, theirs = random_scores('kto', 5)[0], random_scores('kto', 2, seed=1)[1]
  value = losses('kto', ours, theirs)
  assert value.shape == (7,)
  first = losses('kto', jax.tree.map(lambda x: x[:1], ours), theirs)
  np.testing.assert_allclose(first, value[jnp.array([0, 5, 6])], rtol=1e-6)


@pytest.mark.parametrize('ratios, weights, expected', [
    ([1.0, 3.0], [1, 1], 2.0), ([1.0, 3.0], [1, 0], 1.0), ([-1.0, -3.0], [1, 1], 0.0), ([1.0, -3.0], [1, 1], 0.0),
    ([1.0, 3.0], [0, 0], 0.0), ([1.0, np.nan], [1, 0], 1.0),
])
def test_the_baseline_is_a_mean_that_is_never_negative(ratios, weights, expected):
  logprobs, weights = arrays(ratios, weights)
  scores = Scores(logprobs - 5, np.ones(2, np.float32), np.full(2, -5, np.float32))
  assert preference.kl_baseline(scores, weights) == pytest.approx(expected)


def test_no_gradient_flows_through_the_baseline():
  def loss(logprobs, baseline):
    scores = Scores(logprobs, jnp.ones(1), jnp.full(1, -1.0))
    estimated = preference.kl_baseline(scores, jnp.ones(1))
    return preference.kto(*GOLDEN, baseline=estimated + baseline, beta=0.1).sum()

  assert loss(jnp.zeros(1), 0.0) != loss(jnp.ones(1), 0.0)
  gradients = jax.grad(loss, argnums=(0, 1))(jnp.zeros(1), 1.0)
  assert gradients[0][0] == 0 and gradients[1] == 0


def by_logprobs(name, chosen, rejected):
  """(loss, its gradients) by the log-probabilities of both."""
  def loss(ours, theirs):
    return losses(name, chosen._replace(logprobs=ours), rejected._replace(logprobs=theirs)).sum()

  return loss, jax.grad(loss, argnums=(0, 1))(chosen.logprobs, rejected.logprobs)


@pytest.mark.parametrize('name', PREFERENCES)
def test_a_step_down_makes_chosen_likelier_and_rejected_less_so(name):
  chosen, rejected = random_scores(name)
  if name in ('ipo', 'dpo'):  # short of the target, to which ipo and smoothed dpo come back from beyond
    chosen = chosen._replace(logprobs=chosen.reference_logprobs)
    rejected = rejected._replace(logprobs=rejected.reference_logprobs)
  ours, theirs = by_logprobs(name, chosen, rejected)[1]
  assert np.all(ours < 0) and np.all(theirs > 0)


@pytest.mark.parametrize('name', PREFERENCES)
def test_gradients_are_finite_differences(name):
  chosen, rejected = random_scores(name, seed=3)
  loss, gradients = by_logprobs(name, chosen, rejected)
  step = 1e-2 * np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
  here = np.array([chosen.logprobs, rejected.logprobs])
  difference = float(loss(*(here + step)) - loss(*(here - step)))
  assert difference == pytest.approx(2 * float(np.sum(step * np.array(gradients))), rel=5e-3, abs=2e-6)


@pytest.mark.parametrize('name', sorted(REFERENCED))
def test_a_reference_is_needed_and_gets_no_gradient(name):
  chosen, rejected = random_scores(name)
  with pytest.raises(ValueError, match='give Scores its reference_logprobs'):
    losses(name, chosen._replace(reference_logprobs=None), rejected)
  gradient = jax.grad(lambda x: losses(name, chosen._replace(reference_logprobs=x), rejected).sum())
  np.testing.assert_array_equal(gradient(chosen.reference_logprobs), 0)


@pytest.mark.parametrize('name', sorted(REFERENCED))
def test_only_ratios_to_the_reference_count(name):
  """A shift of policy and reference by the same amount changes nothing."""
  chosen, rejected = random_scores(name)
  moved = chosen._replace(logprobs=chosen.logprobs - 2, reference_logprobs=chosen.reference_logprobs - 2)
  np.testing.assert_allclose(losses(name, moved, rejected), losses(name, chosen, rejected), rtol=1e-4)


@pytest.mark.parametrize('name', PREFERENCES)
def test_values_are_one_a_pair_and_float32(name):
  values = losses(name, *random_scores(name))
  assert values.shape == ((12,) if name in UNPAIRED else (6,)) and values.dtype == jnp.float32
  half = losses(name, *(jax.tree.map(lambda x: x[:3], scores) for scores in random_scores(name)))
  kept = values.reshape(-1, 6)[:, :3].reshape(-1)
  np.testing.assert_allclose(half, kept, rtol=1e-6)


# From tokens to completions.

LOGPROBS = jnp.array([[-1.0, -2.0, -4.0], [-0.5, -0.25, -8.0]])
MASK = jnp.array([[0, 1, 1], [1, 1, 0]])


def test_scores_are_sums_over_completions():
  scores = preference.score(LOGPROBS, MASK, 2 * LOGPROBS)
  np.testing.assert_array_equal(scores.logprobs, [-6.0, -0.75])
  np.testing.assert_array_equal(scores.lengths, [2, 2])
  np.testing.assert_array_equal(scores.reference_logprobs, [-12.0, -1.5])
  np.testing.assert_array_equal(preference.reward(scores), [6.0, 0.75])
  np.testing.assert_array_equal(preference.reward(preference.score(LOGPROBS, MASK)), [-3.0, -0.375])
  empty = preference.score(LOGPROBS, 0 * MASK)
  np.testing.assert_array_equal(preference.mean_logprob(empty), [0, 0])


@pytest.mark.parametrize('name', PREFERENCES)
@pytest.mark.parametrize('garbage', [np.nan, np.inf, 7.0])
def test_nothing_outside_the_mask_counts(name, garbage):
  def loss(logprobs):
    reference = jnp.where(MASK > 0, -1.0, garbage) if name in REFERENCED else None
    scores = preference.score(logprobs, MASK, reference)
    return losses(name, *(jax.tree.map(lambda x: x[row : row + 1], scores) for row in (0, 1))).sum()

  clean = jax.value_and_grad(loss)(LOGPROBS)
  value, gradient = jax.value_and_grad(loss)(jnp.where(MASK > 0, LOGPROBS, garbage))
  np.testing.assert_array_equal(value, clean[0])
  np.testing.assert_array_equal(gradient, clean[1])
  assert np.all((gradient == 0) == (MASK == 0))


# What does not fit.


@pytest.mark.parametrize('name', PREFERENCES)
def test_beta_must_be_positive(name):
  for beta in (0.0, -0.1):
    with pytest.raises(ValueError, match=f'beta {beta} of {name} must be above 0'):
      losses(name, *random_scores(name), beta=beta)


def test_options_out_of_range_are_named():
  with pytest.raises(ValueError, match='label_smoothing 0.5 of dpo'):
    losses('dpo', *GOLDEN, label_smoothing=0.5)
  with pytest.raises(ValueError, match='weights -1, 1 of kto'):
    losses('kto', *GOLDEN, desirable_weight=-1, undesirable_weight=1)


@pytest.mark.parametrize('name', [name for name in PREFERENCES if name not in UNPAIRED])
def test_pairs_have_two_completions(name):
  ours, theirs = random_scores(name)
  with pytest.raises(AssertionError):
    losses(name, ours, jax.tree.map(lambda x: x[:5], theirs))


def test_the_registry_is_complete_and_every_loss_cites_its_paper():
  public = {
      name for name, value in vars(preference).items()
      if inspect.isfunction(value) and value.__module__ == preference.__name__
      and 'beta' in inspect.signature(value).parameters and not name.startswith('_')
  }
  assert public == set(PREFERENCES) == set(OPTIONS) and REFERENCED | UNPAIRED <= set(PREFERENCES)
  assert all('Reference: ' in fn.__doc__ and 'arXiv' in fn.__doc__ for fn in PREFERENCES.values())


# TRL's own code.

TRL_SELF = SimpleNamespace(accelerator=SimpleNamespace(device='cpu'), alpha=0.0, simpo_gamma=0.7)


def torched(*values):
  torch = pytest.importorskip('torch')
  return [torch.tensor(np.asarray(value)) for value in values]


def cpo(loss_type, chosen, rejected, *, beta, label_smoothing=0.0):
  trainer = pytest.importorskip('trl.experimental.cpo').CPOTrainer
  given = SimpleNamespace(**vars(TRL_SELF), loss_type=loss_type, beta=beta, label_smoothing=label_smoothing)
  return trainer.cpo_loss(given, *torched(chosen, rejected))[0].numpy()


PARITY = {  # name -> what CPOTrainer.cpo_loss gets for log-probabilities, and its loss_type
    'dpo': (preference.log_ratio, 'sigmoid'),
    'ipo': (lambda scores: preference.log_ratio(scores) / scores.lengths, 'ipo'),
    'simpo': (preference.mean_logprob, 'simpo'),
}


@pytest.mark.parametrize('name', PARITY)
def test_losses_are_those_of_trl(name):
  reads, loss_type = PARITY[name]
  chosen, rejected = random_scores(name, 64, seed=5)
  options = {key: value for key, value in OPTIONS[name].items() if key != 'gamma'}
  theirs = cpo(loss_type, reads(chosen), reads(rejected), **options)
  np.testing.assert_allclose(losses(name, chosen, rejected), theirs, rtol=1e-5, atol=1e-5)


def test_the_odds_ratio_is_that_of_trl():
  trainer = pytest.importorskip('trl.experimental.orpo').ORPOTrainer
  chosen, rejected = random_scores('orpo', 64, seed=6)
  means = [preference.mean_logprob(scores) for scores in (chosen, rejected)]
  theirs = trainer.odds_ratio_loss(SimpleNamespace(**vars(TRL_SELF), beta=0.2), *torched(*means))[0].numpy()
  np.testing.assert_allclose(losses('orpo', chosen, rejected), -means[0] - theirs, rtol=1e-5, atol=1e-5)


def test_kto_is_equation_seven_and_trl_inline_code():
  """KTOTrainer has no loss of its own to call: 1 - sigmoid(beta (r - kl)) and 1 - sigmoid(beta (kl - r))."""
  chosen, rejected = random_scores('kto', 64, seed=7)
  sigmoid = lambda x: 1 / (1 + np.exp(-x.astype(np.float64)))
  ours, theirs = (np.asarray(scores.logprobs - scores.reference_logprobs) for scores in (chosen, rejected))
  expected = [1.3 * (1 - sigmoid(0.3 * (ours - 0.4))), 0.8 * (1 - sigmoid(0.3 * (0.4 - theirs)))]
  np.testing.assert_allclose(losses('kto', chosen, rejected), np.concatenate(expected), rtol=1e-5, atol=1e-6)
