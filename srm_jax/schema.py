"""Opens a ConfigDict section as a typed record, and refuses what it does not know before anything compiles."""

import dataclasses
import difflib
import functools
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import ml_collections

T = TypeVar('T')


class ConfigError(ValueError):
  """A configuration that cannot be run. The message names the key, the value and the fix."""


@dataclasses.dataclass(frozen=True)
class ChoiceConfig:
  """A registry name and the options that go with it, for `bind`."""

  name: str
  options: Mapping[str, Any]


def unknown(kind: str, name: Any, choices) -> ConfigError:
  """The error for a name that is not in a registry, with the nearest valid names first."""
  near = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=3)
  hint = f' (did you mean {" or ".join(map(repr, near))}?)' if near else ''
  return ConfigError(f'{kind} {name!r} unknown{hint}; choose from {sorted(map(str, choices))}')


def resolve(config: ml_collections.ConfigDict | Mapping[str, Any]) -> dict:
  """A plain dictionary of the config, JSON types only."""
  plain = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
  return json.loads(json.dumps(plain))


def choose(kind: str, name: str, registry: Mapping[str, T]) -> T:
  """registry[name], or an error that lists what there is.

  Raises:
    ConfigError: name is not in the registry.
  """
  if name not in registry:
    raise unknown(kind, name, registry)
  return registry[name]


def bind(
    kind: str, name: str, options: Mapping[str, Any], registry: Mapping[str, Callable], *, given: Sequence[str] = ()
) -> Callable:
  """registry[name] with its options filled in.

  given: options that the caller fills in later, which are no config's to give.

  Raises:
    ConfigError: name is not in the registry, the function has no such option, or one that it needs is missing.
  """
  function = choose(kind, name, registry)
  parameters = inspect.signature(function).parameters
  known = {key: value for key, value in parameters.items() if value.kind is value.KEYWORD_ONLY and key not in given}
  for key in options:
    if key not in known:
      raise unknown(f'option of {kind} {name!r}', key, known)
  missing = [key for key, value in known.items() if value.default is value.empty and key not in options]
  if missing:
    raise ConfigError(f'{kind} {name!r} needs the options {missing}')
  return functools.partial(function, **options)


def parse(cls: type[T], section: Mapping[str, Any], where: str) -> T:
  """A frozen dataclass from a config section: every field given once, with its type, and nothing else.

  Args:
    cls: a dataclass; fields that are dataclasses themselves are parsed likewise.
    section: a ConfigDict or mapping.
    where: dotted name of the section, for messages.

  Raises:
    ConfigError: a key is unknown or missing, or a value has the wrong type.
  """
  section = section.to_dict() if isinstance(section, ml_collections.ConfigDict) else section
  if not isinstance(section, Mapping):
    raise ConfigError(
        f'{where} is {section!r}; expected a section with {sorted(f.name for f in dataclasses.fields(cls))}'
    )
  hints, values = typing.get_type_hints(cls), {}
  fields = {field.name for field in dataclasses.fields(cls)}
  for key in section:
    if key not in fields:
      raise unknown(f'{where}.{key}: key', key, fields)
  for field in dataclasses.fields(cls):
    if field.name in section:
      values[field.name] = _convert(hints[field.name], section[field.name], f'{where}.{field.name}')
    elif field.default is dataclasses.MISSING:
      raise ConfigError(f'{where}.{field.name} is missing; {cls.__name__} needs {sorted(fields)}')
  try:
    return cls(**values)
  except ValueError as error:
    raise ConfigError(f'{where}: {error}') from error


def _convert(hint, value, where):
  if dataclasses.is_dataclass(hint):
    return parse(hint, value, where)
  if isinstance(value, ml_collections.ConfigDict):
    value = value.to_dict()
  origin = typing.get_origin(hint) or hint
  if origin in (typing.Union, types.UnionType):
    hints = typing.get_args(hint)
    if value is None and type(None) in hints:
      return None
    return _convert(next(h for h in hints if h is not type(None)), value, where)
  if origin is tuple:
    if not isinstance(value, (tuple, list)):
      raise ConfigError(f'{where} is {value!r}; expected a tuple')
    return tuple(value)
  if origin is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  wrong_bool = isinstance(value, bool) and origin in (int, float)
  if origin is not Any and isinstance(origin, type) and (wrong_bool or not isinstance(value, origin)):
    raise ConfigError(f'{where} is {value!r} ({type(value).__name__}); expected {origin.__name__}')
  return value
