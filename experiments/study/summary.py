"""What the finished cells of a study say, as one small dictionary: means over seeds with t intervals, and verdicts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.study import cells, claims, verdicts

MEASURED = ('entropy', 'divergence', 'flops', 'seconds')


def summarize(config, found: Sequence[cells.Cell]) -> dict[str, Any]:
  """Of one study.

  Args:
    config: of any of its cells: arms, of which the first is what the others are compared with, and claims.
    found: its finished cells.

  Returns:
    {'arms', 'tasks': {task: {'seeds', 'seconds', 'models': {name: ...}}}, 'verdicts': [...]}, JSON types only; see
    `model` for what is said of a model. 'seconds' are the mean of a cell.
  """
  tasks = {
      task: {
          'seeds': [cell['seed'] for cell in some], 'seconds': float(np.mean([cell['seconds'] for cell in some])),
          'models': {name: model(some, name, config.arms[0]) for name in ('teacher', 'base', *config.arms)},
      }
      for task, some in cells.by_task(found).items()
  }
  judged = [record(claims.judge(claim, found)) for claim in config.claims]
  return {'arms': list(config.arms), 'tasks': tasks, 'verdicts': judged}


def model(found: Sequence[cells.Cell], name: str, reference: str) -> dict[str, Any]:
  """Of one model over the seeds of one task.

  {'accuracy', 'retention', 'gain'} and, of what was measured, {'entropy', 'divergence', 'flops', 'seconds'}: each
  {'mean', 'low', 'high', 'by_seed'}, a 95 % t interval over seeds; 'cka': {layer: the same}; 'curve': {step: mean
  accuracy}. 'gain' is over the reference, with the p of the pooled paired test over problems.
  """
  accuracy, teacher = (cells.values(found, [one], 'accuracy') for one in (name, 'teacher'))
  retained = accuracy / np.where(teacher > 0, teacher, np.nan)  # of a teacher that knows nothing there is no share
  said = {'accuracy': spread(accuracy), 'retention': spread(retained)}
  if name not in ('teacher', 'base', reference):
    said['gain'] = as_json(claims.compare(found, [name], [reference]))
  if name == 'teacher':
    return said
  models = [cell['models'][name] for cell in found]
  said |= {key: spread(cells.values(found, [name], key)) for key in MEASURED}
  said['cka'] = [spread(layer) for layer in zip(*(one['cka'] for one in models))]
  said['curve'] = {step: float(np.mean([one['curve'][step] for one in models])) for step in models[0]['curve']}
  return said


def spread(values: Sequence[float]) -> dict[str, Any]:
  """{'mean', 'low', 'high', 'by_seed'}; low and high are None with one seed, and whatever is no number."""
  return {key: value for key, value in as_json(verdicts.of_values(values)).items() if key not in ('p', 'n')}


def as_json(evidence: verdicts.Evidence) -> dict[str, Any]:
  """An Evidence, rounded to six digits; None for what one seed cannot say."""
  one = lambda value: float(f'{value:.6g}') if np.isfinite(value) else None
  by_seed = [one(value) for value in evidence.by_seed]
  bounds = {key: one(getattr(evidence, key)) for key in ('mean', 'low', 'high')}
  return {**bounds, 'by_seed': by_seed, 'p': evidence.p, 'n': evidence.n}


def record(verdict: verdicts.Verdict) -> dict[str, Any]:
  """A Verdict in JSON types."""
  evidence: Mapping[str, Any] = {task: as_json(one) for task, one in verdict.evidence.items()}
  return {'claim': verdict.claim, 'verdict': verdict.verdict, 'evidence': evidence, 'needed': dict(verdict.needed)}
