"""A teacher's chains of thought for problems, graded.

python -m experiments.annotate --config=configs/annotate/arithmetic.py --config.teacher=runs/teacher \\
    --workdir=runs/annotations
"""

from experiments import command


def run(config, workdir):
  from srm_jax.annotate import annotate

  done = annotate(config, workdir)
  summary = done.summary
  print(
      f'{done.path}: {summary["correct"]} of {summary["samples"]} right, '
      f'{summary["solved"]} of {summary["problems"]} problems solved'
  )
  for part in ('hinted', 'paths'):
    if part in summary:
      print(f'{part}: ' + ', '.join(f'{count} {name}' for name, count in summary[part].items()))


if __name__ == '__main__':
  command.launch(run)
