"""DAPO: clip-higher, dynamic sampling, every token weighs alike, and care for what is cut.

Run: python -m experiments.train --config=configs/rl/dapo.py:start=runs/logits --workdir=runs/dapo
Hardware: two CPU cores, minutes. Expected: the reward rises by several points in 50 steps from a student at 30 to 70 %.
Paper: Yu et al., DAPO: An Open-Source LLM Reinforcement Learning System at Scale, arXiv:2503.14476.
Left out: its minibatches (512 of 8192 completions a step).
"""

from configs import base
from configs.rl import problems


def get_config(arg: str = ''):
  """arg: 'start=DIR' (policy and reference), 'kl=0.01', 'steps=200', 'smoke'."""
  return problems.run(
      arg, rollouts=lambda a: dict(cut='mask', dynamic=dict(prompts=a.prompts, rounds=3)), choices=lambda a: dict(
          surrogate=base.choice('clipped', clip_low=0.2, clip_high=0.28), reduction=base.choice('token_mean'),
          rewards=dict(
              task=base.reward('task'),
              overlong=base.reward('soft_overlong', max_length=a.max_new_tokens, cache=a.max_new_tokens // 4),
          ),
      ),
  )
