"""A teacher's next-token distributions of a data set, kept for students to learn.

python -m experiments.cache_teacher --config=configs/distill/cache.py --config.teacher=runs/teacher \\
    --config.data.records=runs/annotations/annotations.jsonl --workdir=runs/cache
"""

from experiments import command


def run(config, workdir):
  from srm_jax.cache_teacher import cache_teacher

  done = cache_teacher(config, workdir)
  found = done.summary
  print(
      f'{done.path}: {found["tokens"]} tokens of {found["examples"]} examples, {found["bytes_per_token"]:.1f} bytes a '
      f'token; mean KL {found["reconstruction_kl"]:.2g} nats to the dense teacher, {found["measured_tokens"]} tokens'
  )


if __name__ == '__main__':
  command.launch(run)
