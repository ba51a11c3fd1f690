"""Checked chains by hand and by arithmetic."""

import re

import pytest

from srm_jax.tasks import TASKS, chains, task
from srm_jax.types import Problem


def sum_of(expression: str, answer: str, identifier: str = 'a') -> Problem:
  return Problem(identifier, expression, answer, '', {'expression': expression, 'family': 'chain_sum'})


def _numbered(expression):
  return [sum_of(expression, '-2', str(number)) for number in range(300)]


@pytest.mark.parametrize('expression, terms', [('4 + 3 - 5', [4, 3, -5]), ('-4 - 3', [-4, -3]), ('7', [7])])
def test_terms_by_hand(expression, terms):
  assert chains.terms_of(sum_of(expression, '')) == terms


def test_only_sums_have_these_chains():
  for expression in ('2 * 3', '', '( 2 + 3 )'):
    with pytest.raises(ValueError, match='is no sum of numbers'):
      chains.terms_of(sum_of(expression, '6'))


def test_a_step_is_undone_and_said_again_and_a_wrong_one_does_not_undo_and_is_corrected():
  seen = {tuple(chains.checked_steps(problem)) for problem in _numbered('7 - 9')}
  right = ('so -2+9=7', 'ok 7-9=-2')
  assert seen == {
      ('7-9=-2', *right), ('7-9=-1', 'so -1+9=8', 'no 7-9=-2', *right), ('7-9=-3', 'so -3+9=6', 'no 7-9=-2', *right),
  }


def test_one_step_in_ten_goes_wrong():
  wrong = sum(len(chains.checked_steps(problem)) == 5 for problem in _numbered('7 - 9'))
  assert 15 <= wrong <= 45  # of 300


def test_every_line_holds_but_for_what_is_corrected():
  for problem in TASKS['sums_checked'].problems('train', count=200, seed=3):
    lines = problem.rationale.splitlines()
    for number, line in enumerate(lines):
      left, right = re.fullmatch(r'(?:so |ok |no )?([-+\d]+)=(-?\d+)', line).groups()
      assert eval(left) == int(right) or lines[number + 2].startswith('no '), lines
    assert lines[-1].endswith(f'={problem.answer}')


def test_problems_splits_and_grades_are_those_of_the_sums():
  for split in ('train', 'dev', 'test'):
    plain, checked = (TASKS[name].problems(split, count=50, seed=1) for name in ('sums', 'sums_checked'))
    assert [problem.id for problem in plain] == [problem.id for problem in checked]
    assert all(TASKS['sums_checked'].grade(problem, task.worked_solution(problem)) == 1.0 for problem in checked)
  lengths = [sum(len(problem.rationale) for problem in problems) for problems in (plain, checked)]
  assert 3 <= lengths[1] / lengths[0] <= 5
