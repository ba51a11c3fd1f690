"""A config is opened whole or refused with the key, the value and the nearest valid names."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import ml_collections
import pytest

from srm_jax import schema


@dataclasses.dataclass(frozen=True)
class Inner:
  rate: float
  chunk: int | None


@dataclasses.dataclass(frozen=True)
class Outer:
  name: str
  steps: int
  quiet: bool
  inner: Inner
  mesh: tuple
  options: Mapping[str, Any]
  optional: str = 'default'

  def __post_init__(self):
    if self.steps < 0:
      raise ValueError(f'steps={self.steps} is negative')


GOOD = dict(name='a', steps=3, quiet=False, inner=dict(rate=0.5, chunk=None), mesh=(1, 2), options=dict(beta=1))


@pytest.mark.parametrize('make', [dict, ml_collections.ConfigDict])
def test_a_section_becomes_a_record(make):
  opened = schema.parse(Outer, make(GOOD), 'config')
  assert opened == Outer('a', 3, False, Inner(0.5, None), (1, 2), {'beta': 1}, 'default')


def test_whole_numbers_are_floats_and_lists_are_tuples():
  opened = schema.parse(Outer, GOOD | dict(inner=dict(rate=2, chunk=4), mesh=[1, 2]), 'config')
  assert isinstance(opened.inner.rate, float) and opened.inner.chunk == 4 and opened.mesh == (1, 2)


@pytest.mark.parametrize('changes, message', [
    (dict(step=3), r"config\.step: key 'step' unknown \(did you mean 'steps'\?\); choose from \['inner', 'mesh'"),
    (dict(inner=dict(rate=1.0, chnk=2)), r"config\.inner\.chnk.*did you mean 'chunk'"),
    (dict(inner=dict(rate=1.0)), r'config\.inner\.chunk is missing'),
    (dict(inner=3), r'config\.inner is 3; expected a section'),
    (dict(steps='3'), r"config\.steps is '3' \(str\); expected int"),
    (dict(steps=3.0), r'config\.steps is 3\.0 \(float\); expected int'),
    (dict(steps=True), r'config\.steps is True \(bool\); expected int'),
    (dict(quiet=1), r'config\.quiet is 1 \(int\); expected bool'),
    (dict(inner=dict(rate=True, chunk=None)), r'config\.inner\.rate is True'),
    (dict(inner=dict(rate=1.0, chunk='x')), r"config\.inner\.chunk is 'x' \(str\); expected int"),
    (dict(mesh=8), r'config\.mesh is 8; expected a tuple'),
    (dict(options=3), r'config\.options is 3'),
    (dict(name=None), r'config\.name is None'),
    (dict(steps=-1), r'config: steps=-1 is negative'),
])
def test_what_does_not_fit_is_refused(changes, message):
  with pytest.raises(schema.ConfigError, match=message):
    schema.parse(Outer, GOOD | changes, 'config')


def test_choose():
  assert schema.choose('loss', 'a', {'a': 1}) == 1
  message = r"loss 'forward' unknown \(did you mean 'forward_kl'\?\); choose from \["
  with pytest.raises(schema.ConfigError, match=message):
    schema.choose('loss', 'forward', {'forward_kl': 1, 'z': 2})
  with pytest.raises(schema.ConfigError, match=r"loss 'q' unknown; choose from \['z'\]"):
    schema.choose('loss', 'q', {'z': 2})


def scaled(values, *, factor, shift=0):
  return values * factor + shift


def test_bind_leaves_what_is_given_later():
  make = functools.partial(schema.bind, 'rule', 'scaled', registry={'scaled': scaled}, given=('factor',))
  assert make(options={'shift': 1})(3, factor=2) == 7
  with pytest.raises(schema.ConfigError, match=r"option of rule 'scaled' 'factor' unknown; choose from \['shift'\]"):
    make(options={'factor': 2})


def test_bind_fills_options_in():
  assert schema.bind('rule', 'scaled', {'factor': 2, 'shift': 1}, {'scaled': scaled})(3) == 7


@pytest.mark.parametrize('options, message', [
    ({'factr': 2}, r"option of rule 'scaled' 'factr' unknown \(did you mean 'factor'\?\)"),
    ({'values': 2, 'factor': 1}, r"'values' unknown"),
    ({}, r"rule 'scaled' needs the options \['factor'\]"),
])
def test_bind_refuses_what_the_function_does_not_take(options, message):
  with pytest.raises(schema.ConfigError, match=message):
    schema.bind('rule', 'scaled', options, {'scaled': scaled})
