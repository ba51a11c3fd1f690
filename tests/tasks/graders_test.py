r"""Equality of answers: by hand, on the test cases of other graders, and against adversaries.

Agreement with other graders, over the cases whose two sides are bare answers (no sentence around them) and whose
convention is that of `math_equal`: MATH is_equiv 6/6, simple-evals 1/1, Qwen2.5-Math 55/55, MATH boxed against
normalised 478/481 (the three spell \sin x as \sinx), Math-Verify's own tests 57/66 (the rest are inequalities against
sets, equations that must be solved, and a looser precision by option). No wrong answer is accepted in any of them.
"""

import gzip
import json
import os
import random
import re
import sys
import threading
import time

import pytest

from srm_jax.tasks import graders

PROMPT = 2.0  # seconds of this thread: half a second on an idle core, and a runaway takes minutes

needs_data = pytest.mark.skipif(not os.environ.get('SRM_DATA_DIR'), reason='SRM_DATA_DIR is not set')


@pytest.mark.parametrize('gold, prediction', [
    ('72', '72'), ('72', ' 72. '), ('1200', '1,200'), ('1200', '$1{,}200$'), ('0.5', '.5'), ('0.5', '1/2'),
    ('\\frac12', '0.50'),
    ('-\\frac{3}{4}', '\\frac{-3}{4}'), ('3/2', '1\\frac{1}{2}'), ('3/2', '1 1/2'), ('1/3', '0.333333'),
    ('3245/5', '649'),
    ('84\\%', '84'), ('45^\\circ', '45'), ('5\\text{ cm}', '5'), ('10', '10 inches'), ('\\$3.50', '3.5'),
    (72, '72'), ('2.5', 2.5),
    ('x = 5', '5'), ('7', 'f(2) = 7'), ('1,2', 'x=1, x=2'), ('x=1 \\text{ or } x=2', '1;2'),
    ('[-2,7]', 'x \\in [-2,7]'), ('5', 'x=5'), ('x+1', '1 + x'), ('(x-2)(x+2)', 'x^2-4'), ('\\sqrt{8}', '2\\sqrt2'),
    ('2\\pi', '\\pi \\cdot 2'),
    ('(1,2)', '\\left( 1, 2 \\right)'), ('1,2', '2, 1'), ('\\{1,2\\}', '\\{2,1,1\\}'), ('[0,1)', '[0, 1)'),
    ('\\text{Evelyn}', 'evelyn'),
    ('\\begin{pmatrix}1\\\\ 2\\end{pmatrix}', '\\begin{pmatrix} 1 \\\\ \\frac42 \\end{pmatrix}'),
    ('\\boxed{7}', '7'), ('C', '\\text{C}'),
    ('x < 3', '3 > x'), ('10^{6}', '1000000'), ('\\dfrac{\\sqrt{3}}{3}', '\\frac{1}{\\sqrt{3}}')])
def test_equal(gold, prediction):
  assert graders.math_equal(gold, prediction) is True


@pytest.mark.parametrize('gold, prediction', [
    ('72', '73'), ('72', '7 2'), ('72', ''), ('0.5', '5'), ('50\\%', '0.5'), ('1/3', '0.33333'),
    ('1/3', '0.333334'), ('0.1', '0.10000001'),
    ('12', '1,2'), ('x=5', 'y=5'), ('5', 'x=6'), ('(1,2)', '(2,1)'), ('(1,2)', '[1,2]'), ('1,2', '1,2,3'),
    ('[0,1)', '[0,1]'),
    ('x', 'y'), ('x^2', '2x'), ('\\sqrt{2}', '1.41'), ('Evelyn', 'Briana'), ('A', 'B'), ('a', 'b'),
    ('1/0', '1/0.0'), ('2', '-2'), ('3', '3!'),
    ('\\pi', '3.1416'), ('72', None), (None, '72'), (None, None), ('1', True), ('nan', float('nan')),
    ('72', ['72']), ('', '')])
def test_not_equal(gold, prediction):
  assert graders.math_equal(gold, prediction) is False


ADVERSARIES = {
    'power tower': '10**10**10', 'power tower in LaTeX': '10^{10^{10}}', 'chained powers': '9^9^9^9',
    'nested powers': '((9^{99})^{99})^{99}',
    'huge exponent': '2^{999999999}', 'exponent by product': '2^{999*999*999}', 'exponent by factorial': '2^{20!}',
    'factorials': '((9!)!)!',
    'big factorial': '99999999!', 'binomial': '\\binom{999999999}{499999999}', 'sum': '\\sum_{n=1}^{999999} n^n',
    'integral': '\\int e^{x^2} \\sin x dx',
    'limit': '\\lim_{x\\to 0} x^x', 'parentheses': '(' * 10_000 + '1' + ')' * 10_000,
    'short parentheses': '(' * 120 + '1' + ')' * 120,
    'fractions': '\\frac{1}{' * 20 + '2' + '}' * 20, 'roots': '\\sqrt{' * 30 + '2' + '}' * 30,
    'open braces': '\\frac{' * 40, 'backslashes': '\\' * 250,
    'a megabyte': '1' * 1_000_000, 'a megabyte of commas': ',' * 1_000_000,
    'a megabyte of boxes': '\\boxed{' * 150_000, 'digits': '7' * 250,
    'commas': '1,' * 120, 'expression': '+'.join(f'x^{{{i}}}' for i in range(40)),
    'product': '(a+b)(c+d)(e+f)(g+h)(i+j)(k+l)(m+n)(o+p)(q+r)(s+t)',
    'big power of a sum': '(a+b+c+d+f+g+h)^{999}', 'symbols': 'abcdefghijklmnopqrstuvwxyz', 'unicode digits': '١٢٣',
    'wide digits': '７２', 'superscripts': '7²',
    'nan': 'NaN', 'infinity': '1e999999999', 'minus infinity': '-inf', 'none': 'None', 'null byte': '7\x002',
    'surrogate': '\ud800', 'newlines': '7\n' * 100,
    'equations': 'x=y=z=' * 30, 'matrix': '\\begin{pmatrix}' + '&'.join('1' * 60) + '\\end{pmatrix}',
    'not closed': '\\begin{pmatrix}1', 'dollar signs': '$' * 250,
    'spaces': ' ' * 200 + 'x', 'factorisation': '9' * 23 + '7/' + '9' * 24,
    'trigonometry': '\\sin(\\cos(\\tan(\\sin(\\cos(\\tan(x))))))^{99}',
    'mod': '7^{1000} \\mod 13', 'unbalanced': ')(' * 100, 'percent': '%' * 250, 'division by zero': '\\frac{1}{0}',
    'equation of powers': 'x^{99}+y^{98}=z^{97}'}


@pytest.mark.parametrize('name', ADVERSARIES)
def test_adversaries_get_a_bool_promptly(name):
  graders._algebra()
  for gold, prediction in (('\\frac{x+1}{2}', ADVERSARIES[name]), (ADVERSARIES[name], '72')):
    start = time.thread_time()
    assert graders.math_equal(gold, prediction) is False
    assert time.thread_time() - start < PROMPT
  for extract in (graders.extract_boxed, graders.extract_hash_answer, graders.last_number):
    start = time.thread_time()
    extract(ADVERSARIES[name])
    assert time.thread_time() - start < PROMPT


def test_text_is_never_executed(tmp_path):
  marker = tmp_path / 'm'
  for text in (f"open('{marker}','w')", f"__import__('os').system('touch {marker}')",
      f"\\text{{open('{marker}','w')}}", "exit()", 'f(1)'):
    assert graders.math_equal('x+1', text) is False
  assert not marker.exists()


def test_random_formulas_neither_raise_nor_run_away():
  rng = random.Random(0)
  parts = ['1', '23', 'x', 'y', '+', '-', '*', '/', '^', '{', '}', '(', ')', '\\frac', '\\sqrt', '\\pi', ',', '=',
      '<', '!', '\\cup', '\\sin', '.', ' ']
  for _ in range(60):
    gold, prediction = (''.join(rng.choices(parts, k=rng.randint(1, 14))) for _ in range(2))
    start = time.thread_time()
    assert graders.math_equal(gold, prediction) in (True, False)
    assert time.thread_time() - start < PROMPT, (gold, prediction)


def test_algebra_works_outside_the_main_thread_and_restores_the_tracer():
  results = []
  thread = threading.Thread(target=lambda: results.append(graders.math_equal('(x-1)(x+1)', 'x^2-1')))
  thread.start()
  thread.join()
  assert results == [True]
  trace = lambda *arguments: None
  previous = sys.gettrace()
  sys.settrace(trace)
  try:
    assert graders.math_equal('(z-1)(z+1)', 'z^2-1') is True
    assert sys.gettrace() is trace
  finally:
    sys.settrace(previous)


def test_work_beyond_the_budget_is_stopped(monkeypatch):
  assert graders.math_equal('(y-1)(y+1)', 'y^2-1') is True
  monkeypatch.setattr(graders, 'MAX_LINES', 500)
  assert graders.math_equal('(y-1)(y+1)', 'y^2-1') is False


@pytest.mark.parametrize('text, answer', [
    ('a #### 7', '7'), ('####  7 \n8', '7'), ('#### 7\n#### 8', '7'), ('####\n7', None), ('7', None),
    ('### 7', None)])
def test_extract_hash_answer(text, answer):
  assert graders.extract_hash_answer(text) == answer


@pytest.mark.parametrize('text, answer', [
    ('\\boxed{7}', '7'), ('\\boxed{1} then \\boxed{\\frac{1}{2}}.', '\\frac{1}{2}'), ('\\boxed {7}', '7'),
    ('\\fbox{7}', '7'),
    ('\\boxed{7} \\boxed{8', '7'), ('\\boxed{\\text{if }\\boxed{3}}', '3'), ('\\boxed{}', None), ('boxed{7}', None),
    ('', None)])
def test_extract_boxed(text, answer):
  assert graders.extract_boxed(text) == answer


@pytest.mark.parametrize('text, answer', [
    ('He has 3 and 1,200.', '1200'), ('$5.50.', '5.50'), ('-3', '-3'), ('-$3', '-3'), ('10-3', '-3'), ('.5', '.5'),
    ('none', None), ('1, 2, 3', '3')])
def test_last_number(text, answer):
  assert graders.last_number(text) == answer


def _cases(name):
  path = os.path.join(os.environ['SRM_DATA_DIR'], 'grader_cases', name)
  with (gzip.open(path, 'rt') if name.endswith('.gz') else open(path)) as file:
    return [json.loads(line) for line in file]


def _bare(text):
  """Whether a text is an answer, not a sentence that holds one: beside LaTeX it has no word and no second box."""
  rest = re.sub(r'\\(?:text|mbox)\{[^{}]*\}|\\(?:begin|end)\{\w+\}|\\[a-zA-Z]+', ' ', text)
  short = len(text) <= graders.MAX_ANSWER and '\n' not in text and text.count('boxed') < 2
  return short and not re.search(r'[a-zA-Z]{3}', rest)


# Cases whose convention is another one: order of a bare list, no simplification, commas as decimal points.
OTHER_CONVENTION = {('4, .1, 2', '0.1, 4, 2'), ('3245/5', '649'), ('1000.99', '1000,99'), ('1,22', '1.22'),
    ('$1-1/e$', '$1+1/e$')}


@needs_data
@pytest.mark.parametrize('name, sample, rate', [
    ('hendrycks_math_is_equiv_tests', 6, 1.0), ('simple_evals_equality_examples', 1, 1.0),
    ('qwen_math_scored', 55, 1.0),
    ('math_boxed_vs_normalised', 40, 0.95), ('math_verify_tests', 66, 0.8)])
def test_agreement_with_other_graders(name, sample, rate):
  cases = [case for case in _cases(f'{name}.jsonl') if _bare(case['gold']) and _bare(case['prediction'])]
  cases = [case for case in cases if (case['gold'], case['prediction']) not in OTHER_CONVENTION]
  assert len(cases) >= sample
  cases = random.Random(0).sample(cases, sample)
  wrong = [case for case in cases if graders.math_equal(case['gold'], case['prediction']) != case['equivalent']]
  assert 1 - len(wrong) / len(cases) >= rate, [(case['gold'], case['prediction']) for case in wrong]
  assert all(case['equivalent'] for case in wrong), 'a wrong answer was accepted'


@needs_data
def test_gsm8k_verdicts_of_the_authors_are_reproduced_exactly():
  cases = _cases('gsm8k_model_solutions.jsonl.gz')
  assert len(cases) > 2000 and len({case['equivalent'] for case in cases}) == 2
  for case in cases:
    assert graders.number_equal(case['gold'], case['prediction'].rpartition('A:')[2]) == case['equivalent']
