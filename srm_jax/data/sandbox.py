"""Runs the Jinja templates that come with model weights: text of strangers, so sandboxed and with a budget.

The dialect is that of transformers' chat templates: blocks trimmed, loop controls, `raise_exception`, `strftime_now`, a
`tojson` that does not escape HTML. Beyond jinja2's sandbox, an unsafe access is an error where jinja2 renders nothing
until the value is used, and each rendering may take so many steps and write so much text. The budget counts what a
template can repeat: items of loops, calls (macros recurse), characters printed or joined; and it refuses operators and
widths that make huge values at once. It is no hard limit on memory: what `replace` makes of long strings, for instance,
is counted only when it is printed.
"""

import contextvars
import datetime
import functools
import json
import re
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from srm_jax.schema import ConfigError

MAX_STEPS = 300_000  # loop items and calls; a conversation of a thousand turns takes some ten thousand
MAX_TEXT = 10_000_000  # characters printed, and characters or items that one operation may make
_left = contextvars.ContextVar('[steps, characters] that this rendering has left')


def check(name, source):
  """Raises ConfigError where `source` is no valid Jinja; see `render`."""
  _guarded(name, lambda: _compile(source))


def render(name, source, variables: Mapping[str, Any], *, date: datetime.date) -> str:
  """The text that a template makes of plain data.

  Args:
    name: of the template, for errors.
    source: Jinja.
    variables: what the template sees; strings, numbers, lists and mappings only, since methods of other objects would
      be within its reach.
    date: today, for `strftime_now`.

  Raises:
    ConfigError: the template is no valid Jinja, reaches outside the sandbox, works or writes without end, refuses its
      input by `raise_exception`, or fails.
  """
  variables = {**variables, 'strftime_now': lambda form: date.strftime(form)}
  return _guarded(name, lambda: ''.join(map(_print, _compile(source).generate(variables))))


def _guarded(name, work):
  token = _left.set([MAX_STEPS, MAX_TEXT])
  try:
    return work()
  except jinja2.TemplateSyntaxError as error:
    raise ConfigError(f'chat template {name} is not valid Jinja: line {error.lineno}: {error.message}') from error
  except jinja2.sandbox.SecurityError as error:
    fix = "use the model's published template; look at it, if this is the one"
    raise ConfigError(f'chat template {name} was stopped: {error}; fix: {fix}') from error
  except _Refused as error:
    raise ConfigError(f'chat template {name} refuses the conversation: {error}') from error
  except Exception as error:  # the template's own mistakes surface as any exception
    raise ConfigError(f'chat template {name} failed: {type(error).__name__}: {str(error)[:500]}') from error
  finally:
    _left.reset(token)


class _Refused(jinja2.TemplateError):
  """What a template raises about its input."""


def _raise_exception(message):
  raise _Refused(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Namespace(jinja2.utils.Namespace):
  """Rejects names with which a template could pose as an object of Python's."""

  def __init__(*args, **kwargs):  # so that a template may store 'self'
    self, *rest = args
    values = dict(*rest, **kwargs)
    for name in values:
      _require_public(name)
    jinja2.utils.Namespace.__init__(self, values)

  def __setitem__(self, name, value):
    _require_public(name)
    super().__setitem__(name, value)


def _require_public(name):
  if str(name).startswith('_'):
    raise jinja2.sandbox.SecurityError(f'it stores the private attribute {name!r}')


class _Generation(jinja2.ext.Extension):
  """Accepts `{% generation %}` around what an assistant writes, as SmolLM3's template has it, and ignores it."""

  tags = {'generation'}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return jinja2.nodes.Scope(body, lineno=line)


# --- the budget


def _spend(*, steps=0, characters=0):
  left = _left.get()
  left[0] -= steps
  left[1] -= characters
  if min(left) < 0:
    raise jinja2.sandbox.SecurityError(f'it takes more than {MAX_STEPS} steps or {MAX_TEXT} characters')


def _each(items):
  for item in items:
    _spend(steps=1)
    yield item


def _print(value):
  _spend(characters=len(value) if isinstance(value, str) else 0)
  return value


def _require_size(size):
  if size > MAX_TEXT:
    raise jinja2.sandbox.SecurityError(f'it makes {size} characters or items, more than {MAX_TEXT}')


def _require_narrow(values):
  """Numbers given to functions are widths, counts or indices."""
  for value in values:
    _require_size(abs(value) if isinstance(value, int) else 0)


def _require_narrow_format(text):
  """The widths in '%9d' and '{:>9}'."""
  _require_size(max((int(digits) for digits in re.findall(r'\d{1,30}', str(text))), default=0))


def _size(value):
  return len(value) if hasattr(value, '__len__') else abs(value) if isinstance(value, int | float) else 0


def _narrow(function):
  @functools.wraps(function)  # keeps the marks by which jinja2 passes the environment
  def checked(value, /, *args, **kwargs):
    _require_narrow([*args, *kwargs.values()])
    if function is jinja2.filters.FILTERS['format']:
      _require_narrow_format(value)
    return function(value, *args, **kwargs)

  return checked


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
  intercepted_binops = frozenset(['+', '*', '**', '%'])

  def unsafe_undefined(self, obj, attribute):
    raise jinja2.sandbox.SecurityError(f'it reaches for the attribute {attribute!r} of a {type(obj).__name__}')

  def call(self, context, function, /, *args, **kwargs):
    _spend(steps=1)
    _require_narrow([*args, *kwargs.values()])
    if isinstance(function, jinja2.runtime.LoopContext):  # a recursive loop enters its next level
      args = (_each(args[0]), *args[1:])
    formatted = getattr(getattr(function, '__wrapped__', None), '__self__', None)  # of the sandbox's str.format
    if isinstance(formatted, str):
      _require_narrow_format(formatted)
    return super().call(context, function, *args, **kwargs)

  def call_binop(self, context, operator, left, right):
    sizes = _size(left), _size(right)
    if operator == '%' and isinstance(left, str):
      _require_narrow_format(left)
      _require_narrow(right if isinstance(right, tuple) else [right])
    elif operator == '+':
      _require_size(sum(sizes))
    elif operator in ('*', '**'):
      _require_size(sizes[0] * sizes[1])
    return super().call_binop(context, operator, left, right)


@functools.lru_cache(maxsize=32)
def _compile(source):
  environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
  environment.filters = {name: _narrow(function) for name, function in environment.filters.items()}
  environment.filters.update({'tojson': _narrow(_to_json), '(each)': _each, '(print)': _print})
  del environment.globals['lipsum']
  environment.globals.update(
      raise_exception=_raise_exception, namespace=_Namespace, dict=lambda *args, **kwargs: dict(*args, **kwargs)
  )
  return environment.from_string(_counted(environment.parse(source)).set_environment(environment))


def _counted(tree):
  """Puts the counting filters, which no template can spell, around what is looped over, printed or joined by `~`."""
  count = lambda node, name: jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
  for node in list(tree.find_all((jinja2.nodes.For, jinja2.nodes.Output, jinja2.nodes.Concat))):
    if isinstance(node, jinja2.nodes.For):
      node.iter = count(node.iter, '(each)')
    elif isinstance(node, jinja2.nodes.Output):
      node.nodes = [n if isinstance(n, jinja2.nodes.TemplateData) else count(n, '(print)') for n in node.nodes]
    else:
      node.nodes = [count(jinja2.nodes.Concat(node.nodes, lineno=node.lineno), '(print)')]
  return tree
