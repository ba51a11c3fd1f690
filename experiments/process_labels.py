"""How often a student comes to the right answer from every step of a file of annotations.

python -m experiments.process_labels --config=configs/annotate/steps.py --config.student=runs/sft \\
    --config.data.records=runs/annotations/annotations.jsonl --workdir=runs/steps
"""

from experiments import command


def run(config, workdir):
  from srm_jax.process_labels import label_process

  done = label_process(config, workdir)
  found = done.summary
  print(
      f'{done.path}: {found["steps"]} steps of {found["annotations"]} annotations; {found["mean_rate"] or 0:.1%} of '
      f'continuations right, {found["right"] or 0:.1%} of steps with a right one'
  )


if __name__ == '__main__':
  command.launch(run)
