"""LCPO-Exact: GRPO on being right with the number of tokens that the prompt asks for.

Run: python -m experiments.train --config=configs/rl/lcpo.py:start=runs/logits --workdir=runs/lcpo
Hardware: two CPU cores, minutes. Expected: the reward rises by several points in 50 steps from a student at 30 to 70 %.
Paper: Aggarwal and Welleck, L1: Controlling How Long A Reasoning Model Thinks With Reinforcement Learning,
arXiv:2503.04697.
Left out: the second stage: kind length_max, started from this one; configs/studies/length_control.py (S8) has both.
"""

from configs import base
from configs.rl import problems


def get_config(arg: str = ''):
  """arg: 'start=DIR' (policy and reference), 'kl=0.01', 'steps=200', 'smoke'."""
  return problems.run(arg, budget=(24, 40, 56, 72), choices=lambda a: dict(
      rewards=dict(length=base.reward('length_exact', alpha=0.01), task=base.reward('task', 0.0)),
  ))
