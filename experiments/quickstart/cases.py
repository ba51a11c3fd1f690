"""Two problems read closely: one that distillation brought within reach, one that nobody solves."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from experiments.quickstart.findings import CONTROL, STEPS, Findings
from srm_jax import schema
from srm_jax.evaluate import read_completions
from srm_jax.recipes.context import DataConfig, find_task, load_problems
from srm_jax.types import Problem


class Try(NamedTuple):
  """One model's completion: lines, and the index of the first wrong one (len(lines): it stopped before the answer)."""

  title: str
  lines: list[str]
  right: bool
  wrong: int | None


class Case(NamedTuple):
  """A problem of the test split; matching of n problems are of its kind, and this is the first of them.

  prompt: what the models were asked; '' where there is no such problem.
  """

  what: str
  prompt: str
  solution: str
  tries: list[Try]
  matching: int
  n: int


def find(stages: Mapping, findings: Findings) -> list[Case]:
  """The first problem of each of the two kinds, in the order of the test set; `prompt` is empty where there is none."""
  answers = {name: read_completions(stages[f'test_{name}'].target, 'greedy') for name in STEPS}
  section = json.loads((pathlib.Path(stages['test_teacher'].target) / 'config.json').read_text())['data']
  task, data = find_task(section['task']), schema.parse(DataConfig, section, 'data')
  problems = {problem.id: problem for problem in load_problems(data)}
  shown = tuple(dict.fromkeys(('teacher', CONTROL, findings.best_distilled, 'rl')))
  right = {name: {i: line['reward'] == 1.0 for i, line in lines.items()} for name, lines in answers.items()}
  best = STEPS[findings.best_distilled].title

  def gained(i):
    return right['teacher'][i] and not right[CONTROL][i] and right[findings.best_distilled][i]

  def case(what: str, belongs: Callable[[str], bool], names) -> Case:
    matching = [i for i in answers['teacher'] if belongs(i)]
    if not matching:
      return Case(what, '', '', [], 0, len(problems))
    problem = problems[matching[0]]
    tries = [_try(task, problem, name, answers[name][problem.id]) for name in names]
    solution = task.solution(problem) or problem.answer
    return Case(what, task.prompt(problem), solution, tries, len(matching), len(problems))

  what = f'The teacher solves it, SFT on gold fails, the best distilled student ({best}) solves it'
  return [
      case(what, gained, shown[:3]),
      case('Every model of the line fails', lambda i: not any(grades[i] for grades in right.values()), shown),
  ]


def _try(task, problem: Problem, name: str, answer: Mapping) -> Try:
  text = answer['text']
  return Try(STEPS[name].title, text.splitlines(), answer['reward'] == 1.0, task.first_wrong_step(problem, text))
