r"""Final answers: finding them in a completion, and deciding whether two are equal.

`math_equal` never raises, never hangs and never executes text. Its bounds count work (length, nesting, digits,
exponents, executed lines), not seconds: a busy machine changes no verdict, and any thread may call it.

Its convention, where graders of the field disagree: equality is mathematical, not textual (3245/5 = 649); units,
currency, degree and percent signs are decoration (84\% = 84, and therefore != 0.84); x = 5 equals 5; a tuple, an
interval and a matrix are ordered, a set or a bare list is not; a decimal equals a fraction where both agree in at least
six decimals.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import sys
import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any

MAX_ANSWER = 256  # characters: the longest gold answer of MATH has 159
MAX_NESTING = 12
MAX_DIGITS = 24  # of one number
MAX_POWER = 1000  # product of all integers in exponents
MAX_LINES = 1_200_000  # executed inside the computer algebra: about half a second
MAX_ELEMENTS = 16
ROUNDED_PLACES = 6

_HASH = re.compile(r'####[ \t]*([^\n]*)')
_NUMBER = re.compile(r'-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\$?\.\d+', re.ASCII)


def extract_hash_answer(text: str) -> str | None:
  """What follows the first '####' on its line, stripped; None where there is none or it is empty."""
  match = _HASH.search(text)
  return (match[1].strip() or None) if match else None


def extract_boxed(text: str) -> str | None:
  r"""Content of the last \boxed{...} or \fbox{...} whose braces balance, stripped; None where there is none."""
  starts = {match.end() - 1 for match in re.finditer(r'\\f?box(?:ed)?\s?\{', text)}
  open_braces: list[int] = []
  best = (-1, -1)
  for index, character in enumerate(text) if starts else ():  # one pass: an adversary may open a brace a character
    if character == '{':
      open_braces.append(index)
    elif character == '}' and open_braces:
      start = open_braces.pop()
      if start in starts:
        best = max(best, (start, index))
  return text[best[0] + 1:best[1]].strip() or None if best[1] > 0 else None


def last_number(text: str) -> str | None:
  """The last number of a text in canonical form, without commas and dollar signs; None where there is none."""
  numbers = _NUMBER.findall(text)
  return canonical_number(numbers[-1]) if numbers else None


def canonical_number(text: str) -> str:
  """Commas, dollar signs, surrounding space and a full stop at the end removed: '$1,234.' -> '1234'."""
  return text.replace(',', '').replace('$', '').strip().removesuffix('.')


def number_equal(gold: str, prediction: str | None) -> bool:
  """Whether two numbers are the same string in canonical form: the strict grading of GSM8K."""
  return prediction is not None and canonical_number(gold) == canonical_number(prediction)


def last_number_equal(gold: str, text: str) -> bool:
  """Whether the last number of a text is the gold: the flexible grading of GSM8K."""
  return number_equal(gold, last_number(text))


def math_equal(gold: Any, prediction: Any) -> bool:
  """Whether two final answers (text or LaTeX, without the sentence around them) are mathematically equal.

  Exact paths come first: strings after normalisation, rational numbers, lists element by element; then math-verify
  within the bounds of this module. Anything beyond a bound, and anything that cannot be parsed, is not equal.
  The relation is not symmetric where the gold is the more explicit one; pass the gold first.

  Args:
    gold: the right answer; a string or a number.
    prediction: the answer to check; anything else than a string or a number is wrong.
  """
  gold, prediction = _as_text(gold), _as_text(prediction)
  if gold is None or prediction is None:
    return False
  if gold == prediction:
    return True
  if max(len(gold), len(prediction)) > MAX_ANSWER:
    return False
  return _equal(normalize_answer(gold), normalize_answer(prediction), [MAX_LINES])


def _as_text(value: Any) -> str | None:
  if isinstance(value, bool) or not isinstance(value, (str, int, float)):
    return None
  if isinstance(value, float) and not math.isfinite(value):
    return None
  if isinstance(value, int) and value.bit_length() > 4 * MAX_ANSWER:  # str() refuses, or is quadratic
    return None
  return str(value).strip() or None


_UNITS = '|'.join(
    'degrees? units? percent points? dollars? cents? inch(?:es)? f(?:ee|oo)t miles? mph yards? meters? centimeters? '
    'kilometers? cm km mm kg grams? pounds? ounces? gallons? liters? seconds? minutes? hours? days? weeks? months? '
    'years? people ways?'.split())
_SPELLINGS = (
    (r'\\f?box(?:ed)?\s*\{(.*)\}', r'\1'),
    (r'^(?:\\\(|\\\[|\$+)(.*?)(?:\\\)|\\\]|\$+)$', r'\1'),
    (r'[−–]', '-'), ('×', r'\\times '), ('÷', '/'), ('·', r'\\cdot '),
    ('π', r'\\pi '), ('∞', r'\\infty '), ('°', ''),
    (r'(?<!\\)\\[!,;: ]|\\q?quad|~', ' '),
    (r'\\(?:left|right|displaystyle|limits|[bB]igg?[lr]?)(?![a-zA-Z])', ''),
    (r'\\[dtc]frac', r'\\frac'),
    (r'\{,\}', ','),
    (r'\^\s*\{?\s*\\circ\s*\}?|\\degree', ''),
    (r'\\?[%$]', ''),
    (r'(?<=.)\\(?:text|mbox)\s*\{[a-zA-Z .]*\}\s*(?:\^\s*\{?[23]\}?)?\.?$', ''),
    (r'\\(?:text|mbox|textbf|textrm|mathrm|mathbf|textit)\s*\{([^{}]*)\}', r' \1 '),
    (rf'(?<=[\d}})\\])\s*(?:square |cubic |sq\. ?|cu\. ?)?(?:{_UNITS})\s*(?:\^\s*\{{?[23]\}}?)?$', ''),
    (r'\\frac\s*(\d)\s*(\d)', r'\\frac{\1}{\2}'),
    (r'\\frac\s*(\d)\s*\{', r'\\frac{\1}{'),
    (r'\\sqrt\s*(\w)', r'\\sqrt{\1}'),
    (r'(?<=\d)\s+(\d+)\s*/\s*(\d+)', r'\\frac{\1}{\2}'),
    (r'\s+', ' '),
    (r'(?<![a-zA-Z\d]) | (?![a-zA-Z\d])', ''),
    (r'[.,]+$', ''),
    (r'^\{([^{},]*)\}$', r'\1'),
)
_REWRITES = tuple((re.compile(pattern), replacement) for pattern, replacement in _SPELLINGS)


def normalize_answer(text: str) -> str:
  """One spelling for the many of one answer: delimiters, spacing, units and decoration removed."""
  for pattern, replacement in _REWRITES:
    text = pattern.sub(replacement, text.strip())
  return text


_CLAIM = re.compile(r'^.*(?:=|\\in(?![a-zA-Z]))\s*')
_NAMED = re.compile(r'^[a-zA-Z](?:_\{?\w+\}?|\([\w,]*\))?(?:=|\\in(?![a-zA-Z]))\s*')
_SET_NOTATION = re.compile(r'[<>=]|\\(?:le|ge|lt|gt|ne|in|pm|cup|cap|begin|mathbb)')


def _equal(gold: str, prediction: str, budget: list[int]) -> bool:
  """Equality of normalised answers; budget[0] is what the algebra may still spend."""
  if not gold or not prediction:
    return False
  if gold == prediction or len(gold) > 1 and gold.isalpha() and gold.lower() == prediction.lower():  # case of a word
    return True
  values = as_rational(gold), as_rational(prediction)
  if None not in values:
    return _rationals_equal(*values, gold, prediction)
  parts = _elements(gold), _elements(prediction)
  if None not in parts:
    return _elements_equal(*parts, budget)
  if parts != (None, None) and not _SET_NOTATION.search(gold + prediction):
    return False
  values = _NAMED.sub('', gold), _CLAIM.sub('', prediction)
  if (_CLAIM.match(gold) is None) != (_CLAIM.match(prediction) is None) and values != (gold, prediction):
    return _equal(*values, budget)  # 'x=5' answers '5', but not 'y=5'
  return _algebra_equal(gold, prediction, budget)


_PLAIN = re.compile(r'[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?', re.ASCII)
_SLASH = re.compile(r'\(?([+-]?\d+)\)?/\(?([+-]?\d+)\)?', re.ASCII)


def as_rational(text: str) -> Fraction | None:
  r"""Exact value of an integer, a decimal (commas between thousands), a/b, \frac{a}{b} or a mixed number; else None."""
  if len(text) > MAX_ANSWER or not any(map(str.isdigit, text)):
    return None
  if _PLAIN.fullmatch(text):
    return Fraction(text.replace(',', ''))
  match = _SLASH.fullmatch(text)
  if match:
    return Fraction(int(match[1]), int(match[2])) if int(match[2]) else None
  match = re.fullmatch(r'([+-]?)(\d*)\\frac\{([+-]?\d+)\}\{([+-]?\d+)\}', text, re.ASCII)
  if match and int(match[4]):
    value = Fraction(int(match[2] or 0)) + Fraction(int(match[3]), int(match[4]))
    return -value if match[1] == '-' else value
  return None


def _rationals_equal(gold: Fraction, prediction: Fraction, *texts: str) -> bool:
  if gold == prediction:
    return True
  places = [len(text.partition('.')[2]) for text in texts if '.' in text]
  if len(places) != 1 or places[0] < ROUNDED_PLACES:  # two decimals, or none, are compared exactly
    return False
  return round(gold, ROUNDED_PLACES) == round(prediction, ROUNDED_PLACES)


def _elements(text: str) -> tuple[str, list[str], str] | None:
  """Brackets and elements of a list with commas; None where no comma or semicolon is at the top level."""
  opening, closing, inner = '', '', text
  for left, right in (('(', ')'), ('[', ']'), ('(', ']'), ('[', ')'), ('\\{', '\\}'), ('{', '}')):
    if text.startswith(left) and text.endswith(right) and _encloses(text[len(left):len(text) - len(right)]):
      opening, closing, inner = left, right, text[len(left):len(text) - len(right)]
      break
  inner = inner.replace(' and ', ',').replace(' or ', ',') if not opening else inner
  parts, depth, start = [], 0, 0
  for index, character in enumerate(inner):
    depth += (character in '([{') - (character in ')]}')
    if character in ',;' and depth == 0:
      parts.append(inner[start:index].strip())
      start = index + 1
  parts.append(inner[start:].strip())
  return (opening, parts, closing) if len(parts) > 1 and all(parts) else None


def _encloses(inner: str) -> bool:
  depth = 0
  for character in inner:
    depth += (character in '([{') - (character in ')]}')
    if depth < 0:
      return False
  return depth == 0


def _elements_equal(gold: tuple[str, list[str], str], prediction: tuple[str, list[str], str],
    budget: list[int]) -> bool:
  """Same brackets and equal elements, in order unless it is a set or a bare list."""
  (left, golds, right), (other_left, predictions, other_right) = gold, prediction
  if max(len(golds), len(predictions)) > MAX_ELEMENTS:
    return False
  unordered = ('', '\\{', '{')
  if left in unordered and other_left in unordered:
    table = [[_equal(one, other, budget) for other in predictions] for one in golds]
    return all(map(any, table)) and all(map(any, zip(*table)))
  return (left, right, len(golds)) == (other_left, other_right, len(predictions)) and all(
      _equal(one, other, budget) for one, other in zip(golds, predictions))


# Commands whose evaluation is bounded by the length of the text. Sums, integrals, limits, gamma functions are not.
_COMMANDS = frozenset((
    'frac sqrt pi cdot times div pm mp infty cup cap in notin le leq ge geq lt gt ne neq emptyset varnothing mathbb '
    'sin cos tan cot sec csc arcsin arccos arctan log ln exp lg text mathrm begin end pmatrix bmatrix vmatrix matrix '
    'overline ldots dots cdots '
    'alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi varphi psi omega Delta Omega '
    'Theta mid mod binom dbinom tbinom lfloor rfloor lceil rceil langle rangle vec hat sim approx equiv').split())


def _within_bounds(text: str) -> bool:
  """Whether evaluating a text costs at most what its length suggests."""
  depth = deepest = 0
  for character in text:
    depth += (character in '([{') - (character in ')]}')
    deepest = max(deepest, depth)
  if deepest > MAX_NESTING or not text.isascii() or '\\' in text.replace('\\\\', '')[-1:]:
    return False
  if not _COMMANDS.issuperset(re.findall(r'\\([a-zA-Z]+)', text)):
    return False
  if any(len(digits) > MAX_DIGITS for digits in re.findall(r'\d+', text)):
    return False
  rest = re.sub(r'\\(?:begin|end)\{[a-z]+\}|\\[a-zA-Z]+', ' ', text)
  if re.search(r'\d \d|[a-zA-Z]{5}|[a-zA-Z]{2} [a-zA-Z]{2}', rest):
    return False  # prose, or numbers side by side
  if 'binom' in text or '!' in text:
    if re.search(r'\d{4}|[!)}\]]\s*!', text):
      return False
  return _power(text) <= MAX_POWER


def _power(text: str) -> float:
  """Product of all integers in exponents; infinite for a tower or for a factorial in an exponent."""
  text, product = text.replace('**', '^'), 1
  for match in re.finditer(r'\^\s*', text):
    exponent, end = _argument(text, match.end())
    if '^' in exponent or '!' in exponent or text[end:].lstrip().startswith('^'):
      return float('inf')
    for digits in re.findall(r'\d+', exponent):
      product *= max(1, int(digits))
  return product


def _argument(text: str, start: int) -> tuple[str, int]:
  """The bracketed group, number or character at `start`, and where it ends."""
  if text[start:start + 1] in ('{', '('):
    depth = 0
    for end in range(start, len(text)):
      depth += (text[end] in '({') - (text[end] in ')}')
      if depth == 0:
        return text[start:end + 1], end + 1
    return text[start:], len(text)
  match = re.compile(r'[+-]?\d+|\\[a-zA-Z]+|.?', re.ASCII | re.DOTALL).match(text, start)
  return match[0], match.end()


class _OutOfBudget(BaseException):
  """Not an Exception: the algebra catches those and would go on."""


_algebra_lock = threading.Lock()


def _algebra_equal(gold: str, prediction: str, budget: list[int]) -> bool:
  if not (_within_bounds(gold) and _within_bounds(prediction)):
    return False
  try:
    with _algebra_lock:
      return _with_budget(budget, _algebra(), gold, prediction)
  except (Exception, _OutOfBudget):
    return False


def _with_budget(budget: list[int], function: Callable[..., Any], *arguments: Any) -> Any:
  """function(*arguments), ended by _OutOfBudget when it executes more than budget[0] lines of Python in this thread.

  Lines and not calls: SymPy has loops that expand a power without calling anything.
  """

  def count(frame: Any, event: str, argument: Any) -> Any:
    del frame, event, argument
    budget[0] -= 1
    if budget[0] < 0:
      raise _OutOfBudget
    return count

  previous = sys.gettrace()
  sys.settrace(count)
  try:
    return function(*arguments)
  finally:
    sys.settrace(previous)


# Compared once at the start: the grammar's tables and SymPy's lazy imports cost more lines than any answer may.
_WARM_UP = (
    ('(x-2)(x+2)', 'x^2-4'), ('[1,2]\\cup(3,4)', '(3,4)\\cup[1,2]'), ('\\frac{\\sqrt{2}}{2}<y', 'y>\\sin(1)'),
    ('2<g(t)<5', '(2,5)'), ('1+\\cot^2(z)', '\\csc^2(z)'),
    ('\\begin{pmatrix}1\\\\2\\end{pmatrix}', '-\\frac{1}{2}e^{-x}'))


@functools.cache
def _algebra() -> Callable[[str, str], bool]:
  """math-verify on two LaTeX texts, imported when first needed (two seconds)."""
  from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
  from math_verify import verify

  logging.getLogger('math_verify').setLevel(logging.ERROR)  # it warns that its clock is off: the bounds are here
  config = NormalizationConfig(basic_latex=True, units=True, malformed_operators=True, nits=True, boxed='none',
      equations=False)

  def compare(gold: str, prediction: str) -> bool:
    # The LaTeX grammar only: math-verify's other parser evaluates text as Python.
    parsed = [latex2sympy(normalize_latex(text, config=config)) for text in (gold, prediction)]
    return bool(verify(*parsed, timeout_seconds=None))

  for pair in _WARM_UP:
    compare(*pair)
  return compare
