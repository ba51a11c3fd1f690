"""Dr. GRPO: GRPO without its two biases, the division by the deviation and by the length of a completion.

Run: python -m experiments.train --config=configs/rl/dr_grpo.py:start=runs/logits --workdir=runs/dr_grpo
Hardware: two CPU cores, minutes. Expected: the reward rises by several points in 50 steps from a student at 30 to 70 %.
Paper: Liu et al., Understanding R1-Zero-Like Training: A Critical Perspective, arXiv:2503.20783.
Left out: nothing of the loss.
"""

from configs import base
from configs.rl import problems


def get_config(arg: str = ''):
  """arg: 'start=DIR' (policy and reference), 'kl=0.01', 'steps=200', 'smoke'."""
  return problems.run(arg, choices=lambda a: dict(
      advantage=base.choice('centered'), reduction=base.choice('fixed_length', max_length=a.max_new_tokens),
  ))
