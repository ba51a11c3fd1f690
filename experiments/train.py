"""Trains one run.

python -m experiments.train --config=configs/sft/arithmetic.py --workdir=runs/sft [--config.num_steps=200 ...]

On several hosts every one runs the same command with --hosts=auto (a Cloud TPU slice, GKE, Slurm), or with
--hosts=ADDRESS:PORT,COUNT,INDEX of the first host's address and its own index; the workdir is one that all of them see.
"""

from experiments import command


def run(config, workdir):
  from srm_jax.train import train

  done = train(config, workdir)
  last = done.metrics[-1] if done.metrics else {}
  print(f'{done.workdir}: step {done.step}, loss {last.get("loss", float("nan")):.4f}')


if __name__ == '__main__':
  command.launch(run, several_hosts=True)
