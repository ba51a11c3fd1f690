"""S8: lengths that are asked for and lengths that are written, of configs/studies/length_control.py."""

import numpy as np

from experiments.study import verdicts
from experiments.study.cells import graded
from experiments.study.running import COLORS, Study, mean_and_seeds
from srm_jax import checkpoints
from srm_jax.evaluate import read_completions
from srm_jax.recipes.context import DataConfig, load_problems
from srm_jax.rewards import BUDGET
from srm_jax.schema import parse, resolve

MODELS = {'base': 'start', 'exact': 'Exact', 'warm': 'Max from Exact', 'cold': 'Max from the start'}
CORRELATION, ERROR, DROP = 0.9, 1.5, 0.03


def read(done, config):
  """{model: test grades, and what `lengths` says of them}."""
  del config
  return {name: graded(done[f'test_{name}']) | of_evaluation(done[f'test_{name}'].workdir) for name in MODELS}


def of_evaluation(folder):
  """`lengths` of the completions of an evaluation."""
  config = resolve(checkpoints.run_config(folder))
  tokenizer = checkpoints.model_tokenizer(config['model'])
  written, rows = read_completions(folder, 'sampled'), []
  for problem in load_problems(parse(DataConfig, config['data'], 'config.data')):
    one = written[problem.id]
    tokens = min(len(tokenizer.encode(one['text'])) + 1, config['max_new_tokens'])  # the end is one, unless it was cut
    rows.append((problem.metadata[BUDGET], tokens, float(one['reward'] == 1.0)))
  return lengths(*np.array(rows).T)


def lengths(budgets: np.ndarray, tokens: np.ndarray, right: np.ndarray):
  """What is written for what is asked.

  Args:
    budgets: [n], tokens that problems ask for.
    tokens: [n], tokens of their completions.
    right: [n], 1.0 or 0.0.

  Returns:
    {'error': mean |tokens - budget|, 'correlation': of the two over completions, 0 where all are equally long,
    'length': mean, 'by_budget': {budget: {'length', 'deviation', 'error', 'accuracy'}}}.
  """
  error = np.abs(tokens - budgets)
  groups = {str(int(budget)): budgets == budget for budget in np.unique(budgets)}
  return {
      'error': float(error.mean()), 'length': float(tokens.mean()),
      'correlation': float(np.corrcoef(budgets, tokens)[0, 1]) if tokens.std() and budgets.std() else 0.0,
      'by_budget': {budget: {
          'length': float(tokens[some].mean()), 'deviation': float(tokens[some].std()),
          'error': float(error[some].mean()), 'accuracy': float(right[some].mean()),
      } for budget, some in groups.items()},
  }


def values(found, name: str, key: str) -> np.ndarray:
  """[seeds] of a model."""
  return np.array([cell['models'][name][key] for cell in found])


def judge(found):
  """That Exact follows the budget, closely, at no cost, and that Max ends shorter where it starts cold."""
  of = lambda name, key: values(found, name, key)
  claims = {
      f'Exact: the correlation of tokens and budget is above {CORRELATION}': of('exact', 'correlation') - CORRELATION,
      f'Exact: tokens miss the budget by at most {ERROR}': ERROR - of('exact', 'error'),
      f'Exact loses at most {DROP:.0%} of accuracy': of('exact', 'accuracy') - of('base', 'accuracy') + DROP,
      'Max is shorter from the start than from Exact': of('warm', 'length') - of('cold', 'length'),
  }
  return [verdicts.judge(claim, {'running_sums': verdicts.of_values(one)}) for claim, one in claims.items()]


def table(found):
  """A model a row."""
  budgets = list(found[0]['models']['base']['by_budget'])
  by = lambda name, key, form: ', '.join(
      form.format(np.mean([cell['models'][name]['by_budget'][budget][key] for cell in found])) for budget in budgets
  )
  asked = ', '.join(budgets)
  header = [
      'model', 'accuracy (seeds)', 'correlation', 'mean miss', 'mean length', f'length at {asked}',
      f'accuracy at {asked}',
  ]
  return header, [
      [said, mean_and_seeds(values(found, name, 'accuracy')), mean_and_seeds(values(found, name, 'correlation')),
       mean_and_seeds(values(found, name, 'error'), '{:.2f}'), mean_and_seeds(values(found, name, 'length'), '{:.1f}'),
       by(name, 'length', '{:.1f}'), by(name, 'accuracy', '{:.2f}')]
      for name, said in MODELS.items()
  ]


def draw(found, figure):
  """Length and accuracy over the budget: a thin line a seed, a thick one for their mean."""
  budgets = [int(budget) for budget in found[0]['models']['base']['by_budget']]
  for axis, key in zip(figure.subplots(1, 2), ('length', 'accuracy'), strict=True):
    for color, (name, said) in zip(COLORS, MODELS.items(), strict=False):
      lines = np.array([[one[key] for one in cell['models'][name]['by_budget'].values()] for cell in found])
      axis.plot(budgets, lines.T, color=color, alpha=0.25, linewidth=0.8)
      axis.plot(budgets, lines.mean(axis=0), color=color, label=said)
    axis.set(xlabel='tokens asked for', title={'length': 'tokens written', 'accuracy': 'accuracy'}[key])
    if key == 'length':
      axis.plot(budgets, budgets, color='#888888', linewidth=0.6, linestyle=':')
      axis.legend()


STUDY = Study('configs/studies/length_control.py', read, judge, table, draw)
