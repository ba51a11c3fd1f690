"""A teacher's chains of thought for new problems: four samples each, graded, with provenance.

Run: python -m experiments.annotate --config=configs/annotate/arithmetic.py --config.teacher=runs/teacher \\
       --workdir=runs/annotations
Hardware: two CPU cores, minutes. Expected: one record a sample in annotations.jsonl, the share of right ones printed.
"""

from configs import base


def get_config(arg: str = ''):
  """arg: 'task=gsm8k,count=500', 'smoke'."""
  a = base.parse_arg(arg, task='arithmetic_mix', count=2000, smoke=False)
  return base.annotate(
      'runs/teacher', base.data(a.task, count=4 if a.smoke else a.count, seed=2),
      base.sampling(samples=2 if a.smoke else 4, max_new_tokens=16 if a.smoke else 128),
  )
