"""The claims of a study's config, judged by what its cells found."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.study import cells, verdicts
from srm_jax.schema import ConfigError


def check(config):
  """Raises ConfigError where a claim of a config names an arm that the config does not have."""
  for claim in config.claims:
    for arm in (*claim['above'], *claim['below']):
      if arm not in config.arms:
        raise ConfigError(f'claim {claim["text"]!r} names the arm {arm!r}; the arms are {", ".join(config.arms)}')


def judge(claim: Mapping[str, Any], found: Sequence[cells.Cell]) -> verdicts.Verdict:
  """The verdict on one claim.

  Args:
    claim: text, above, below, what, margin; configs/studies/teaching.py says what they are.
    found: cells of the study, of any tasks and seeds.
  """
  evidence = {task: compare(some, claim['above'], claim['below'], claim['what'])
              for task, some in cells.by_task(found).items()}
  return verdicts.judge(claim['text'], evidence, margin=claim['margin'])


def compare(
    found: Sequence[cells.Cell], above: Sequence[str], below: Sequence[str], what: str = 'accuracy',
) -> verdicts.Evidence:
  """The mean of `what` over the arms `above` minus that over the arms `below`, in cells of one task."""
  if what == 'accuracy':
    return verdicts.of_grades(cells.correct(found, above), cells.correct(found, below))
  return verdicts.of_values(cells.values(found, above, what) - cells.values(found, below, what))
