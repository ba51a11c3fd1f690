"""Reasoning Gym problems with worked rationales.

Every family pairs a Reasoning Gym generator with a step oracle: a function from the problem's metadata to the one
canonical chain of steps, a line each, every line small enough for a model of a million parameters. Where several orders
of valid reasoning exist the oracle keeps one: left to right, products before sums, minutes before hours.

The split is decided by a hash of the worked solution (of the multiset of animals in leg counting), so train, dev and
test are disjoint for every seed, and neither another wording, another order nor another family of the same
computation can leak.

Reference: Stojanovski et al., Reasoning Gym: Reasoning Environments for Reinforcement Learning with Verifiable Rewards,
arXiv 2505.24760.
"""

from __future__ import annotations

import functools
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from srm_jax.tasks import graders, task
from srm_jax.types import Problem

DEFAULT_COUNT = 1000
BARREN_DRAWS = 20_000  # a family that yields nothing new for so many draws counts as exhausted
MOST_REWRITES = 4  # a longer text outgrows the rows of models that are to learn it in a minute
SPLIT_BUCKETS = {0: 'test', 1: 'dev'}  # of ten; every other bucket is train


class Family(NamedTuple):
  """One Reasoning Gym data set and its step oracle.

  settings: arguments of the generator that the oracle relies on; a task's settings are merged over them.
  facts(entry) -> metadata that the oracle, the verifier and the split need; None drops the entry.
  steps(facts) -> (rationale lines, answer).
  preamble, closing: constant parts of the question that the prompt leaves out: they say nothing, forbid showing work,
    or state rules that are the same for every problem and so part of what is learnt.
  """

  settings: Mapping[str, Any]
  facts: Callable[[Mapping[str, Any]], dict[str, Any] | None]
  steps: Callable[[Mapping[str, Any]], tuple[list[str], str]]
  preamble: str = ''
  closing: str = ''


def _apply(a: int, operator: str, b: int) -> int:
  if operator not in _OPERATIONS:
    raise ValueError(f"basic_arithmetic has no rationale for {operator!r}; set operators to some of '+', '-', '*'")
  return _OPERATIONS[operator](a, b)


_OPERATIONS = {'+': lambda a, b: a + b, '-': lambda a, b: a - b, '*': lambda a, b: a * b}
_PRECEDENCE = {'+': 1, '-': 1, '*': 2, '/': 2}


def _evaluate(tokens: list[str], floor: int, lines: list[str]) -> int:
  """Precedence climbing over tokens (consumed from the front); appends one line for each operation."""
  head = tokens.pop(0)
  if head in ('(', '-('):
    value = _evaluate(tokens, 1, lines)
    tokens.pop(0)
    if head == '-(':
      lines.append(f'0-{value}={-value}')
      value = -value
  else:
    value = int(head)
  while tokens and _PRECEDENCE.get(tokens[0], 0) >= floor:
    operator = tokens.pop(0)
    right = _evaluate(tokens, _PRECEDENCE[operator] + 1, lines)
    result = _apply(value, operator, right)
    lines.append(f'{value}{operator}{right}={result}')
    value = result
  return value


def expression_steps(facts: Mapping[str, Any]) -> tuple[list[str], str]:
  """'12 + 34 - 7' -> 12+34=46, 46-7=39. Products first, parentheses when they are reached."""
  lines: list[str] = []
  value = _evaluate(facts['expression'].split(), 1, lines)
  return lines, str(value)


def leg_steps(facts: Mapping[str, Any]) -> tuple[list[str], str]:
  """'3 deers, 2 ants' -> 3 deers 3*4=12 0+12=12, 2 ants 2*6=12 12+12=24."""
  legs, total, lines = _animal_legs(), 0, []
  for animal, count in facts['animals'].items():
    product = count * legs[animal]
    plural = 's' if count > 1 else ''
    lines.append(f'{count} {animal}{plural} {count}*{legs[animal]}={product} {total}+{product}={total + product}')
    total += product
  return lines, str(total)


def interval_steps(facts: Mapping[str, Any]) -> tuple[list[str], str]:
  """'18:54 to 19:29' -> 29-54=-25, 60-25=35, 19-18-1=0. The hour is borrowed only when the minutes are negative."""
  (start_hour, start_minute), (end_hour, end_minute) = (map(int, facts[key].split(':')) for key in ('start', 'end'))
  minutes = end_minute - start_minute
  lines = [f'{end_minute}-{start_minute}={minutes}']
  if minutes >= 0:
    hours = end_hour - start_hour
    lines.append(f'{end_hour}-{start_hour}={hours}')
  else:
    hours = end_hour - start_hour - 1
    lines += [f'60-{-minutes}={60 + minutes}', f'{end_hour}-{start_hour}-1={hours}']
  return lines, f'{hours:02d}:{minutes % 60:02d}'


_EQUATION = re.compile(
    r'(?:(?P<before>-?\d+) (?=[+-]))?(?P<sign>[+-]? ?)(?:(?P<factor>\d+)\*)?[a-z](?: (?P<after>[+-] \d+))?'
    r' = (?P<right>-?\d+)')


def equation_steps(facts: Mapping[str, Any]) -> tuple[list[str], str]:
  """'3*x + 4 = 19' -> 19-4=15, 15/3=5: the constant leaves, then the coefficient."""
  match = _EQUATION.fullmatch(facts['equation'])
  if match is None:
    raise ValueError(f'simple_equations has no rationale for {facts["equation"]!r}; expected a linear equation')
  constant = int((match['before'] or match['after'] or '0').replace(' ', ''))
  coefficient = int(match['factor'] or 1) * (-1 if match['sign'].strip() == '-' else 1)
  value, lines = int(match['right']), []
  if constant:
    lines.append(f'{value}{"-" if constant > 0 else "+"}{abs(constant)}={value - constant}')
    value -= constant
  if coefficient != 1:
    lines.append(f'{value}/{coefficient}={value // coefficient}')
    value //= coefficient
  return lines, str(value)


_REWRITES = {
    ('A#', '#A'): [], ('B#', '#B'): [], ('A#', '#B'): ['#B', 'A#'], ('B#', '#A'): ['#A', 'B#'],
}  # what becomes of two neighbours that face each other


def rewriting_steps(facts: Mapping[str, Any]) -> tuple[list[str], str]:
  """'B# #B A# #B' -> A# #B, #B A#: the leftmost pair that faces each other is rewritten, a line each time."""
  state, lines = facts['program'].split(), []
  while True:
    place = next((i for i, pair in enumerate(zip(state, state[1:])) if pair in _REWRITES), None)
    if place is None:
      return lines, ' '.join(state)
    state[place : place + 2] = _REWRITES[state[place], state[place + 1]]
    lines.append(' '.join(state))


def _program_facts(entry: Mapping[str, Any]) -> dict[str, Any] | None:
  facts = {'program': re.search(r'following program:\n\n(.*)\n', entry['question'])[1]}
  lines, answer = rewriting_steps(facts)
  return facts if answer and 0 < len(lines) <= MOST_REWRITES else None  # nothing left is no answer


def _interval_facts(entry: Mapping[str, Any]) -> dict[str, Any] | None:
  metadata = entry['metadata']  # its date is the day of generation: only the clock times are kept
  start, end = (metadata[key].split(' ')[1][:5] for key in ('start_time', 'end_time'))
  # An end at midnight reads 00:00, and Reasoning Gym then answers with a negative duration.
  return {'start': start, 'end': end, 'task_type': metadata['task_type']} if start <= end else None


def _pick(*keys: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
  return lambda entry: {key: entry['metadata'][key] for key in keys}


_AB_PREAMBLE = """A::B is a system with 4 tokens: `A#`, `#A`, `B#` and `#B`.

An A::B program is a sequence of tokens. Example:

    B# A# #B #A B#

To *compute* a program, we must rewrite neighbor tokens, using the rules:

    A# #A ... becomes ... nothing
    A# #B ... becomes ... #B A#
    B# #A ... becomes ... #A B#
    B# #B ... becomes ... nothing

In other words, whenever two neighbor tokens have their '#' facing each-other,
they must be rewritten according to the corresponding rule.

Now, consider the following program:

"""

FAMILIES: dict[str, Family] = {
    'chain_sum': Family(
        {}, _pick('expression'), expression_steps,
            preamble='State the final answer to the following arithmetic problem: '),
    'basic_arithmetic': Family(
        {'operators': ('+', '-', '*'), 'allow_negation': False}, _pick('expression'), expression_steps),
    'leg_counting': Family(
        {}, _pick('animals'), leg_steps,
        preamble='Your task is to count how many legs there are in total when given a list of animals.\n\nNow, '),
    'time_intervals': Family({'task_types': ['time']}, _interval_facts, interval_steps),
    'ab': Family(
        {}, _program_facts, rewriting_steps, preamble=_AB_PREAMBLE, closing='Return the final state of the program.'),
    'simple_equations': Family({'max_terms': 2}, _pick('equation'), equation_steps),
}

PRESETS: dict[str, dict[str, Mapping[str, Mapping[str, Any]]]] = {
    'arithmetic_mix': {
        'families': {
            'chain_sum': {'min_terms': 2, 'max_terms': 5, 'min_digits': 1, 'max_digits': 1},
            'leg_counting': {'min_animals': 2, 'max_animals': 3, 'min_instances': 1, 'max_instances': 5},
            'basic_arithmetic': {'min_terms': 2, 'max_terms': 4, 'min_digits': 1, 'max_digits': 1},
        },
        'hard': {
            'chain_sum': {'min_terms': 6, 'max_terms': 8, 'min_digits': 1, 'max_digits': 1},
            'leg_counting': {'min_animals': 4, 'max_animals': 5, 'min_instances': 1, 'max_instances': 5},
            'basic_arithmetic': {'min_terms': 5, 'max_terms': 6, 'min_digits': 1, 'max_digits': 1},
        },
    },
    'sums': {
        'families': {'chain_sum': {'min_terms': 3, 'max_terms': 4, 'min_digits': 1, 'max_digits': 1}},
        'hard': {'chain_sum': {'min_terms': 5, 'max_terms': 6, 'min_digits': 1, 'max_digits': 1}},
    },
    'rewriting': {'families': {'ab': {'length': 7}}, 'hard': {'ab': {'length': 9}}},
    'worded_mix': {
        'families': {
            'leg_counting': {'min_animals': 2, 'max_animals': 4, 'min_instances': 1, 'max_instances': 9},
            'time_intervals': {'max_time_difference_seconds': 12 * 3600},
            'simple_equations': {'min_terms': 2, 'max_terms': 2, 'min_value': 1, 'max_value': 20,
            'operators': ('+', '-', '*')},
        },
        'hard': {
            'leg_counting': {'min_animals': 5, 'max_animals': 6, 'min_instances': 1, 'max_instances': 9},
            'simple_equations': {'min_terms': 2, 'max_terms': 2, 'min_value': 21, 'max_value': 50,
            'operators': ('+', '-', '*')},
        },
    },
}


@functools.cache
def _reasoning_gym() -> Any:
  """The package, which takes two seconds, so that tasks that do not generate never import it.

  Python warns of code that it compiles for the first time; a user can do nothing about that of a dependency.
  """
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', SyntaxWarning)
    import reasoning_gym
  return reasoning_gym


def _dataset(family: str, settings: Mapping[str, Any], seed: int) -> Any:
  if family not in FAMILIES:
    raise ValueError(f'family {family!r} unknown; choose from {", ".join(FAMILIES)}')
  try:
    return _reasoning_gym().create_dataset(family, seed=seed, size=2**31, **{**FAMILIES[family].settings, **settings})
  except (TypeError, AssertionError) as error:
    raise ValueError(f'family {family!r} refuses {dict(settings)}: {error}') from error


@functools.cache
def _animal_legs() -> Mapping[str, int]:
  return _reasoning_gym().arithmetic.leg_counting.ANIMALS


@functools.cache
def _verifier(family: str) -> Callable[[str, Mapping[str, Any]], float]:
  return _dataset(family, {}, 0).score_answer


def _split_key(family: str, facts: Mapping[str, Any], rationale: str) -> str:
  """What must not be shared between splits: the computation, and for a sum over animals its multiset."""
  if family == 'leg_counting':
    return ', '.join(sorted(f'{count} {animal}' for animal, count in facts['animals'].items()))
  return rationale


def _to_problem(family: str, entry: Mapping[str, Any]) -> tuple[str, Problem] | None:
  """Split name and problem of one Reasoning Gym entry; None where the entry is unusable."""
  facts = FAMILIES[family].facts(entry)
  if facts is None:
    return None
  # The oracle's answer is the gold: Reasoning Gym's basic_arithmetic without parentheses ignores precedence.
  lines, answer = FAMILIES[family].steps(facts)
  rationale = '\n'.join(lines)
  split = SPLIT_BUCKETS.get(task.stable_hash(_split_key(family, facts, rationale)) % 10, 'train')
  metadata = {'family': family, 'steps': len(lines), **facts}
  identifier = f'{family}-{task.stable_hash(entry["question"]):016x}'
  return split, Problem(identifier, entry['question'], answer, rationale, metadata)


def _stream(family: str, settings: Mapping[str, Any], split: str, seed: int) -> Iterator[Problem]:
  """Distinct problems of one family and split, in a fixed order; ends where the space is exhausted."""
  # Entry i of a Reasoning Gym data set depends on seed + i: neighbouring seeds would share all but one problem.
  dataset = _dataset(family, settings, task.stable_hash(f'{family} {seed}') >> 16)
  wanted = 'test' if split == 'hard' else split  # settings of hard may overlap train's: its bucket never does
  seen, barren = set(), 0
  for index in itertools.count():
    made = _to_problem(family, dataset[index])
    barren += 1
    if made is not None and made[0] == wanted and made[1].id not in seen:
      seen.add(made[1].id)
      barren = 0
      yield made[1]
    if barren >= BARREN_DRAWS:
      return


def generate(
    name: str, families: Mapping[str, Mapping[str, Any]], split: str, *, count: int | None, seed: int
) -> list[Problem]:
  """The first `count` problems of a split (1000 when None), families in turn.

  A smaller count gives a prefix of a larger one.

  Raises:
    ValueError: a family has fewer distinct problems than its share.
  """
  count = DEFAULT_COUNT if count is None else count
  streams = {family: _stream(family, settings, split, seed) for family, settings in families.items()}
  problems: list[Problem] = []
  for family in itertools.islice(itertools.cycle(streams), count):
    problem = next(streams[family], None)
    if problem is None:
      found = sum(other.metadata['family'] == family for other in problems)
      raise ValueError(
          f'task {name!r}, split {split!r}: family {family!r} with {dict(families[family])} has only about {found} '
          f'distinct problems, and {count} problems need {-(-count // len(families))} of it; ask for fewer or widen it')
    problems.append(problem)
  return problems


def prompt(problem: Problem) -> str:
  """The question without its family's constant parts, and a newline."""
  family = FAMILIES[problem.metadata['family']]
  text = problem.question.strip().removeprefix(family.preamble).removesuffix(family.closing).strip()
  return f'{text[0].upper()}{text[1:]}\n'


def grade(problem: Problem, text: str) -> float:
  """1.0 where Reasoning Gym's verifier gives the extracted answer full marks, else 0.0 (no partial credit)."""
  answer = graders.extract_hash_answer(text)
  if answer is None or len(answer) > graders.MAX_ANSWER or not answer.isascii():
    return 0.0
  entry = {'question': problem.question, 'answer': problem.answer, 'metadata': problem.metadata}
  return float(_verifier(problem.metadata['family'])(answer, entry) == 1.0)


def first_wrong_step(problem: Problem, text: str) -> int | None:
  """Index of the first line that is not the oracle's next step; see `task.Task`.

  A right answer line ends the check, also when steps were left out (a direct answer); a line with false arithmetic is
  never the oracle's.
  """
  oracle = iter((problem.rationale or '').splitlines())
  lines = text.splitlines()
  for index, line in enumerate(lines):
    if line.lstrip().startswith(task.ANSWER_CUE.strip()):
      return None if grade(problem, line) else index
    if line.strip() and line.split() != next(oracle, '').split():
      return index
  return len(lines)


def procedural_task(
    name: str, families: Mapping[str, Mapping[str, Any]], hard: Mapping[str, Mapping[str, Any]] | None = None
) -> task.Task:
  """A task that mixes Reasoning Gym families evenly.

  Args:
    name: the task's name.
    families: family -> arguments of its Reasoning Gym generator.
    hard: the same for the split 'hard'; None: no such split.

  Raises:
    ValueError: an unknown family, no family.
  """
  settings = {'train': families, 'dev': families, 'test': families, **({} if hard is None else {'hard': hard})}
  for family in itertools.chain(families, hard or ()):
    if family not in FAMILIES:
      raise ValueError(f'task {name!r}: family {family!r} unknown; choose from {", ".join(FAMILIES)}')
  if not families or hard == {}:
    raise ValueError(f'task {name!r} names no family; choose from {", ".join(FAMILIES)}')

  @functools.lru_cache(maxsize=4)  # many models are tested on the same problems, one after another
  def drawn(split: str, count: int | None, seed: int) -> tuple[Problem, ...]:
    return tuple(generate(name, settings[split], split, count=count, seed=seed))

  def problems(split: str, *, count: int | None = None, seed: int = 0) -> list[Problem]:
    task.check_split(name, split, tuple(settings))
    return list(drawn(split, count, seed))

  return task.Task(
      name=name, domain='math', splits=tuple(settings), problems=problems, prompt=prompt,
          solution=task.worked_solution,
      extract=graders.extract_hash_answer, grade=grade, first_wrong_step=first_wrong_step)
