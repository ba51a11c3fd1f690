"""Every task of the registry keeps the contract of a Task."""

import dataclasses
import os
import time

import pytest

from srm_jax.tasks import TASKS, task
from srm_jax.types import Problem

COUNT = 60
# What these give to be learnt is wrong on every second problem, by design; tests of their own say how.
FALLIBLE = ('running_sums_with_slips', 'running_sums_guessed')
SEVERAL_A_LINE = ('running_sums_2_to_8',)  # tasks whose steps, counted in the metadata, are characters of one line
MOST_CHANCE = {'running_sums_guessed': 0.7}  # an answer of one bit; of all others 0.2


def _problems(name, split):
  if name == 'gsm8k' and not os.environ.get('SRM_DATA_DIR'):
    pytest.skip('SRM_DATA_DIR is not set')
  return TASKS[name].problems(split, count=COUNT)


@pytest.mark.parametrize('name', [name for name in TASKS if name not in FALLIBLE])
def test_gold_solutions_are_right_and_other_answers_are_wrong(name):
  this = TASKS[name]
  assert this.name == name and {'train', 'dev', 'test'} <= set(this.splits)
  for split in this.splits:
    for problem in _problems(name, split):
      solution = this.solution(problem)
      assert solution.endswith(f'\n{this.answer_cue}{problem.answer}')
      assert this.prompt(problem).endswith('\n') and not this.prompt(problem).endswith('\n\n')
      assert this.grade(problem, solution) == 1.0
      assert this.grade(problem, this.answer_cue + problem.answer) == 1.0
      wrong = solution[:-1] + str((int(solution[-1]) + 1) % 10) if solution[-1].isdigit() else f'{solution} #A'
      assert this.grade(problem, wrong) == 0.0
      assert this.grade(problem, problem.rationale) == 0.0 and this.grade(problem, '') == 0.0
      assert this.first_wrong_step(problem, solution) is None
      lines = len(solution.splitlines()) - 1
      assert problem.metadata['family'] and (name in SEVERAL_A_LINE or problem.metadata['steps'] == lines)


@pytest.mark.parametrize('name', TASKS)
def test_splits_share_nothing_and_ids_are_unique(name):
  seen = {}
  for split in TASKS[name].splits:
    problems = _problems(name, split)
    assert len(problems) == COUNT
    for problem in problems:
      assert seen.setdefault(problem.id, split) == split
  assert len(seen) >= COUNT * (len(TASKS[name].splits) - 1)


@pytest.mark.parametrize('name', TASKS)
def test_unknown_split_names_those_that_exist(name):
  with pytest.raises(ValueError, match=f"{name}.*'validation'.*train, dev, test"):
    TASKS[name].problems('validation')


@pytest.mark.parametrize('name', TASKS)
def test_chance_is_the_best_constant_answer(name, monkeypatch):
  monkeypatch.setattr(task, 'CHANCE_COUNT', COUNT)
  answers = [problem.answer for problem in _problems(name, 'test')]
  fresh = dataclasses.replace(TASKS[name])  # chance is cached
  assert fresh.chance == max(answers.count(answer) for answer in set(answers)) / COUNT < MOST_CHANCE.get(name, 0.2)


def test_constant_accuracy_by_hand():
  problems = [Problem(str(i), '', answer) for i, answer in enumerate(['7', '8', '7', '9'])]
  assert task.constant_accuracy(problems) == 0.5
  with pytest.raises(ValueError, match='no problems'):
    task.constant_accuracy([])


def test_solution_without_a_rationale():
  assert task.worked_solution(Problem('0', 'q', '7')) is None
  assert task.worked_solution(Problem('0', 'q', '7', rationale='')) == '#### 7'


@pytest.mark.parametrize('text, path', [
    ('He pays 3 * $4 = $12. Then 12+1,000=1,012.', '3*4=12\n12+1000=1012'),
    ('3*4=12\n12 + 1000 = 1012\n#### 1012', '3*4=12\n12+1000=1012'),
    ('12+1000=1012\n3*4=12', '12+1000=1012\n3*4=12'),
    ('4+3=7, so 7-3=4', '4+3=7\n7-3=4'),
    ('x = 4', 'x = 4'), ('no sum,\n  only words', 'no sum, only words'),
])
def test_equations_are_the_path_of_a_text(text, path):
  assert task.equations(text) == path


def test_a_long_text_without_an_equation_takes_no_time():
  text = '1' * 20_000
  start = time.perf_counter()
  assert task.equations(text) == text
  assert time.perf_counter() - start < 5
