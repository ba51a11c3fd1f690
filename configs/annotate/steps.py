"""Labels of the steps of annotations by Monte Carlo: eight continuations a step, graded; for a process reward model.

Run: python -m experiments.process_labels --config=configs/annotate/steps.py --config.student=runs/sft \\
       --config.data.records=runs/annotations/annotations.jsonl --workdir=runs/steps
Hardware: two CPU cores, minutes for some thousand steps. Expected: one record an annotation in steps.jsonl; shares of
right continuations fall along wrong chains. configs/rl/reward_model.py:target=process trains on it.
"""

from configs import base


def get_config(arg: str = ''):
  """arg: 'task=running_sums,segmentation=characters', 'samples=4', 'smoke'."""
  a = base.parse_arg(arg, task='arithmetic_mix', segmentation='lines', samples=8, smoke=False)
  return base.process_labels(
      'runs/sft', base.data(a.task, records='runs/annotations/annotations.jsonl', target='unfiltered_completion'),
      base.sampling(samples=2 if a.smoke else a.samples, max_new_tokens=16 if a.smoke else 128),
      segmentation=a.segmentation,
  )
