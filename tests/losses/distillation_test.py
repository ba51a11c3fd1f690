import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec as P
from jax.test_util import check_grads

from srm_jax.losses import distillation
from srm_jax.losses.distillation import DIVERGENCES, WHOLE_VOCABULARY

STUDENT = jnp.array([2.0, 1.0, 0.0, -1.0])
TEACHER = jnp.array([1.0, 2.0, 0.5, -0.5])
FORWARD_GRADIENT = np.array([0.424035, -0.360812, -0.046219, -0.017003])
REVERSE_GRADIENT = np.array([0.420199, -0.319183, -0.073849, -0.027167])
# Detached parts make differences another thing than the gradient; these have golden gradients.
DETACHED = {'adaptive_kl', 'taid'}
OPTIONS = {
    'jensen_shannon': 'beta',
    'scaled_jensen_shannon': 'beta',
    'symmetric_kl': 'reverse_share',
    'taid': 'tau',
    'skew_kl': 'alpha',
    'skew_reverse_kl': 'alpha',
    'adaptive_kl': 'mu',
}

GOLDEN = [
    ('forward_kl', {}, 0.3945426878),
    ('reverse_kl', {}, 0.4219152477),
    ('jensen_shannon', {'beta': 0.1}, 0.0352434973),
    ('jensen_shannon', {'beta': 0.5}, 0.0980126077),
    ('jensen_shannon', {'beta': 0.9}, 0.0371203895),
    ('jensen_shannon', {'beta': 0}, 0.3945426878),
    ('jensen_shannon', {'beta': 1}, 0.4219152477),
    ('jensen_shannon', {'beta': 1e-3}, 0.0003941116),
    ('scaled_jensen_shannon', {'beta': 0.1}, 0.0352434973 / 0.09),
    ('scaled_jensen_shannon', {'beta': 0.5}, 0.0980126077 / 0.25),
    ('scaled_jensen_shannon', {'beta': 0.9}, 0.0371203895 / 0.09),
    ('scaled_jensen_shannon', {'beta': 0}, 0.3945426878),
    ('scaled_jensen_shannon', {'beta': 1}, 0.4219152477),
    ('symmetric_kl', {}, (0.3945426878 + 0.4219152477) / 2),
    ('symmetric_kl', {'reverse_share': 0.25}, 0.75 * 0.3945426878 + 0.25 * 0.4219152477),
    ('taid', {'tau': 0}, 0.0),
    ('taid', {'tau': 0.4}, 0.0695740630),
    ('taid', {'tau': 0.7}, 0.2099148915),
    ('taid', {'tau': 1}, 0.3945426878),
    ('skew_kl', {'alpha': 0.1}, 0.3153557051),
    ('skew_kl', {'alpha': 0.5}, 0.1010248936),
    ('skew_kl', {'alpha': 0}, 0.3945426878),
    ('skew_reverse_kl', {'alpha': 0.1}, 0.3273189817),
    ('skew_reverse_kl', {'alpha': 0.5}, 0.0950003218),
    ('skew_reverse_kl', {'alpha': 0}, 0.4219152477),
    ('total_variation', {}, 0.4240346182),
    ('adaptive_kl', {'mu': 0.5}, 0.4102695611),
]


def random_logits(shape=(2, 3, 8)):
  student, teacher = jax.random.normal(jax.random.key(0), (2, *shape)) * 2
  return student, teacher


@pytest.mark.parametrize('name, options, value', GOLDEN)
def test_golden_values(name, options, value):
  np.testing.assert_allclose(DIVERGENCES[name](STUDENT, TEACHER, **options), value, atol=1e-6)


def test_every_divergence_has_a_golden_value():
  assert {name for name, _, _ in GOLDEN} == set(DIVERGENCES)


def test_golden_gradients():
  weight = 0.4254511317
  expected = {
      'forward_kl': FORWARD_GRADIENT,
      'reverse_kl': REVERSE_GRADIENT,
      'adaptive_kl': weight * FORWARD_GRADIENT + (1 - weight) * REVERSE_GRADIENT,
      'symmetric_kl': (FORWARD_GRADIENT + REVERSE_GRADIENT) / 2,
      'taid': np.array([0.1801021924, -0.1428543852, -0.0272303289, -0.0100174782]),  # q - p_tau
  }
  for name, gradient in expected.items():
    np.testing.assert_allclose(jax.grad(DIVERGENCES[name])(STUDENT, TEACHER), gradient, atol=1e-6)


@pytest.mark.parametrize('name', sorted(DIVERGENCES.keys() - DETACHED))
def test_gradient_matches_finite_differences(name):
  divergence = functools.partial(DIVERGENCES[name], teacher_logits=TEACHER)
  check_grads(divergence, (STUDENT,), order=1, modes=['rev'], atol=2e-3, rtol=2e-3, eps=1e-2)


@pytest.mark.parametrize('name', DIVERGENCES)
def test_contract(name):
  student, teacher = random_logits()
  divergence = DIVERGENCES[name]
  values = divergence(student, teacher)
  assert values.shape == (2, 3) and np.all(values > 0)
  np.testing.assert_allclose(divergence(student, student), jnp.zeros((2, 3)), atol=1e-6)
  np.testing.assert_allclose(divergence(student + 7, teacher - 3), values, rtol=1e-4)
  assert divergence(student.astype(jnp.bfloat16), teacher.astype(jnp.bfloat16)).dtype == jnp.float32
  gradient = jax.grad(lambda x: divergence(x, x).sum())(student)
  np.testing.assert_allclose(gradient, jnp.zeros_like(student), atol=1e-5)


@pytest.mark.parametrize('name', DIVERGENCES)
def test_teacher_receives_no_gradient(name):
  gradient = jax.grad(DIVERGENCES[name], argnums=1)(STUDENT, TEACHER)
  np.testing.assert_array_equal(gradient, jnp.zeros(4))


@pytest.mark.parametrize('name', DIVERGENCES)
def test_temperature_divides_both_logits_and_scales_nothing(name):
  divergence = DIVERGENCES[name]
  value, gradient = jax.value_and_grad(divergence)(STUDENT, TEACHER, temperature=2.0)
  halved_value, halved_gradient = jax.value_and_grad(divergence)(STUDENT / 2, TEACHER / 2)
  np.testing.assert_allclose(value, halved_value, rtol=1e-6)
  np.testing.assert_allclose(gradient, halved_gradient / 2, atol=1e-6)


@pytest.mark.parametrize('name', DIVERGENCES)
def test_certain_and_contradicting_distributions_stay_finite(name):
  student, teacher = jnp.array([300.0, 0.0, -300.0]), jnp.array([-300.0, 0.0, 300.0])
  value, gradient = jax.value_and_grad(DIVERGENCES[name])(student, teacher)
  assert np.isfinite(value) and np.all(np.isfinite(gradient))


RULED_OUT = jnp.array([0.0, 0.0, 0.0, -jnp.inf])


@pytest.mark.parametrize('lowest', [-np.inf, np.finfo(np.float32).min])
@pytest.mark.parametrize('ruled_out', ['student', 'teacher', 'both'])
@pytest.mark.parametrize('name', DIVERGENCES)
def test_a_token_that_is_ruled_out_makes_no_nan(name, ruled_out, lowest):
  student, teacher = (
      logits if ruled_out == other else logits.at[3].set(lowest)
      for logits, other in ((STUDENT, 'teacher'), (TEACHER, 'student'))
  )
  options = [{OPTIONS[name]: value} for value in (0, 1e-3, 0.5, 1)] if name in OPTIONS else [{}]
  for option in options:
    value, slope = jax.value_and_grad(functools.partial(DIVERGENCES[name], **option))(student, teacher)
    assert np.isfinite(value) and np.all(np.isfinite(slope)), option
    if ruled_out == 'both':  # as if the token were not there
      whole = DIVERGENCES[name](STUDENT[:3], TEACHER[:3], **option)
      np.testing.assert_allclose(value, whole, rtol=1e-4, atol=1e-6)


def test_what_is_infinite_is_huge_and_what_is_not_is_exact():
  forward = distillation.forward_kl(STUDENT, TEACHER + RULED_OUT)  # 0 log 0 = 0
  p = np.exp(TEACHER[:3]) / np.exp(TEACHER[:3]).sum()
  np.testing.assert_allclose(forward, np.sum(p * (np.log(p) - jax.nn.log_softmax(STUDENT)[:3])), rtol=1e-6)
  assert distillation.reverse_kl(STUDENT, TEACHER + RULED_OUT) > 1e28
  assert distillation.forward_kl(STUDENT + RULED_OUT, TEACHER) > 1e28


def test_jensen_shannon_approaches_scaled_kls_and_is_symmetric():
  small = 1e-3
  jensen_shannon = distillation.jensen_shannon
  np.testing.assert_allclose(jensen_shannon(STUDENT, TEACHER, beta=small) / small, 0.3945426878, rtol=5e-3)
  np.testing.assert_allclose(jensen_shannon(STUDENT, TEACHER, beta=1 - small) / small, 0.4219152477, rtol=5e-3)
  np.testing.assert_allclose(
      jensen_shannon(STUDENT, TEACHER, beta=0.2), jensen_shannon(TEACHER, STUDENT, beta=0.8), rtol=1e-6
  )


def test_scaled_jensen_shannon_is_continuous_and_exact_for_small_weights():
  student, teacher = random_logits((4, 5000))
  log_p, log_q = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in map(np.longdouble, (teacher, student)))
  p, q = np.exp(log_p), np.exp(log_q)
  for beta in (1e-4, 1e-3, 0.3, 1 - 1e-3, 1 - 1e-4):
    log_m = np.log(beta * p + (1 - beta) * q)
    exact = (p * (log_p - log_m)).sum(-1) / (1 - beta) + (q * (log_q - log_m)).sum(-1) / beta
    score = (log_q - log_m) / beta + 1 / beta - p / np.exp(log_m) - (1 - beta) / beta * q / np.exp(log_m)
    gradient = q * (score - (q * score).sum(-1, keepdims=True))
    loss = functools.partial(distillation.scaled_jensen_shannon, teacher_logits=teacher, beta=beta)
    np.testing.assert_allclose(loss(student), exact.astype(float), rtol=3e-6)
    np.testing.assert_allclose(jax.grad(lambda x: loss(x).sum())(student), gradient.astype(float), atol=1e-6)
  # jensen_shannon over beta (1 - beta) is the same number but for its rounding, which is the point.
  naive = distillation.jensen_shannon(student, teacher, beta=1e-4) / (1e-4 * (1 - 1e-4))
  assert np.max(np.abs(naive / distillation.scaled_jensen_shannon(student, teacher, beta=1e-4) - 1)) > 3e-5


def test_mixed_divergences_end_at_the_kls():
  forward, reverse = (DIVERGENCES[name](*random_logits()) for name in ('forward_kl', 'reverse_kl'))
  for name, low, high in (
      ('jensen_shannon', forward, reverse),
      ('scaled_jensen_shannon', forward, reverse),
      ('symmetric_kl', forward, reverse),
      ('taid', 0 * forward, forward),
      ('skew_kl', forward, 0 * forward),
      ('skew_reverse_kl', reverse, 0 * forward),
  ):
    for value, expected in ((0, low), (1.0, high)):
      got = DIVERGENCES[name](*random_logits(), **{OPTIONS[name]: value})
      np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6, err_msg=f'{name} {value}')


@pytest.mark.parametrize('name', OPTIONS)
@pytest.mark.parametrize('value', [0.0, 0.4, 1.0])
def test_scheduled_options_equal_constant_ones(name, value):
  if name == 'adaptive_kl':
    value *= 0.9  # at 1 it jumps with the rounding of the cumulative mass
  student, teacher = random_logits()

  def both(option, temperature):
    loss = functools.partial(DIVERGENCES[name], temperature=temperature, **{OPTIONS[name]: option})
    return loss(student, teacher), jax.grad(lambda x: loss(x, teacher).sum())(student)

  constant = jax.jit(lambda: both(value, 1.5))()
  scheduled = jax.jit(both)(jnp.float32(value), jnp.float32(1.5))
  for got, expected in zip(scheduled, constant):
    np.testing.assert_allclose(got, expected, atol=2e-6)
  if value in (0, 1):  # a schedule may round past its end
    beyond = jax.jit(both)(jnp.float32(value + 1e-6 * (2 * value - 1)), jnp.float32(1.5))
    jax.tree.map(np.testing.assert_array_equal, beyond, scheduled)
  # An array that is not traced is checked like a number, inside jit as well.
  array, wrong = jnp.float32(value), jnp.float32(value + 1.5)
  np.testing.assert_allclose(jax.jit(lambda: both(array, 1.5))()[0], constant[0], rtol=1e-5)
  with pytest.raises(ValueError, match='outside'):
    jax.jit(lambda: both(wrong, 1.5))()


def trl_logits():
  steps = np.arange(3 * 7 * 11)
  shape = (3, 7, 11)
  return (3 * np.sin(1.7 * steps)).reshape(shape), (3 * np.cos(0.6 * steps**2)).reshape(shape)


# (beta, sum of all tokens, one token, one entry of the gradient) of trl 1.16.0's generalized_jsd_loss in float64.
TRL = [
    (0, 30.02426387, 1.3687988756, 0.0060085996),
    (1e-3, 0.02991123, 0.0013630623, 5.9569e-06),
    (0.1, 2.31705909, 0.1008304971, 0.0003727476),
    (0.5, 5.5817731, 0.2133637341, 0.0008094169),
    (0.9, 2.28937869, 0.0721474973, 0.0003208949),
    (1, 29.42139486, 0.8091441193, 0.003725362),
]


@pytest.mark.parametrize('beta, total, token, slope', TRL)
def test_jensen_shannon_is_trls_as_recorded(beta, total, token, slope):
  student, teacher = map(jnp.float32, trl_logits())
  loss = functools.partial(distillation.jensen_shannon, teacher_logits=teacher, beta=beta, temperature=1.5)
  values = loss(student)
  np.testing.assert_allclose(values.sum(), total, rtol=1e-5)
  np.testing.assert_allclose(values[1, 2], token, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(jax.grad(lambda x: loss(x).sum())(student)[1, 2, 3], slope, rtol=1e-3)


@pytest.mark.parametrize('beta', [row[0] for row in TRL])
def test_jensen_shannon_is_trls(beta, monkeypatch):
  monkeypatch.setenv('TRL_EXPERIMENTAL_SILENCE', '1')
  trainer = pytest.importorskip('trl.experimental.gkd').GKDTrainer
  torch = pytest.importorskip('torch')
  student, teacher = trl_logits()
  theirs = torch.tensor(student, requires_grad=True)
  options = {'beta': beta, 'temperature': 1.5}
  values = trainer.generalized_jsd_loss(theirs, torch.tensor(teacher), reduction='none', **options).sum(-1)
  values.sum().backward()
  ours = functools.partial(distillation.jensen_shannon, teacher_logits=jnp.float32(teacher), **options)
  np.testing.assert_allclose(ours(jnp.float32(student)), values.detach().numpy(), atol=1e-5)
  gradient = jax.grad(lambda x: ours(x).sum())(jnp.float32(student))
  np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-5)


def test_total_variation_is_one_on_disjoint_supports():
  value = distillation.total_variation(jnp.array([50.0, 0.0]), jnp.array([0.0, 50.0]))
  np.testing.assert_allclose(value, 1.0, atol=1e-6)


def test_adaptive_head_follows_the_teachers_mass():
  # p sorted: .598, .220, .133, .049. With mu .85 the first two are the head; with mu 1 all but rounding are.
  p, q = jax.nn.softmax(TEACHER), jax.nn.softmax(STUDENT)
  gaps = np.abs(p - q)
  forward, reverse = distillation.forward_kl(STUDENT, TEACHER), distillation.reverse_kl(STUDENT, TEACHER)
  weight = (gaps[0] + gaps[1]) / gaps.sum()
  value = distillation.adaptive_kl(STUDENT, TEACHER, mu=0.85)
  np.testing.assert_allclose(value, weight * forward + (1 - weight) * reverse, atol=1e-6)
  order = jnp.array([2, 0, 3, 1])
  np.testing.assert_allclose(distillation.adaptive_kl(STUDENT[order], TEACHER[order], mu=0.85), value, atol=1e-6)


def test_split_vocabulary_equals_whole_one():
  student, teacher = random_logits()
  names = sorted(DIVERGENCES.keys() - WHOLE_VOCABULARY)

  def values_and_gradients(student, teacher, axis_name):
    losses = {name: functools.partial(DIVERGENCES[name], axis_name=axis_name, temperature=1.5) for name in names}
    values = {name: loss(student, teacher) for name, loss in losses.items()}
    return values, {name: jax.grad(lambda x: loss(x, teacher).sum())(student) for name, loss in losses.items()}

  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ('data', 'tensor'))
  logits, tokens = P('data', None, 'tensor'), P('data')
  split = jax.jit(
      jax.shard_map(
          functools.partial(values_and_gradients, axis_name='tensor'),
          mesh=mesh,
          in_specs=(logits, logits),
          out_specs=(tokens, logits),
      )
  )
  jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=2e-6),
      split(student, teacher),
      values_and_gradients(student, teacher, None),
  )


@pytest.mark.parametrize('name', sorted(WHOLE_VOCABULARY))
def test_whole_vocabulary_divergences_refuse_a_split_one(name):
  with pytest.raises(ValueError, match="'tensor'.*forward_kl"):
    DIVERGENCES[name](STUDENT, TEACHER, axis_name='tensor')


@pytest.mark.parametrize('name', DIVERGENCES)
def test_wrong_shapes_and_temperatures_raise(name):
  with pytest.raises(AssertionError):
    DIVERGENCES[name](STUDENT, TEACHER[:3])
  with pytest.raises(AssertionError):
    DIVERGENCES[name](STUDENT[None], TEACHER)
  with pytest.raises(ValueError, match='temperature 0'):
    DIVERGENCES[name](STUDENT, TEACHER, temperature=0)


@pytest.mark.parametrize('name, option', OPTIONS.items())
def test_options_outside_the_unit_interval_raise(name, option):
  with pytest.raises(ValueError, match=f'{option} 1.5 of {name}'):
    DIVERGENCES[name](STUDENT, TEACHER, **{option: 1.5})
