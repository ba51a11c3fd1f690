"""CISPO: the weight of a token is capped and held constant, so that none loses its gradient.

Run: python -m experiments.train --config=configs/rl/cispo.py:start=runs/logits --workdir=runs/cispo
Hardware: two CPU cores, minutes. Expected: the reward rises by several points in 50 steps from a student at 30 to 70 %.
Paper: MiniMax, MiniMax-M1, arXiv:2506.13585; the cap of 5: Khatri et al., The Art of Scaling RL Compute,
arXiv:2510.13786.
Left out: the float32 head of ScaleRL (log-probabilities are float32 here in any case), its pipeline of stale rollouts.
"""

from configs import base
from configs.rl import problems


def get_config(arg: str = ''):
  """arg: 'start=DIR' (policy and reference), 'kl=0.01', 'steps=200', 'smoke'."""
  return problems.run(arg, choices=lambda a: dict(
      surrogate=base.choice('cispo', max_ratio=5.0), reduction=base.choice('token_mean'), minibatches=4,
  ))
