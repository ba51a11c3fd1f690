"""Trains one run.

python -m experiments.train --config=configs/sft/arithmetic.py --workdir=runs/sft [--config.num_steps=200 ...]
"""

from experiments import command


def run(config, workdir):
  from srm_jax.train import train

  done = train(config, workdir)
  last = done.metrics[-1] if done.metrics else {}
  print(f'{done.workdir}: step {done.step}, loss {last.get("loss", float("nan")):.4f}')


if __name__ == '__main__':
  command.launch(run)
