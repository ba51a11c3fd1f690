"""S6b: pass@k and maj@k before and after GRPO, of configs/studies/pass_at_k.py."""

import numpy as np

from experiments.study import verdicts
from experiments.study.cells import graded
from experiments.study.running import COLORS, Study, mean_and_seeds
from srm_jax import checkpoints, statistics
from srm_jax.inference import make_generate
from srm_jax.recipes.context import DataConfig, load_problems, open_data
from srm_jax.rollout import rollout
from srm_jax.schema import parse, resolve
from srm_jax.types import SamplingParams

KS = (1, 4, 16, 64, 256)
MODELS = ('base', 'grpo')


def read(done, config):
  """{model: test grades, 'pass' and 'majority' by k}."""
  section = resolve(config.measure)
  return {
      name: graded(done[f'test_{name}']) | of_many(done[name].workdir, section, config.seed) for name in MODELS
  }


def of_many(folder, section, seed: int):
  """{'pass': {k: share of problems}, 'majority': the same} of a model that answers every problem many times."""
  model, data = checkpoints.load_model(folder), parse(DataConfig, section['data'], 'measure.data')
  prompting = open_data(data, model.tokenizer)
  generate = make_generate(model.config, model.params, model.tokenizer, batch_size=section['decode_rows'])
  sampling = SamplingParams(
      temperature=1.0, max_new_tokens=section['new_tokens'], samples=section['samples'], seed=seed
  )
  found = {'pass': {str(k): [] for k in KS}, 'majority': {str(k): [] for k in KS}}
  for group in rollout(generate, prompting, load_problems(data), sampling):
    right = [one.reward == 1.0 for one in group]
    answers = [prompting.task.extract(one.completion.text) for one in group]
    for k in KS:
      found['pass'][str(k)].append(statistics.pass_at_k(len(right), sum(right), k))
      found['majority'][str(k)].append(statistics.majority_at_k(answers, right, k, subsets=200, seed=seed))
  return {kind: {k: float(np.mean(values)) for k, values in by_k.items()} for kind, by_k in found.items()}


def gains(found, k: int) -> np.ndarray:
  """[seeds]: pass@k after minus before."""
  before, after = ([cell['models'][name]['pass'][str(k)] for cell in found] for name in MODELS)
  return np.subtract(after, before)


def judge(found):
  """That pass@1 rises, and that pass@256 gains less than a third of that."""
  first, last = gains(found, KS[0]), gains(found, KS[-1])
  claims = {
      'RL raises pass@1': first, f'pass@{KS[-1]} gains less than a third of what pass@1 gains': first / 3 - last,
  }
  return [
      verdicts.judge(claim, {'running_sums': verdicts.of_values(values)}) for claim, values in claims.items()
  ]


def table(found):
  """A number of samples a row: before and after, for pass@k and maj@k."""
  header = ['k', *(f'{kind}@k, {name}' for kind in ('pass', 'maj') for name in ('start', 'after GRPO'))]
  value = lambda kind, name, k: mean_and_seeds([cell['models'][name][kind][str(k)] for cell in found])
  return header, [
      [str(k), *(value(kind, name, k) for kind in ('pass', 'majority') for name in MODELS)] for k in KS
  ]


def draw(found, figure):
  """Both shares over k: a thin line a seed, a thick one for their mean."""
  for axis, kind in zip(figure.subplots(1, 2, sharey=True), ('pass', 'majority'), strict=True):
    for color, name in zip(COLORS, MODELS, strict=False):
      values = np.array([[cell['models'][name][kind][str(k)] for k in KS] for cell in found])
      axis.plot(KS, values.T, color=color, alpha=0.25, linewidth=0.8)
      axis.plot(KS, values.mean(axis=0), color=color, label={'base': 'start', 'grpo': 'after GRPO'}[name])
    axis.set_xscale('log', base=4)
    axis.set(xlabel='k', title={'pass': 'pass@k', 'majority': 'maj@k'}[kind])
  axis.legend()


STUDY = Study('configs/studies/pass_at_k.py', read, judge, table, draw)
