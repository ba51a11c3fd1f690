"""Running sums of several lengths in one task, which has an order from easy to hard: `steps` in a problem's metadata.

  2 digits: 3+8     3 digits: 3+8+4     ...     problem i is of length i mod (number of lengths)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from srm_jax.tasks import running_sums, task
from srm_jax.types import Problem


def levels_task(name: str, chain: Callable[[Problem], str], *, terms: Sequence[int]) -> task.Task:
  """A task of running sums with as many problems of each number of terms, in turn.

  A length of which a split has fewer problems than its share (there are 100 sums of two digits) gives them again.
  """

  def problems(split: str, *, count: int | None = None, seed: int = 0) -> list[Problem]:
    task.check_split(name, split, running_sums.SPLITS)
    count = running_sums.DEFAULT_COUNT if count is None else count
    share = -(-count // len(terms))
    columns = [_level(chain, split, share=share, seed=seed, terms=number) for number in terms]
    return [problem for row in zip(*columns, strict=True) for problem in row][:count]

  return dataclasses.replace(running_sums.running_sums_task(name, chain), problems=problems)


def _level(chain, split: str, *, share: int, seed: int, terms: int) -> list[Problem]:
  most = running_sums.most_of(split, terms)
  own = running_sums.problems_of(chain, split, count=min(share, most), seed=seed, terms=terms)
  marked = [dataclasses.replace(one, metadata={**one.metadata, 'steps': terms - 1}) for one in own]
  return [marked[place % len(marked)] for place in range(share)]
