"""Accuracy under inference strategies, with 95 % intervals over problems.

python -m experiments.evaluate --config=configs/evaluate/arithmetic.py --config.model=runs/sft --workdir=runs/evaluation
"""

import rich.console
import rich.table

from experiments import command


def run(config, workdir):
  from srm_jax.evaluate import evaluate

  table = rich.table.Table('row', 'accuracy', '95 % interval', 'n', 'tokens / answer', 'FLOPs')
  for name, row in evaluate(config, workdir).results.items():
    low, high = row['interval']
    table.add_row(
        name, f'{row["accuracy"]:.1%}', f'{low:.1%} - {high:.1%}', str(row['n']),
        f'{row["tokens_per_answer"]:.1f}', f'{row["flops"]:.2e}',
    )
  rich.console.Console().print(table)


if __name__ == '__main__':
  command.launch(run)
