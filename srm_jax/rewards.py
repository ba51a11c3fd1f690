"""Grades of completions: the reward of RL, the filter of annotation and the score of evaluation are one number."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from srm_jax.tasks.task import Task
from srm_jax.types import Completion, Problem


class Graded(NamedTuple):
  """One completion with its grade. reward is None where it cannot be scored."""

  problem: Problem
  completion: Completion
  reward: float | None


def grade(task: Task, problem: Problem, completions: Sequence[Completion]) -> list[Graded]:
  """Grades the completions of one problem; a cut completion is graded as it stands."""
  return [Graded(problem, completion, task.grade(problem, completion.text)) for completion in completions]


def reward_arrays(groups: Sequence[Sequence[Graded]]) -> tuple[np.ndarray, np.ndarray]:
  """(rewards, valid), both float32 [P, G]; an unscorable completion has reward 0 and valid 0."""
  rewards = np.array([[0.0 if one.reward is None else one.reward for one in group] for group in groups], np.float32)
  valid = np.array([[one.reward is not None for one in group] for group in groups], np.float32)
  return rewards, valid
