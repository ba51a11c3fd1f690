"""Numbers of a token against plain formulas on whole logits, their gradients, and which options are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from srm_jax.losses import top_k
from srm_jax.losses.distillation import DIVERGENCES
from srm_jax.recipes import token_terms
from srm_jax.recipes.token_terms import TOKEN_TERMS, Tokens
from srm_jax.schema import ConfigError
from tests.recipes import dense

TOKENS, VOCAB, LISTED = 6, 12, 4
LINEAR = dict(name='linear', start=2.0, end=1.0, steps=10)


def normal(seed):
  return np.random.default_rng(seed).normal(0, 1.5, (TOKENS, VOCAB)).astype(np.float32)


STUDENT, TEACHER = normal(0), normal(1)
TARGETS = np.random.default_rng(2).integers(0, VOCAB, TOKENS)


def known():
  """The LISTED likeliest tokens of the teacher."""
  logprobs = jax.nn.log_softmax(TEACHER)
  values, ids = jax.lax.top_k(logprobs, LISTED)
  return {'ids': ids, 'logprobs': values, 'tail': 1 - jnp.sum(jnp.exp(values), -1)}


def build(term):
  return TOKEN_TERMS[term['kind']](term['options'], 'loss.terms.x.options')


def assert_alike(term, plain, **numbers):
  """Values, and gradients of a weighted sum, are those of the plain formula; the teacher gets no gradient."""
  opened = build(term)
  weights = np.linspace(0.5, 1.5, TOKENS, dtype=np.float32)

  def total(fn):
    def value(student, teacher):
      values = fn(student, teacher)
      return jnp.sum(weights * values), values

    return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(STUDENT, jnp.asarray(TEACHER))

  own = lambda student, teacher: opened.fn(
      Tokens(student, teacher if opened.teacher else None, TARGETS, numbers, known(), None)
  )
  ((_, values), (gradient, to_teacher)), ((_, expected), (plain_gradient, _)) = total(own), total(plain)
  np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
  assert np.all(np.abs(expected) > 1e-3) and np.linalg.norm(plain_gradient) > 1e-2
  np.testing.assert_allclose(gradient, plain_gradient, rtol=1e-4, atol=2e-6)
  assert not np.any(to_teacher)


def test_cross_entropy():
  assert_alike(base.term('cross_entropy'), lambda student, teacher: -dense.logprobs(student, TARGETS))


@pytest.mark.parametrize('name', DIVERGENCES)
@pytest.mark.parametrize('scaled', [False, True])
def test_divergences(name, scaled):
  factor = 4.0 if scaled else 1.0
  plain = lambda student, teacher: factor * dense.divergence(
      name, student, teacher, temperature=2.0, **dense.OPTIONS[name]
  )
  assert_alike(base.divergence(name, temperature=2.0, scaled=scaled, **dense.OPTIONS[name]), plain)


@pytest.mark.parametrize('name', DIVERGENCES)
def test_options_follow_their_schedules(name):
  """What the batch knows of the step is taken in the place of the schedule: temperature, option and T^2 alike."""
  changing = {key: dict(name='linear', start=0.9, end=0.8, steps=3) for key in dense.OPTIONS[name]}
  term = base.divergence(name, temperature=LINEAR, scaled=True, **changing)
  assert build(term).numbers.keys() == {'temperature', *changing}
  assert float(build(term).numbers['temperature'](5)) == 1.5
  now = {'temperature': jnp.float32(1.5), **{key: jnp.float32(value) for key, value in dense.OPTIONS[name].items()}}
  plain = lambda student, teacher: 2.25 * dense.divergence(
      name, student, teacher, temperature=1.5, **dense.OPTIONS[name]
  )
  assert_alike(term, plain, **now)


REFUSES_ZERO = {'reverse_kl'}  # infinite where the teacher has no mass


@pytest.mark.parametrize('name', top_k.TOP_K)
@pytest.mark.parametrize('policy', top_k.POLICIES)
def test_divergences_to_a_truncated_teacher(name, policy):
  term = base.term('top_k', name=name, policy=policy, options=dense.OPTIONS[name])
  if policy == 'zero' and name in REFUSES_ZERO:
    with pytest.raises(ConfigError, match="loss.terms.x.options: reverse_kl is infinite under the policy 'zero'"):
      build(term)
    return
  assert not build(term).teacher
  assert_alike(term, lambda student, teacher: dense.top_k(name, policy, student, known(), **dense.OPTIONS[name]))


def test_terms_say_what_they_are():
  scaled = base.divergence('skew_kl', temperature=2.0, scaled=True, alpha=0.2)
  assert build(scaled).spoken == 'T^2 skew_kl(T=2, alpha=0.2)'
  assert build(base.divergence(temperature=LINEAR)).spoken == 'forward_kl(T=2 to 1 (linear, 10 steps))'
  term = base.term('top_k', name='skew_kl', policy='tail', options={'alpha': 0.3})
  assert build(term).spoken == 'skew_kl to the cached teacher (tail, alpha=0.3)'
  assert build(base.term('cross_entropy')).spoken == 'cross-entropy'


def test_there_is_a_test_of_every_kind():
  assert TOKEN_TERMS.keys() == {'cross_entropy', 'divergence', 'top_k'}


def top(name='forward_kl', policy='tail', **options):
  return base.term('top_k', name=name, policy=policy, options=options)


HERE = r'loss\.terms\.x\.options'
WRONG = [
    (base.term('cross_entropy', smoothing=0.1), rf"option of {HERE} 'smoothing' unknown"),
    (base.divergence('forward'), rf"divergence of {HERE} 'forward' unknown \(did you mean 'forward_kl'"),
    (base.divergence(beta=0.1), rf"option of divergence of {HERE} 'forward_kl' 'beta' unknown; choose from \[\]"),
    (base.divergence('skew_kl', axis_name='tensor'), r"'axis_name' unknown; choose from \['alpha'\]"),
    (base.term('divergence', name='forward_kl', options={'temperature': 2.0}, temperature=1.0,
               scale_by_squared_temperature=False), r"option of .*'temperature' unknown"),
    (base.term('divergence', name='forward_kl', options={}), rf'{HERE}\.temperature is missing'),
    (base.divergence(temperature=0), rf'{HERE}: temperature 0 of a divergence must be positive'),
    (base.divergence(temperature=-1.0), rf'{HERE}: temperature -1 of a divergence must be positive'),
    (base.divergence(temperature=True), rf'{HERE}\.temperature is True; give a number'),
    (base.divergence(temperature='2'), rf"{HERE}\.temperature is '2'; give a number"),
    (base.divergence(temperature=LINEAR | dict(end=0.0)), rf'{HERE}: temperature 0 of a divergence'),
    (base.divergence(temperature=LINEAR | dict(start=-1.0)), rf'{HERE}: temperature -1 of a divergence'),
    (base.divergence(temperature=LINEAR | dict(steps=0)), rf'{HERE}\.temperature\.steps is 0'),
    (base.divergence(scaled='yes'), rf"{HERE}\.scale_by_squared_temperature is 'yes' \(str\); expected bool"),
    *[
        (base.divergence(name, **{key: value}), rf'{HERE}: {key} {float(value)} of {name} is outside \[0, 1\]')
        for name in DIVERGENCES for key in dense.OPTIONS[name] for value in (-0.1, 1.5, 2)
    ],
    (base.divergence('taid', tau=dict(name='linear', start=0.4, end=1.1, steps=5)), r'tau 1\.1 of taid is outside'),
    (base.divergence('taid', tau='half'), rf"{HERE}\.tau is 'half'; give a number"),
    (base.divergence('skew_kl', alpha=None), rf'{HERE}\.alpha is None; give a number'),
    (top('forward'), rf"top-k divergence of {HERE} 'forward' unknown"),
    (top(policy='rest'), rf"{HERE}: policy 'rest' unknown; choose from"),
    (top(policy=1), rf'{HERE}\.policy is 1 \(int\); expected str'),
    (top(axis_name='tensor'), r"'axis_name' unknown; choose from \['teacher_temperature', 'temperature'\]"),
    (top('skew_kl', alpha=2), rf'{HERE}: alpha 2\.0 of skew_kl is outside'),
    (top(temperature=2.0), rf"{HERE}: policy 'tail' cannot take log-probabilities of temperature 1\.0 to 2\.0"),
    (top(temperature=LINEAR), rf"{HERE}: policy 'tail' cannot take log-probabilities"),
    (top('jensen_shannon', 'zero', beta=1), rf"{HERE}: jensen_shannon with beta 1 is infinite"),
]


@pytest.mark.parametrize('term, message', WRONG)
def test_impossible_options_are_refused(term, message, monkeypatch):
  monkeypatch.setattr(jax, 'jit', lambda *_, **__: pytest.fail('something was compiled'))
  with pytest.raises(ConfigError, match=message):
    build(term)


def test_options_are_tried_at_the_ends_of_all_schedules(monkeypatch):
  """Both numbers of every schedule, each with the others' of the same end."""
  seen = []

  def tried(student_logits, teacher_logits, *, beta=0.5, temperature=1.0, axis_name=None):
    del teacher_logits, axis_name
    seen.append((beta, temperature))
    return student_logits[..., 0]

  monkeypatch.setitem(token_terms.DIVERGENCES, 'tried', tried)
  build(base.divergence('tried', temperature=LINEAR, beta=dict(name='switch', start=0.1, end=0.2, steps=1)))
  assert seen == [(0.1, 2.0), (0.2, 1.0)]
