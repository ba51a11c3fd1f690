"""Running sums by hand, and what is said about texts that follow one way, the other, both or neither."""

import pytest

from srm_jax.tasks import TASKS, running_sums, task
from srm_jax.types import Problem

PROBLEM = Problem('a', '3+8+4+9', '4')


def test_sums_by_hand():
  assert running_sums.forward(PROBLEM) == '154' and running_sums.backward(PROBLEM) == '314'


@pytest.mark.parametrize('text, style, valid, mixed', [
    ('154\n#### 4', 'forward', True, False),
    ('314\n#### 4', 'backward', True, False),
    ('154\n#### 5', 'forward', False, False),
    ('114\n#### 4', 'forward', False, True),
    ('354\n#### 4', 'backward', False, True),
    ('124\n#### 4', 'forward', False, False),
    ('15\n#### 4', 'forward', False, False),
    ('754\n#### 4', None, False, False),
    ('', None, False, False),
])
def test_what_a_text_follows(text, style, valid, mixed):
  assert running_sums.style_of(PROBLEM, text) == style
  assert running_sums.is_valid(PROBLEM, text) == valid
  assert running_sums.is_mixed(PROBLEM, text) == mixed


def test_where_both_ways_begin_alike_there_is_no_style():
  assert running_sums.style_of(Problem('a', '3+8+8+3', '2'), '192\n#### 2') is None


@pytest.mark.parametrize('name, terms', [('running_sums', 6), ('running_sums_either_way', 4)])
def test_problems_are_distinct_and_solved(name, terms):
  problems = TASKS[name].problems('train', count=300, seed=3)
  assert len({problem.question for problem in problems}) == 300
  for problem in problems:
    text = task.worked_solution(problem)
    assert running_sums.is_valid(problem, text) and len(running_sums.digits_of(problem)) == terms
    assert problem.answer == str(sum(map(int, problem.question.split('+'))) % 10) == problem.rationale[-1]
  again = TASKS[name].problems('train', count=100, seed=3)
  assert again == problems[:100] != TASKS[name].problems('train', count=100, seed=4)
  test = TASKS[name].problems('test')
  assert len(test) == (1000 if terms == 6 else 800) and not {one.id for one in test} & {one.id for one in problems}


def test_more_problems_than_there_are_end_in_an_error():
  assert len(TASKS['running_sums_either_way'].problems('train', count=6400)) == 6400
  with pytest.raises(ValueError, match='6401 train problems of 4 digits; there are 6400 to be had'):
    TASKS['running_sums_either_way'].problems('train', count=6401)


def test_a_teacher_of_either_way_is_a_fair_mixture():
  problems = TASKS['running_sums_either_way'].problems('train', count=600, seed=1)
  backward = sum(problem.rationale == running_sums.backward(problem) for problem in problems)
  assert 0.42 < backward / 600 < 0.58
  assert all(p.rationale == running_sums.forward(p) for p in TASKS['running_sums'].problems('dev', count=50))


def test_every_second_chain_misreads_a_term_and_goes_on_from_there():
  slips = TASKS['running_sums_with_slips']
  problems, places, wrong = slips.problems('train', count=3000, seed=1), set(), 0
  for problem in problems:
    text = slips.solution(problem)
    written, true = text.partition('\n')[0], running_sums.forward(problem)
    offsets = {(int(a) - int(b)) % 10 for a, b in zip(written, true, strict=True)}
    assert len(offsets - {0}) <= 1 and text == f'{written}\n#### {written[-1]}'
    assert (slips.grade(problem, text) == 1.0) == (written == true)
    if written != true:
      wrong += 1
      places.add(next(i for i, (a, b) in enumerate(zip(written, true)) if a != b))
  assert abs(wrong / 3000 - 0.5) < 0.03 and places == set(range(5))
