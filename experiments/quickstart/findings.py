"""What a finished line says in numbers: a row per step and per strategy, with intervals, paired tests and costs."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from srm_jax import checkpoints, metrics, statistics
from srm_jax.models.config import num_params
from srm_jax.schema import ConfigError

BEST = '{best}'  # stands for the arm that the dev split chose


class Step(NamedTuple):
  """One step of the line.

  trained: the trainings that lead to it, start first. helped: what of the teacher it needs besides (its training, its
  annotation). against: the row that it is compared with, '' for none.
  """

  title: str
  trained: tuple[str, ...]
  helped: tuple[str, ...] = ()
  against: str = ''


STEPS: dict[str, Step] = {
    'teacher': Step('Teacher', ('teacher',)),
    'base': Step('Student, start', ('base',)),
    'sft_small': Step('SFT, small gold set', ('base', 'sft_small')),
    'sft_gold': Step('SFT, gold (control)', ('base', 'sft_gold'), (), 'sft_small'),
    'sft_annotations': Step(
        'SFT on annotations', ('base', 'sft_annotations'), ('teacher', 'annotate'), 'sft_gold'),
    'logits': Step('Logit distillation', ('base', 'logits'), ('teacher', 'annotate'), 'sft_gold'),
    'hidden': Step('+ hidden states', ('base', 'hidden'), ('teacher', 'annotate'), 'logits'),
    'on_policy': Step('On-policy distillation', ('base', 'on_policy'), ('teacher',), 'sft_gold'),
    'rl': Step('RL (GRPO)', ('base', BEST, 'rl'), (BEST,), BEST),
}
DISTILLED = ('sft_annotations', 'logits', 'hidden', 'on_policy')
CONTROL = 'sft_gold'

# {row: (title, row that it is compared with)}; samples and temperature are those of the config
STRATEGIES: dict[str, tuple[str, str]] = {
    'direct': ('Direct answer', ''),
    'greedy': ('Greedy chain of thought', ''),
    'sample': ('One sample, T={temperature:g}', ''),
    'majority': ('Majority of {samples}', 'sample'),
    'best_of_n': ('Best of {samples} by the teacher', 'majority'),
}


class Score(NamedTuple):
  """Accuracy with its 95 % Wilson interval over n problems."""

  accuracy: float
  low: float
  high: float
  n: int


class Compared(NamedTuple):
  """Against which row, and the paired test on the same problems."""

  against: str
  test: statistics.PairedTest


class Row(NamedTuple):
  """One step. flops: of the trainings that lead to it; flops_with_teacher adds the teacher's training and annotation.

  tokens, answer_flops: of one greedy answer. by_steps: {reasoning steps: (right, n)}.
  """

  name: str
  title: str
  score: Score
  hard: Score | None
  compared: Compared | None
  retention: float
  tokens: float
  params: int
  flops: float
  flops_with_teacher: float
  answer_flops: float
  by_steps: dict[int, tuple[int, int]]


class StrategyRow(NamedTuple):
  """One way to spend computation on an answer: sampled and scored tokens and FLOPs an answer."""

  name: str
  title: str
  score: Score
  compared: Compared | None
  sampled: float
  scored: float
  flops: float


class Findings(NamedTuple):
  """Everything that table and page show of one run. best: the arm that RL started from; dev: its split's accuracies."""

  rows: dict[str, Row]
  strategies: dict[str, StrategyRow]
  best: str
  best_distilled: str
  dev: dict[str, float]
  annotation: dict[str, Any]


def collect(stages: Mapping[str, Any]) -> Findings:
  """Findings of the finished stages of configs/quickstart.py.

  Args:
    stages: {name: stages.Stage}.

  Raises:
    ConfigError: a stage is missing.
  """
  needed = ('best', 'annotate', 'strategies', *(f'test_{row}' for row in STEPS))
  missing = [name for name in needed if name not in stages]
  if missing:
    raise ConfigError(f'the line is not finished, {missing} missing; the same command continues it')
  dev, best = stages['best'].outcome['scores'], stages['best'].outcome['chosen']
  tests = {name: results(stages[f'test_{name}'])['greedy'] for name in STEPS}
  rows = {name: _row(name, best, tests, stages) for name in STEPS}
  distilled = max(DISTILLED, key=lambda name: dev.get(name, -1.0))
  return Findings(rows, _strategies(stages['strategies']), best, distilled, dev, stages['annotate'].outcome)


def learns_from_wrong(stages: Mapping[str, Any]) -> bool:
  """Whether the arms learn from annotations that the verifier refused, too."""
  config = json.loads((pathlib.Path(stages['sft_annotations'].workdir) / 'config.json').read_text())
  return config['recipe']['data']['target'].startswith('unfiltered')


def results(stage) -> dict[str, dict]:
  """{row: result} of an evaluation stage; see `srm_jax.evaluate.Evaluation`."""
  return json.loads((pathlib.Path(stage.target) / 'results.json').read_text())


def resolve(name: str, best: str) -> str:
  """The row behind a name that may be BEST."""
  return best if name == BEST else name


def score(result: Mapping[str, Any]) -> Score:
  """The Score of a result in results.json."""
  return Score(result['accuracy'], *result['interval'], result['n'])


def compare(name: str, against: str, found: Mapping[str, Mapping[str, Any]]) -> Compared | None:
  """Paired test of two rows on their 0/1 arrays; None where there is nothing to compare with."""
  if not against:
    return None
  return Compared(against, statistics.paired_test(found[name]['correct'], found[against]['correct']))


def _row(name: str, best: str, tests, stages) -> Row:
  step, result = STEPS[name], tests[name]
  line = [resolve(part, best) for part in step.trained]
  hard = stages.get(f'hard_{name}')
  flops = sum(spent(stages[part]) for part in line)
  return Row(
      name=name, title=step.title, score=score(result), hard=None if hard is None else score(results(hard)['greedy']),
      compared=compare(name, resolve(step.against, best), tests),
      retention=_ratio(result['accuracy'], tests['teacher']['accuracy']), tokens=result['tokens_per_answer'],
      params=num_params(checkpoints.model_config(stages[line[-1]].target)), flops=flops,
      flops_with_teacher=flops + sum(spent(stages[part]) for part in _help(name, best)),
      answer_flops=result['flops'] / result['n'], by_steps=_by_steps(result),
  )


def _help(name: str, best: str) -> tuple[str, ...]:
  return STEPS[best].helped if BEST in STEPS[name].helped else STEPS[name].helped


def spent(stage) -> float:
  """FLOPs of a training or annotation stage; a model that was given cost this line nothing."""
  if stage.run == 'given':
    return 0.0
  if stage.run == 'annotate':
    return stage.outcome['flops']
  return metrics.read(stage.target)[-1]['flops']


def _ratio(a: float, b: float) -> float:
  return a / b if b else float('nan')


def _by_steps(result) -> dict[int, tuple[int, int]]:
  return {int(steps): tuple(tally) for steps, tally in sorted(result['by_steps'].items()) if steps.isdigit()}


def _strategies(stage) -> dict[str, StrategyRow]:
  found = results(stage)
  config = json.loads((pathlib.Path(stage.workdir) / 'config.json').read_text())
  rows = {}
  for name, (title, against) in STRATEGIES.items():
    result, n = found[name], found[name]['n']
    rows[name] = StrategyRow(
        name=name, title=title.format(**config['strategies'][name]), score=score(result),
        compared=compare(name, against, found), sampled=result['tokens_per_answer'],
        scored=result['spent']['scored'] / n, flops=result['flops'] / n,
    )
  return rows
