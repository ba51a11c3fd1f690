"""The house rules, read from the sources: floors, sizes, names, mirror, dependencies. Each checker is tested below."""

import ast
import functools
import importlib.metadata
import pathlib
import re
import statistics
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# A module imports only from its own floor and below. The longest matching name decides.
FLOORS = {
  'srm_jax': 0,
  'srm_jax.types': 0, 'srm_jax.sharding': 0, 'srm_jax.schema': 0, 'srm_jax.hosts': 0,
  'srm_jax.models': 1, 'srm_jax.losses': 1,
  'srm_jax.inference': 2, 'srm_jax.data': 2, 'srm_jax.tasks': 2,
  'srm_jax.rollout': 3, 'srm_jax.rewards': 3, 'srm_jax.train_step': 3, 'srm_jax.optimizers': 3,
  'srm_jax.checkpoints': 3, 'srm_jax.metrics': 3, 'srm_jax.statistics': 3, 'srm_jax.diagnostics': 3,
  'srm_jax.alarms': 3,
  'srm_jax.recipes': 4,
  'srm_jax.train': 5, 'srm_jax.annotate': 5, 'srm_jax.evaluate': 5, 'srm_jax.plan': 5, 'srm_jax.report': 5,
  'srm_jax.process_labels': 5,
  'srm_jax.cache_teacher': 5, 'srm_jax.stages': 5, 'srm_jax.hlo': 5, 'srm_jax.export': 5, 'srm_jax.inspection': 5,
  'srm_jax.rollout_view': 5,
  'experiments': 6, 'configs': 6, 'tests': 7,
}
STRANGERS = [('srm_jax.models', 'srm_jax.losses'), ('srm_jax.losses', 'srm_jax.models')]
TOP_LEVEL = {
  '.ci', '.gitignore', 'LICENSE', 'README.md', 'configs', 'experiments', 'notebooks', 'setup.py', 'srm_jax', 'tests'}

# Exceptions, each with its reason.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}
TESTED_ELSEWHERE: dict[str, tuple[str, str]] = {  # module file -> (test file, reason)
  f'srm_jax/models/families/{name}.py': ('tests/models/families/family_test.py', 'one table of tests for all families')
  for name in ('gemma', 'llama', 'phi', 'qwen', 'smollm')
}
NEVER_IMPORTED: dict[str, str] = {}  # distribution in setup.py's REQUIREMENTS -> why it is there all the same


# --- what the checkers read


@functools.cache
def _files() -> tuple[str, ...]:
  """What is in the repository or about to be: tracked files, and new ones that are not ignored."""
  command = ['git', 'ls-files', '--cached', '--others', '--exclude-standard']
  listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  if listing.returncode:
    pytest.skip('not a git checkout: cannot tell the repository from what lies around in it')
  return tuple(sorted({name for name in listing.stdout.splitlines() if (ROOT / name).is_file()}))


@functools.cache
def _sources(*folders: str) -> dict[str, str]:
  """{path: text} of the Python files in these folders; all of them when none is named."""
  chosen = [name for name in _files() if name.endswith('.py') and (not folders or name.split('/')[0] in folders)]
  assert chosen, folders
  return {name: (ROOT / name).read_text(encoding='utf-8') for name in chosen}


def module_name(path: str) -> str:
  return path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')


def imports(sources: dict[str, str]) -> dict[str, set[str]]:
  """{module: names it imports, anywhere in the file}; `from a import b` is a.b where that is a module here, else a."""
  modules = {module_name(path) for path in sources}
  found = {}
  for path, text in sources.items():
    name, names = module_name(path), set()
    package = name if path.endswith('/__init__.py') else name.rpartition('.')[0]
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.Import):
        names.update(alias.name for alias in node.names)
      elif isinstance(node, ast.ImportFrom):
        parents = package.split('.')[:len(package.split('.')) - node.level + 1] if node.level else []
        base = '.'.join([*parents, *([node.module] if node.module else [])])
        names.update(f'{base}.{a.name}' if f'{base}.{a.name}' in modules else base for a in node.names)
    found[name] = names - {name}
  return found


def function_lengths(sources: dict[str, str]) -> dict[str, int]:
  """{path:function: its lines, docstring aside}."""
  lengths = {}
  for path, text in sources.items():
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        first = node.body[0]
        documented = ast.get_docstring(node) is not None
        docstring = first.end_lineno - first.lineno + 1 if documented else 0
        key = f'{path}:{node.name}'
        lengths[key] = max(lengths.get(key, 0), node.end_lineno - node.lineno + 1 - docstring)
  return lengths


# --- checkers: each returns what is wrong, as sentences


def within(module: str, package: str) -> bool:
  return module == package or module.startswith(package + '.')


def floor_of(module: str) -> int | None:
  matching = [name for name in FLOORS if within(module, name) and (name != 'srm_jax' or module == 'srm_jax')]
  return FLOORS[max(matching, key=len)] if matching else None


def floor_violations(graph: dict[str, set[str]]) -> list[str]:
  wrong = [f'{module} has no floor: add it to FLOORS' for module in graph if floor_of(module) is None]
  for module, imported in graph.items():
    for name in sorted(imported):
      above = None not in (floor_of(name), floor_of(module)) and floor_of(name) > floor_of(module)
      strangers = any(within(module, a) and within(name, b) for a, b in STRANGERS)
      if above or strangers:
        wrong.append(f'{module} imports {name}' + (', a higher floor' if above else ': they may not know each other'))
  return wrong


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
  seen, todo = set(), [start]
  while todo:
    for name in graph.get(todo.pop(), ()):
      if name not in seen:
        seen.add(name)
        todo.append(name)
  return seen


def cycles(graph: dict[str, set[str]]) -> list[str]:
  return sorted(module for module in graph if module in reachable(graph, module))


def reaches(graph: dict[str, set[str]], package: str, forbidden: set[str]) -> list[str]:
  """Modules of a package that import, through whatever chain, one of the forbidden top-level names."""
  return sorted(
    f'{module} reaches {name}' for module in graph if within(module, package)
    for name in sorted(reachable(graph, module)) if any(within(name, other) for other in forbidden))


def environment_edits(sources: dict[str, str]) -> list[str]:
  """Places that change os.environ: assignment, deletion, or a method that writes."""
  wrong = []
  for path, text in sources.items():
    for node in ast.walk(ast.parse(text)):
      written = isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load) and node.value
      called = isinstance(node, ast.Attribute) and node.attr in ('setdefault', 'update', 'pop', 'clear') and node.value
      put = isinstance(node, ast.Attribute) and node.attr in ('putenv', 'unsetenv')
      if put or any(owner and ast.unparse(owner) in ('os.environ', 'environ') for owner in (written, called)):
        wrong.append(f'{path}:{node.lineno} edits the environment')
  return wrong


def bad_names(paths) -> list[str]:
  parts = {part.removesuffix('.py') for path in paths for part in path.split('/')}
  return sorted(filter(re.compile(r'(?:utils?|common|helpers?|misc|.*_lib|.*_utils)$').match, parts))


def too_long(sources: dict[str, str], limit: int) -> list[str]:
  lengths = {path: text.count('\n') for path, text in sources.items()}
  return [f'{path} has {n} lines, more than {limit}' for path, n in lengths.items() if n > limit]


def too_wide(sources: dict[str, str], limit: int) -> list[str]:
  return [
    f'{path}:{number} has {len(line)} characters, more than {limit}' for path, text in sources.items()
    for number, line in enumerate(text.splitlines(), start=1) if len(line) > limit]


def config_violations(sources: dict[str, str]) -> list[str]:
  """Of files with a get_config: length, and a docstring with the command that runs it."""
  configs = {path: text for path, text in sources.items() if re.search(r'^def get_config\(', text, re.M)}
  commands = re.compile(r'python -m experiments\.\w+|bash experiments/\w+')
  silent = [path for path, text in configs.items() if not commands.search(ast.get_docstring(ast.parse(text)) or '')]
  return too_long(configs, 90) + [f'the docstring of {path} names no command' for path in silent]


def untested(paths) -> list[str]:
  wrong = []
  for path in paths:
    if path.startswith('srm_jax/') and path.endswith('.py') and not path.endswith('__init__.py'):
      test = TESTED_ELSEWHERE.get(path, (path.replace('srm_jax/', 'tests/', 1).removesuffix('.py') + '_test.py',))[0]
      if test not in paths:
        wrong.append(f'{path} has no {test}')
  return wrong


def orphans(paths) -> list[str]:
  """Tests below tests/<package of srm_jax>/ whose module or package is gone."""
  packages = {path.split('/')[1] for path in paths if re.match(r'srm_jax/\w+/', path)}
  elsewhere = {test for test, _ in TESTED_ELSEWHERE.values()}
  mirrored = [path for path in paths if re.match(rf'tests/({"|".join(sorted(packages))})/.*_test\.py$', path)]
  modules = ((path, path.replace('tests/', 'srm_jax/', 1).replace('_test.py', '.py')) for path in mirrored)
  return [
    f'{path} tests no module' for path, module in modules
    if path not in elsewhere and not {module, module.replace('.py', '/__init__.py')} & set(paths)]


def foreign_places(texts: dict[str, str]) -> list[str]:
  """Absolute paths of somebody's machine, and package registries."""
  pattern = re.compile(
    r'(?<![\w.~-])/(?:home|root|work|Users)/|pypi\.org|pythonhosted\.org|--(?:extra-)?index-url|--find[-]links')
  return [f'{path}: {match[0]}' for path, text in texts.items() for match in pattern.finditer(text)]


def normalized(distribution: str) -> str:
  return re.sub(r'[-_.]+', '-', distribution).lower()


def third_party(graph: dict[str, set[str]]) -> set[str]:
  own = {'srm_jax', 'experiments', 'configs', 'tests'}
  return {name.split('.')[0] for names in graph.values() for name in names} - own - set(sys.stdlib_module_names)


def setup_lists(text: str) -> tuple[list[str], dict[str, list[str]]]:
  """REQUIREMENTS and EXTRAS of setup.py, as normalized names."""
  values = {
    node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(text).body
    if isinstance(node, ast.Assign) and node.targets[0].id in ('REQUIREMENTS', 'EXTRAS')}
  names = lambda listed: [normalized(re.match(r'[\w.-]+', item)[0]) for item in listed]
  return names(values['REQUIREMENTS']), {extra: names(listed) for extra, listed in values['EXTRAS'].items()}


# --- the repository under the checkers


def test_imports_follow_the_floors():
  assert not floor_violations(imports(_sources('srm_jax', 'experiments', 'configs')))


def test_no_import_cycles():
  assert not cycles(imports(_sources('srm_jax', 'experiments', 'configs')))


def test_tasks_never_import_jax():
  assert not reaches(imports(_sources('srm_jax')), 'srm_jax.tasks', {'jax', 'flax', 'optax', 'orbax', 'chex'})


def test_only_the_top_floor_sees_flags():
  graph = imports(_sources('srm_jax'))
  flags = {'absl', 'absl.flags', 'absl.app', 'argparse', 'ml_collections.config_flags'}
  assert not {module: names & flags for module, names in graph.items() if names & flags}


def test_the_library_leaves_the_environment_alone():
  assert not environment_edits(_sources('srm_jax'))


def test_names():
  assert not bad_names(_files())


def test_top_level():
  assert {path.split('/')[0] for path in _files()} <= TOP_LEVEL


def test_file_sizes():
  assert not too_long({path: text for path, text in _sources().items() if path not in LONG_FILES}, 400)


def test_line_widths():
  assert not too_wide(_sources('srm_jax', 'experiments', 'configs', 'tests'), 120)


def test_function_sizes():
  lengths = function_lengths(_sources('srm_jax'))
  everywhere = lengths | function_lengths(_sources('experiments', 'configs'))
  assert not {name: n for name, n in everywhere.items() if n > 100 and name not in LONG_FUNCTIONS}
  assert statistics.median(lengths.values()) <= 12
  assert statistics.quantiles(lengths.values(), n=10)[-1] <= 40


def test_configs_are_short_and_say_how_to_run_them():
  assert not config_violations(_sources('configs'))


def test_tests_mirror_the_library():
  assert not untested(_files())
  assert not orphans(_files())


def test_tests_are_at_least_half_the_size_of_the_library():
  tests, library = (sum(text.count('\n') for text in _sources(folder).values()) for folder in ('tests', 'srm_jax'))
  assert tests >= library / 2


def test_nothing_points_at_a_machine_or_a_registry():
  texts = {}
  for path in _files():
    content = (ROOT / path).read_bytes()
    if b'\0' not in content:
      texts[path] = content.decode('utf-8')
  assert not foreign_places(texts)


def test_exceptions_are_still_needed():
  sources = _sources()
  assert all(sources[path].count('\n') > 400 for path in LONG_FILES)
  assert all(function_lengths(sources)[name] > 100 for name in LONG_FUNCTIONS)
  assert set(TESTED_ELSEWHERE) <= set(_files()) and {test for test, _ in TESTED_ELSEWHERE.values()} <= set(_files())


def test_imports_and_requirements_agree():
  required, extras = setup_lists((ROOT / 'setup.py').read_text(encoding='utf-8'))
  installed = importlib.metadata.packages_distributions()
  owners = {module: {normalized(name) for name in found} for module, found in installed.items()}
  imported = third_party(imports(_sources('srm_jax', 'experiments', 'configs')))
  declared = {*required, *(name for listed in extras.values() for name in listed)}
  undeclared = {module for module in imported if not owners.get(module, {normalized(module)}) & declared}
  assert not undeclared, 'imported, but not in setup.py'
  used = {name for module in imported for name in owners.get(module, {normalized(module)})}
  assert set(required) - used == set(NEVER_IMPORTED), 'in setup.py, but nothing imports it'


def test_everything_required_is_pinned():
  required, extras = setup_lists((ROOT / 'setup.py').read_text(encoding='utf-8'))
  lines = [line for line in (ROOT / 'experiments/constraints.txt').read_text().splitlines() if not line.startswith('#')]
  pins = [re.fullmatch(r'([a-z0-9-]+)==[\w.]+(?:; python_version (?:<|>=) "3\.12")?', line) for line in lines]
  assert all(pins), [line for line, pin in zip(lines, pins, strict=True) if not pin]
  assert {*required, *(name for listed in extras.values() for name in listed)} <= {pin[1] for pin in pins}


# --- the checkers under test


def test_floor_checker():
  graph = imports({
    'srm_jax/losses/a.py': 'from srm_jax.models import b',
    'srm_jax/models/b.py': 'from srm_jax import types\nfrom ..recipes import c\n',
    'srm_jax/recipes/c.py': 'def f():\n  import experiments.train',
    'srm_jax/types.py': '',
    'srm_jax/newcomer.py': '',
    'srm_jax/train.py': 'from srm_jax.recipes.c import f',
  })
  assert graph['srm_jax.models.b'] == {'srm_jax.types', 'srm_jax.recipes.c'}
  assert floor_violations(graph) == [
    'srm_jax.newcomer has no floor: add it to FLOORS',
    'srm_jax.losses.a imports srm_jax.models.b: they may not know each other',
    'srm_jax.models.b imports srm_jax.recipes.c, a higher floor',
    'srm_jax.recipes.c imports experiments.train, a higher floor',
  ]


def test_cycle_and_reach_checkers():
  graph = imports({
    'p/a.py': 'from p import b', 'p/b.py': 'from . import c', 'p/c.py': 'from .a import x',
    'p/d.py': 'import p.a, jax.numpy'})
  assert cycles(graph) == ['p.a', 'p.b', 'p.c']
  assert reaches({**graph, 'q': {'p.d'}}, 'q', {'jax'}) == ['q reaches jax.numpy']
  assert not reaches(graph, 'p.a', {'jax'})


def test_environment_checker():
  edits = "import os\nos.environ['A'] = '1'\nos.environ.setdefault('B', '2')\nos.putenv('C', '3')"
  assert len(environment_edits({'a.py': edits})) == 3
  assert not environment_edits({'a.py': "import os\nos.environ.get('A')\nx = os.environ['A']\nd.update(os.environ)"})


def test_size_checkers():
  lengths = function_lengths({'a.py': 'def f(x):\n  """One.\n\n  Two.\n  """\n  return x\n\n\ndef g():\n  return 1\n'})
  assert lengths == {'a.py:f': 2, 'a.py:g': 2}
  assert too_long({'a.py': 'x\n' * 5, 'b.py': 'x\n' * 4}, 4) == ['a.py has 5 lines, more than 4']
  assert too_wide({'a.py': 'x\néxxxx\n', 'b.py': 'éxxx\n'}, 4) == ['a.py:2 has 5 characters, more than 4']
  silent = '"""Run me."""\ndef get_config():\n  pass\n'
  assert config_violations({'a.py': silent}) == ['the docstring of a.py names no command']
  assert not config_violations({'a.py': '"""python -m experiments.train"""\ndef get_config():\n  pass\n'})


def test_name_and_mirror_checkers():
  assert bad_names(['srm_jax/utils/a.py', 'srm_jax/loss_lib.py', 'srm_jax/a.py']) == ['loss_lib', 'utils']
  paths = ['srm_jax/a.py', 'srm_jax/p/b.py', 'srm_jax/p/__init__.py', 'tests/p/b_test.py', 'tests/p/gone_test.py']
  assert untested(paths) == ['srm_jax/a.py has no tests/a_test.py']
  assert orphans(paths) == ['tests/p/gone_test.py tests no module']


@pytest.mark.parametrize('folder', ['home', 'root', 'work', 'Users'])
def test_place_checker(folder):
  assert foreign_places({'a': f'cd /{folder}/x'}) == [f'a: /{folder}/']
  assert not foreign_places({'a': f'https://example.com/{folder}/x, ~/{folder}/x, frame{folder}/'})
  assert foreign_places({'a': 'https://' + 'pypi' + '.org/simple'})


def test_requirement_readers():
  lists = "REQUIREMENTS = ['Ml_Collections>=1']\nEXTRAS = {'x': ['jax[cuda12]']}"
  assert setup_lists(lists) == (['ml-collections'], {'x': ['jax']})
  assert third_party({'srm_jax.a': {'os.path', 'flax.linen', 'srm_jax.types'}}) == {'flax'}
