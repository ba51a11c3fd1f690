"""A finished quickstart without training: stages in the real formats, with completions that fail at chosen rates."""

import dataclasses
import functools
import json

import numpy as np

from configs import quickstart
from experiments.quickstart import record
from srm_jax import evaluate, stages
from srm_jax.models.config import TransformerConfig
from srm_jax.rewards import Graded
from srm_jax.tasks import TASKS
from srm_jax.schema import resolve
from srm_jax.types import Completion, Prompt, Spent

TASK = TASKS['arithmetic_mix']
RATES = {
    'teacher': 0.86, 'base': 0.31, 'sft_small': 0.38, 'sft_gold': 0.49, 'sft_annotations': 0.51, 'logits': 0.60,
    'hidden': 0.61, 'on_policy': 0.65, 'rl': 0.71,
}
STRATEGY_RATES = {'direct': 0.12, 'greedy': 0.71, 'sample': 0.66, 'majority': 0.76, 'best_of_n': 0.79}
SETTINGS = record.Settings(
    task='arithmetic_mix', size='full', seed=1234, steps=1.0, dtype='float32', minutes=12.0,
    estimates={'teacher': 100.0}, calibration={'whole': 600.0},
    machine={'devices': '1 × cpu', 'cores': 2, 'processor': 'x86_64 avx2', 'jax': '0.12.0'},
)


@functools.cache
def _problems(split: str, count: int, seed: int):
  return TASK.problems(split, count=count, seed=seed)


def _wrong(solution: str, rng) -> str:
  """The solution with a digit changed, in a step from which on the answer is wrong too."""
  lines = solution.splitlines()
  place = int(rng.integers(len(lines)))
  lines[place] = lines[place][:-1] + str((int(lines[place][-1]) + 1) % 10 if lines[place][-1].isdigit() else 7)
  lines[-1] = f'#### {int(rng.integers(200, 999))}'
  return '\n'.join(lines)


def graded(problems, rate: float, *, seed: int, sampled: int = 1, scored: int = 0) -> list[Graded]:
  """One completion a problem. Problems have one order of difficulty, so that the rows of a line agree mostly."""
  difficulty, rng, rows = np.random.default_rng(0).random(len(problems)), np.random.default_rng(seed), []
  for problem, hard in zip(problems, difficulty):
    right = hard + 0.12 * rng.standard_normal() < rate
    text = TASK.solution(problem) if right else _wrong(TASK.solution(problem), rng)
    spent = Spent(12 * sampled, 30 * sampled, 42 * scored)
    prompt = Prompt(problem.id, TASK.prompt(problem))
    completion = Completion(prompt, 0, text, (1,) * 12, (2,) * 30, (0.0,) * 30, True, spent)
    rows.append(Graded(problem, completion, TASK.grade(problem, text)))
  return rows


def _write_evaluation(folder, config, rows, student, teacher):
  (folder / 'config.json').write_text(json.dumps(config))
  found = {name: evaluate.summarize(grades, student, teacher) for name, grades in rows.items()}
  (folder / 'results.json').write_text(json.dumps(found))
  for index, (name, grades) in enumerate(rows.items()):
    evaluate._write_completions(folder / f'completions_{index}.jsonl', name, grades)
  return {name: {key: row[key] for key in ('accuracy', 'interval', 'n')} for name, row in found.items()}


def _write_training(folder, config, model, seed):
  (folder / 'config.json').write_text(json.dumps(config))
  (folder / 'model.json').write_text(json.dumps(dataclasses.asdict(model)))
  rng, lines, steps = np.random.default_rng(seed), [], config['num_steps']
  terms = config['recipe'].get('loss', {}).get('terms', {})
  for step in range(min(10, steps), steps + 1, 10):
    fall = float(np.exp(-2.5 * step / steps) + 0.03 * rng.random())
    row = {'step': step, 'loss': 2 * fall, 'flops': 1e10 * step, 'seconds_per_step': 0.1}
    if config['recipe']['name'] == 'sft':
      row |= {'loss/cross_entropy': 2 * fall, 'token_accuracy': 1 - 0.8 * fall}
    else:
      row |= {name: (2.2 if name == 'cross_entropy' else 1) * fall for name in terms}
    if 'rollouts' in config['recipe']:
      row |= {'reward': 0.7 - 0.4 * fall}
    lines.append(row)
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return {'step': steps, 'loss': lines[-1]['loss']}


def _evaluation(name: str, number: int, problems, seed: int) -> dict[str, list[Graded]]:
  """Graded completions of the rows of an evaluation stage."""
  if name != 'strategies':
    split, model = name.split('_', 1)
    return {'greedy': graded(problems, RATES[model] * (0.4 if split == 'hard' else 1.0), seed=seed + number)}
  cost = {'majority': dict(sampled=8), 'best_of_n': dict(sampled=8, scored=8)}
  return {
      row: graded(problems, rate, seed=seed + 40 + place, **cost.get(row, {}))
      for place, (row, rate) in enumerate(STRATEGY_RATES.items())
  }


STUDENT, TEACHER = TransformerConfig(512, 3, 64, 4, 4, 16, 192), TransformerConfig(512, 4, 128, 4, 4, 32, 384)
ANNOTATED = {
    'problems': 2000, 'samples': 4000, 'correct': 3412, 'solved': 1801, 'sampled_tokens': 120000, 'flops': 2.2e11,
}


def _write(name: str, number: int, section, folder, count: int, seed: int) -> dict:
  """Fills the folder of a stage; its outcome."""
  config, model = section['config'], TEACHER if name.endswith('teacher') else STUDENT
  if section['run'] == 'train':
    return _write_training(folder, config, model, number)
  if section['run'] == 'evaluate':
    config['data']['count'] = count
    problems = _problems(config['data']['split'], count, config['data']['seed'])
    return _write_evaluation(folder, config, _evaluation(name, number, problems, seed), model, TEACHER)
  if section['run'] == 'select':
    return {'chosen': 'on_policy', 'scores': {arm: RATES[arm] for arm in config['candidates']}}
  return ANNOTATED if section['run'] == 'annotate' else {'vocab_size': 512, 'texts': 20000, 'tokens_per_text': 41.0}


def make(
    workdir, *, count: int, seed: int = 0, settings: record.Settings = SETTINGS
) -> dict[str, stages.Stage]:
  """Writes the stages of configs/quickstart.py below a workdir, with `count` test problems, and quickstart.json."""
  config, done = resolve(quickstart.get_config(settings.arg)), {}
  for number, name in enumerate(config['order']):
    folder, section = workdir / f'{name}-0123456789', config['stages'][name]
    folder.mkdir(parents=True)
    outcome = _write(name, number, section, folder, count, seed)
    target = done['on_policy'].target if section['run'] == 'select' else folder
    done[name] = stages.Stage(name, section['run'], folder, target, 10.0 + number, outcome)
  record.write(workdir, settings, done)
  return done
