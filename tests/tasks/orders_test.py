"""Sums in any order by hand, and the first line of a text that goes wrong."""

import itertools

import pytest

from srm_jax.tasks import TASKS, orders, task
from srm_jax.types import Problem

PROBLEM = Problem('a', '3+8+4+4', '9')


@pytest.mark.parametrize('text, index', [
    ('3+8=1\n1+4=5\n5+4=9\n#### 9', None),
    ('4+4=8\n8+8=6\n6+3=9\n#### 9', None),
    ('4+8=2\n2+4=6\n6+3=9\n#### 9\n', None),
    ('3+8=2\n2+4=6\n6+4=0\n#### 9', 0),  # a sum
    ('3+3=6\n6+8=4\n4+4=8\n#### 9', 0),  # one term twice
    ('3+8=1\n2+4=6\n6+4=0\n#### 9', 1),  # does not go on from the line before
    ('3+8=1\n1+8=9\n9+4=3\n#### 9', 1),  # a term that is gone
    ('3+8=1\n1+4=5\n#### 9', 2),  # a term is left
    ('3+8=1\n1+4=5\n5+4=9\n#### 8', 3),
    ('3+8=1\n1+4=5\n5+4=9\n9+0=9\n#### 9', 3),
    ('3+8=1\n1+4=5\n5+4=9\n#### 9\n#### 9', 3),
    ('3+8=1\n1+4=5\n5+4=9', 3),
    ('3+8=1\n1+4=5', 2),
    ('#### 9', 0), ('5+8=3', 0), ('', 0),
])
def test_first_wrong_step(text, index):
  assert orders.first_wrong_step(PROBLEM, text) == index


def test_every_order_is_right_and_a_path_of_its_own():
  problem, paths = Problem('a', '1+2+3+9', '5'), set()
  for first, *rest in itertools.permutations([1, 2, 3, 9]):
    totals = list(itertools.accumulate([first, *rest], lambda a, b: (a + b) % 10))
    lines = [f'{total}+{term}={(total + term) % 10}' for total, term in zip(totals, rest, strict=False)]
    text = '\n'.join([*lines, '#### 5'])
    assert orders.first_wrong_step(problem, text) is None
    paths.add(TASKS['sums_in_any_order'].path(text))
  assert len(paths) == 24


@pytest.mark.parametrize('name, terms', [('sums_in_any_order', 5), ('short_sums_in_any_order', 4)])
def test_worked_solutions_follow_all_kinds_of_orders(name, terms):
  this = TASKS[name]
  problems = this.problems('train', count=400, seed=2)
  for problem in problems:
    assert this.first_wrong_step(problem, task.worked_solution(problem)) is None
    assert problem.question.count('+') + 1 == terms == problem.metadata['steps'] + 1
  starts = [problem.question.find(problem.rationale[0]) // 2 for problem in problems]
  assert all(starts.count(place) > 40 for place in range(terms))
  assert this.problems('train', count=400, seed=2) == problems
