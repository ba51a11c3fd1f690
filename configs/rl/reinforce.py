"""REINFORCE: the log-likelihood of what was sampled, times its reward.

Run: python -m experiments.train --config=configs/rl/reinforce.py:start=runs/logits --workdir=runs/reinforce
Hardware: two CPU cores, minutes. Expected: the reward rises by several points in 50 steps from a student at 30 to 70 %.
Paper: Williams, Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning, 1992.
Left out: a baseline, which the paper allows. With rewards of 0 and 1 this is fine-tuning on fresh samples that are
right.
"""

from configs import base
from configs.rl import problems


def get_config(arg: str = ''):
  """arg: 'start=DIR' (policy and reference), 'kl=0.01', 'steps=200', 'smoke'."""
  return problems.run(arg, choices=lambda a: dict(
      advantage=base.choice('returns_to_go'), surrogate=base.choice('reinforce'),
      reduction=base.choice('fixed_length', max_length=1),  # the mean over completions of their sums
  ))
