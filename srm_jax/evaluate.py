"""Accuracy of a model under inference strategies on held-out problems, with intervals and with what it cost.

Strategies that only differ in what they do with the samples (majority, best of n) share one pool of them.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from srm_jax import checkpoints, metrics, schema, sharding, statistics
from srm_jax.data.prompting import Prompting
from srm_jax.inference import make_generate, strategies
from srm_jax.inference.reward_scores import make_reward_scorer, reduced
from srm_jax.inference.score import REDUCTIONS, make_scorer
from srm_jax.losses.reward_model import AGGREGATIONS
from srm_jax.models.config import forward_flops
from srm_jax.recipes import reward_model
from srm_jax.recipes.context import DataConfig, load_problems, open_data, require_same_vocabulary
from srm_jax.rewards import Graded
from srm_jax.rollout import rollout
from srm_jax.types import Generate, SamplingParams


@dataclasses.dataclass(frozen=True)
class StrategyConfig:
  """name: from STRATEGIES; samples and temperature: how the completions it chooses from are drawn."""

  name: str
  samples: int
  temperature: float


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """model, scorer: workdirs of trained models; scorer '' where no strategy scores.

  strategies: {row name: StrategyConfig}.
  score: how a completion's token log-probabilities under the scorer become one number (mean, min, sum), or the steps'
  scores where the scorer is a reward model (min, last, mean, product).
  """

  model: str
  scorer: str
  score: str
  data: DataConfig
  strategies: Mapping[str, Any]
  max_new_tokens: int
  seed: int
  batch_size: int
  mesh: tuple
  progress: bool


class Evaluation(NamedTuple):
  """A finished evaluation: its folder and {row name: result}, as in results.json.

  A result holds accuracy, interval (95 %, over problems), n, correct (0/1 a problem), by_steps ({steps: [right, n]}),
  tokens_per_answer, finished, spent (prefilled, sampled, scored tokens in all) and flops.
  """

  workdir: pathlib.Path
  results: dict[str, dict[str, Any]]


def evaluate(config: ml_collections.ConfigDict, workdir) -> Evaluation:
  """Evaluates the model of `config`; a finished row is not run again.

  Raises:
    ConfigError: unknown names or types, a workdir of another config, no model.
  """
  plain = schema.resolve(config)
  parsed, rows = open_config(plain, 'config')
  workdir = pathlib.Path(workdir)
  with jax.set_mesh(sharding.make_mesh(parsed.mesh)):
    tracked = {key: value for key, value in plain.items() if key != 'progress'}
    checkpoints.claim(workdir, tracked)
    results = _run(parsed, rows, workdir)
  return Evaluation(workdir, results)


def open_config(plain: Mapping[str, Any], where: str) -> tuple[EvaluateConfig, dict[str, StrategyConfig]]:
  """The typed config and its rows.

  Raises:
    ConfigError: a key or name is unknown, a value has the wrong type, or a row lacks what it needs.
  """
  config = schema.parse(EvaluateConfig, plain, where)
  rows = {
      name: schema.parse(StrategyConfig, row, f'{where}.strategies.{name}') for name, row in config.strategies.items()
  }
  if not rows:
    raise schema.ConfigError(f'{where}.strategies is empty; name at least one of {sorted(strategies.STRATEGIES)}')
  schema.choose('score', config.score, {**REDUCTIONS, **AGGREGATIONS})
  for row in rows.values():
    schema.choose('strategy', row.name, strategies.STRATEGIES)
    if row.name in ('best_of_n', 'weighted_vote') and not config.scorer:
      raise schema.ConfigError(f'strategy {row.name} needs {where}.scorer, the workdir of the model that scores')
  return config, rows


class _Bench(NamedTuple):
  """What all rows share: how the task is put, its problems, the sampler and the scorer."""

  prompting: Prompting
  problems: Sequence
  generate: Generate
  scored: Callable | None


def _run(config: EvaluateConfig, rows: Mapping[str, StrategyConfig], workdir) -> dict:
  path = workdir / 'results.json'
  results = json.loads(path.read_text()) if path.exists() else {}
  left = {name: row for name, row in rows.items() if name not in results}
  if not left:
    return results
  model = checkpoints.load_model(config.model)
  scorer = checkpoints.load_model(config.scorer) if config.scorer else None
  if scorer is not None:
    require_same_vocabulary(f'scorer {config.scorer}', scorer.tokenizer, 'the model', model.tokenizer)
  prompting = open_data(config.data, model.tokenizer)
  problems = load_problems(config.data)
  if not problems:
    raise schema.ConfigError(f'no problem to evaluate on in {config.data}')
  total = len(problems) * sum(row.samples for row in rows.values())
  bar = metrics.progress('evaluate', total, disable=not config.progress)
  generate = make_generate(model.config, model.params, model.tokenizer, batch_size=config.batch_size)
  bench = _Bench(prompting, problems, generate, None if scorer is None else _score_function(config, scorer))
  pools: dict[float, Generate] = {}
  with bar:
    for name, row in left.items():
      graded = _row(config, bench, row, rows, pools)
      results[name] = summarize(graded, model.config, None if scorer is None else scorer.config)
      _write_completions(workdir / f'completions_{len(results) - 1}.jsonl', name, graded)
      checkpoints.write_whole(path, json.dumps(results))
      bar.advance(row.samples * len(problems), accuracy=results[name]['accuracy'])
  return results


def _score_function(config: EvaluateConfig, scorer):
  section = checkpoints.run_config(config.scorer).get('recipe', {})
  if section.get('name') == 'reward_model':
    schema.choose('score of a reward model', config.score, AGGREGATIONS)
    head, segment = scorer.extra[reward_model.HEAD], reward_model.segmentation(section)
    score = make_reward_scorer(
        scorer.config, scorer.params, head, scorer.tokenizer, segment=segment, batch_size=config.batch_size
    )
    return lambda completions: reduced(config.score, score(completions))
  score = make_scorer(scorer.config, scorer.params, scorer.tokenizer, batch_size=config.batch_size)
  reduce = schema.choose('score of a language model', config.score, REDUCTIONS)
  return lambda completions: [float(reduce(logprobs)) for logprobs in score(completions)]


def _row(config, bench: _Bench, row: StrategyConfig, rows, pools) -> list[Graded]:
  """Grades one strategy on all problems."""
  sampling = SamplingParams(
      temperature=row.temperature, max_new_tokens=config.max_new_tokens, samples=row.samples, seed=config.seed
  )
  if row.name == 'direct':
    strategy = strategies.STRATEGIES['direct'](bench.generate, cue=bench.prompting.task.answer_cue)
  else:
    pool = _pool(config, bench, row.temperature, rows, pools)
    strategy = _bind(row, bench)(pool)
  groups = rollout(strategy, bench.prompting, bench.problems, dataclasses.replace(sampling, samples=1))
  return [group[0] for group in groups]


def _bind(row: StrategyConfig, bench: _Bench) -> Callable[[Generate], Generate]:
  build = strategies.STRATEGIES[row.name]
  if row.name == 'self_consistency':
    return lambda generate: build(generate, extract=bench.prompting.task.extract, samples=row.samples)
  if row.name == 'best_of_n':
    return lambda generate: build(generate, score=bench.scored, samples=row.samples)
  if row.name == 'weighted_vote':
    extract = bench.prompting.task.extract
    return lambda generate: build(generate, extract=extract, score=bench.scored, samples=row.samples)
  return build


def _pool(config, bench: _Bench, temperature, rows, pools) -> Generate:
  """The samples at one temperature, drawn once for the row that wants most of them."""
  if temperature not in pools:
    samples = max(row.samples for row in rows.values() if row.temperature == temperature and row.name != 'direct')
    sampling = SamplingParams(
        temperature=temperature, max_new_tokens=config.max_new_tokens, samples=samples, seed=config.seed
    )
    groups = rollout(bench.generate, bench.prompting, bench.problems, sampling)
    pools[temperature] = strategies.replay([[one.completion for one in group] for group in groups])
  return pools[temperature]


def summarize(graded: Sequence[Graded], model, scorer) -> dict[str, Any]:
  """The result of one row; see `Evaluation`. An unscorable completion counts as wrong and is reported."""
  correct = [float(one.reward == 1.0) for one in graded]
  spent = [sum(part) for part in zip(*(one.completion.spent for one in graded))]
  by_steps: dict[str, list[int]] = {}
  for one, right in zip(graded, correct):
    tally = by_steps.setdefault(str(one.problem.metadata.get('steps', '')), [0, 0])
    tally[0] += int(right)
    tally[1] += 1
  flops = forward_flops(model, spent[0] + spent[1]) + (forward_flops(scorer, spent[2]) if scorer and spent[2] else 0.0)
  return {
      'accuracy': float(np.mean(correct)), 'interval': statistics.wilson_interval(sum(correct), len(correct)),
      'n': len(correct), 'correct': [int(right) for right in correct], 'by_steps': by_steps,
      'tokens_per_answer': spent[1] / len(correct),
      'finished': float(np.mean([one.completion.finished for one in graded])),
      'unscorable': sum(one.reward is None for one in graded),
      'spent': dict(zip(('prefilled', 'sampled', 'scored'), spent)), 'flops': flops,
  }


def _write_completions(path, name, graded: Sequence[Graded]):
  lines = (
      {
          'row': name, 'id': one.problem.id, 'prompt': one.completion.prompt.text, 'text': one.completion.text,
          'reward': one.reward,
      }
      for one in graded
  )
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))


def read_completions(workdir, row: str) -> dict[str, dict[str, Any]]:
  """{problem id: {prompt, text, reward}} of a row of a finished evaluation."""
  for path in sorted(pathlib.Path(workdir).glob('completions_*.jsonl')):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if lines and lines[0]['row'] == row:
      return {line['id']: line for line in lines}
  raise schema.ConfigError(f'{workdir} has no completions of row {row!r}')
