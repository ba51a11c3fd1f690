"""SAPO: a soft gate on the ratio in the place of the clip.

Run: python -m experiments.train --config=configs/rl/sapo.py:start=runs/logits --workdir=runs/sapo
Hardware: two CPU cores, minutes. Expected: the reward rises by several points in 50 steps from a student at 30 to 70 %.
Paper: Gao et al., Soft Adaptive Policy Optimization, arXiv:2511.20347.
Left out: nothing of the loss.
"""

from configs import base
from configs.rl import problems


def get_config(arg: str = ''):
  """arg: 'start=DIR' (policy and reference), 'kl=0.01', 'steps=200', 'smoke'."""
  return problems.run(arg, choices=lambda a: dict(
      surrogate=base.choice('sapo', positive=1.0, negative=1.05), minibatches=4,
  ))
