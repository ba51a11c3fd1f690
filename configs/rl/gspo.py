"""GSPO: one ratio a completion, the geometric mean of those of its tokens, clipped as a whole.

Run: python -m experiments.train --config=configs/rl/gspo.py:start=runs/logits --workdir=runs/gspo
Hardware: two CPU cores, minutes. Expected: the reward rises by several points in 50 steps from a student at 30 to 70 %.
Paper: Zheng et al., Group Sequence Policy Optimization, arXiv:2507.18071.
Left out: nothing of the loss; four minibatches, as in the paper: with one alone every ratio is 1.
"""

from configs import base
from configs.rl import problems


def get_config(arg: str = ''):
  """arg: 'start=DIR' (policy and reference), 'kl=0.01', 'steps=200', 'smoke'."""
  return problems.run(arg, choices=lambda a: dict(
      surrogate=base.choice('gspo', clip_low=3e-4, clip_high=4e-4), minibatches=4,
  ))
