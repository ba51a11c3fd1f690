"""A teacher's next-token distributions of its annotations, kept once: the k likeliest tokens and the mass of the rest.

Run: python -m experiments.cache_teacher --config=configs/distill/cache.py --config.teacher=runs/teacher \\
       --config.data.records=runs/annotations/annotations.jsonl --workdir=runs/cache
Hardware: two CPU cores, a minute. Expected: some 60 bytes a supervised token at k=16, and a reconstruction KL of less
than a hundredth nat. configs/distill/cached.py trains on it, without the teacher.
"""

from configs import base


def get_config(arg: str = ''):
  """arg: 'k=64', 'temperature=2.0', 'smoke'."""
  a = base.parse_arg(arg, k=16, temperature=1.0, smoke=False)
  return base.cache_teacher(
      'runs/teacher', base.data(records='runs/annotations/annotations.jsonl', target='completion'), k=a.k,
      temperature=a.temperature, measured_tokens=16 if a.smoke else 1024,
  )
