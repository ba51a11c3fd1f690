"""PPO: a value head as the baseline of every token, clipped ratios and values, several epochs.

Run: python -m experiments.train --config=configs/rl/ppo.py:start=runs/logits --workdir=runs/ppo
Hardware: two CPU cores, minutes. Expected: the reward rises by several points in 50 steps from a student at 30 to 70 %.
Paper: Schulman et al., arXiv:1707.06347; with a penalty in the reward: Ouyang et al., InstructGPT, arXiv:2203.02155.
Left out: a critic of its own: the value head reads the hidden states of the policy.
"""

from configs import base
from configs.rl import problems


def get_config(arg: str = ''):
  """arg: 'start=DIR' (policy and reference), 'kl=0.01', 'steps=200', 'smoke'."""
  return problems.run(arg, kl=0.01, choices=lambda a: dict(
      advantage=base.choice('gae', discount=1.0, trace_decay=0.95), whiten=True, reduction=base.choice('token_mean'),
      critic=dict(coef=0.5, clip=0.2), epochs=2, minibatches=4, estimator='k1', place='reward',
  ))
