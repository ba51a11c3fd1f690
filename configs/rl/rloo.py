"""RLOO: the mean reward of the other completions of a prompt as the baseline, the KL inside the reward.

Run: python -m experiments.train --config=configs/rl/rloo.py:start=runs/logits --workdir=runs/rloo
Hardware: two CPU cores, minutes. Expected: the reward rises by several points in 50 steps from a student at 30 to 70 %.
Paper: Ahmadian et al., Back to Basics: Revisiting REINFORCE-Style Optimization for Learning from Human Feedback,
arXiv:2402.14740.
Left out: its learned reward model.
"""

from configs import base
from configs.rl import problems


def get_config(arg: str = ''):
  """arg: 'start=DIR' (policy and reference), 'kl=0.01', 'steps=200', 'smoke'."""
  return problems.run(arg, kl=0.03, choices=lambda a: dict(
      advantage=base.choice('leave_one_out'), surrogate=base.choice('reinforce'),
      reduction=base.choice('fixed_length', max_length=1), estimator='k1', place='reward',
  ))
