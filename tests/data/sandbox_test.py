import datetime
import time

import pytest

from srm_jax.data import sandbox
from srm_jax.schema import ConfigError

DAY = datetime.date(2024, 1, 5)
MESSAGES = [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'oh'}]


def run(source, **variables):
  return sandbox.render('T', source, {'messages': MESSAGES, **variables}, date=DAY)


@pytest.mark.parametrize('source, expected', [
    ('{% if true %}\n  {% set x = 1 %}\n  {{ x }}\n{% endif %}\n', '  1\n'),  # blocks trimmed and stripped
    ("{% for m in messages %}{{ loop.index0 }}{{ m.role }}{{ ',' if not loop.last }}{% endfor %}", '0user,1assistant'),
    ("{% for m in messages if m.role == 'user' %}{{ m.content }}{{ loop.length }}{% else %}none{% endfor %}", 'hi1'),
    ('{% for m in absent %}x{% else %}none{% endfor %}', 'none'),
    ('{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}', 'oh'),
    ('{% for x in [[1, [2]], 3] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}', '123'),
    ('{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}', '3210'),
    ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 2 %}{% endfor %}{{ ns.n }}", '4'),
    ("{{ {'a': '<é>'}|tojson }}{{ [1]|tojson(indent=1) }}", '{"a": "<é>"}[\n 1\n]'),
    ("{{ strftime_now('%d %b %Y') }}", '05 Jan 2024'),
    ("{% generation %}{% set x = 1 %}a{% endgeneration %}{{ x is defined }}", 'aFalse'),
    ("{{ '%5s' % 'a' }}{{ '{:>3}'.format(1) }}{{ 'a' * 3 }}{{ 2 ** 5 }}{{ 7 % 4 }}{{ 'a' ~ 1 ~ none }}", None),
    ("{{ messages[:1]|map(attribute='content')|join }}{{ 'x'|center(3) }}{{ dict(a=1).a }}{{ [1] + [2] }}",
     'hi x 1[1, 2]'),
    ("{{ 'same' if 'ab' == 'a' ~ 'b' }}{{ undefined_thing }}{{ messages[0].absent is defined }}", 'sameFalse'),
])  # fmt: skip
def test_dialect(source, expected):
  assert run(source) == ('    a  1aaa323a1None' if expected is None else expected)


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ [''] | map(attribute='__class__') | list }}",
    "{{ '{0.__class__}'.format('x') }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    '{{ cycler.__init__.__globals__ }}',
    '{{ joiner.__init__.__globals__ }}',
    '{{ namespace.__init__.__globals__ }}',
    '{{ raise_exception.__globals__ }}',
    '{{ strftime_now.__closure__ }}',
    '{{ dict.__call__.__self__ }}',
    '{{ range.__globals__ }}',
    '{{ self.__init__ }}',
    '{{ self._TemplateReference__context }}',
    '{{ messages.__class__.__base__.__subclasses__() }}',
    '{{ messages[0].__init__ }}',
    '{% set ns = namespace(__class__=1) %}',
    '{% set ns = namespace() %}{% set ns.__html__ = 1 %}',
    '{{ messages.append(1) }}',
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages[0].pop('role') }}",
]


@pytest.mark.parametrize('source', ESCAPES)
def test_escapes_are_stopped(source):
  with pytest.raises(ConfigError, match="template T was stopped: it (reaches for|stores) the .*fix: use the model's"):
    run(source)


@pytest.mark.parametrize('source, message', [
    ("{% include 'x' %}", 'no loader'),
    ("{% import 'os' as os %}{{ os.system('true') }}", 'no loader'),
    ('{{ open("x") }}', "'open' is undefined"),
    ('{{ __import__("os") }}', "'__import__' is undefined"),
    ('{{ lipsum() }}', "'lipsum' is undefined"),
    ('{{ absent.role }}', "'absent' is undefined"),
    ('{{ 1 / 0 }}', 'ZeroDivisionError'),
    ('{% for m in messages %}\n{% if m %}', 'not valid Jinja: line 2'),
    ('{{ messages|no_such_filter }}', 'not valid Jinja: line 1'),
    ("{% for x in '(each)' %}{{ x|(each) }}{% endfor %}", 'not valid Jinja'),
    ("{{ raise_exception('roles must alternate') }}", 'refuses the conversation: roles must alternate$'),
])  # fmt: skip
def test_other_failures_name_the_template(source, message):
  with pytest.raises(ConfigError, match=f'template T .*{message}'):
    run(source)


ENDLESS = [
    '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}',
    "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    '{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}',
    '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}',
    '{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}',
    '{% set many = range(99999) %}{% for i in [1, 2, 3, 4] recursive %}{{ loop(many) if loop.depth == 1 }}{% endfor %}',
    '{{ range(200000) }}',
    "{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}{% endfor %}",
]
HUGE = [  # stopped before they are made
    "{{ 'x' * 10 ** 9 }}",
    "{{ 10 ** 9 * 'x' }}",
    '{{ [1] * 10 ** 9 }}',
    '{{ 10 ** 10 ** 10 }}',
    "{{ 'x'|center(10 ** 9) }}",
    "{{ 'x'|indent(width=10 ** 9, first=true) }}",
    "{{ {'a': 1}|tojson(indent=10 ** 9) }}",
    "{{ 'x'.ljust(10 ** 9) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (10 ** 9, 1) }}",
    "{{ '%999999999d'|format(1) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ '{:>{w}}'.format(1, w=10 ** 9) }}",
    "{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    '{% set ns = namespace(l=[1, 1]) %}{% for i in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}',
]


@pytest.mark.parametrize('source', HUGE)
def test_huge_values_are_not_made(source):
  with pytest.raises(ConfigError, match=r'was stopped: it makes \d+ characters or items, more than 10000000'):
    run(source)


@pytest.mark.parametrize('source', ENDLESS)
def test_work_is_bounded(source, monkeypatch):
  monkeypatch.setattr(sandbox, 'MAX_STEPS', 20_000)
  start = time.monotonic()
  with pytest.raises(ConfigError, match='was stopped: it takes|RecursionError|OverflowError'):
    run(source)
  assert time.monotonic() - start < 5


def test_the_budget_is_per_rendering_and_wide_enough(monkeypatch):
  many = [{'role': 'user', 'content': 'x' * 1000}] * 2000
  source = "{% for m in messages %}{{ m.content.strip() }}{% for k, v in m.items() %}{{ k }}{% endfor %}{% endfor %}"
  for _ in range(3):
    assert len(run(source, messages=many)) == 2000 * 1011
  monkeypatch.setattr(sandbox, 'MAX_STEPS', 9_999)  # 2000 messages, 2 calls of each, and 2 items
  with pytest.raises(ConfigError, match='more than 9999 steps'):
    run(source, messages=many)
  monkeypatch.setattr(sandbox, 'MAX_STEPS', 10_000)
  run(source, messages=many)
