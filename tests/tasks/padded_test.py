"""Fillers behind a chain: as many as they may be, and nothing that a grade would see."""

import collections

from srm_jax.tasks import TASKS, padded, running_sums


def test_a_chain_and_fillers():
  problems = TASKS['running_sums_padded'].problems('train', count=1700, seed=2)
  lengths = collections.Counter()
  for problem in problems:
    chain, fillers = problem.rationale[:5], problem.rationale[5:]
    assert chain == running_sums.forward(problem) and set(fillers) <= {padded.FILLER}
    lengths[len(fillers)] += 1
  assert set(lengths) == set(range(padded.MOST + 1)) and 60 < min(lengths.values()) < max(lengths.values()) < 145


def test_problems_and_grades_are_those_of_running_sums():
  task, plain = TASKS['running_sums_padded'], TASKS['running_sums']
  ours, theirs = (one.problems('test', count=20, seed=5) for one in (task, plain))
  assert [problem.question for problem in ours] == [problem.question for problem in theirs]
  for problem in ours:
    text = task.solution(problem)
    assert task.grade(problem, text) == 1.0 == plain.grade(problem, text)
    assert task.grade(problem, text[:-1] + str((int(text[-1]) + 1) % 10)) == 0.0
