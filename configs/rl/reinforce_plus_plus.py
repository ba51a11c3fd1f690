"""REINFORCE++: returns with a penalty a token, standardised over all tokens of a batch; no groups.

Run: python -m experiments.train --config=configs/rl/reinforce_plus_plus.py:start=runs/logits \\
       --workdir=runs/reinforce_plus_plus
Hardware: two CPU cores, minutes. Expected: the reward rises by several points in 50 steps from a student at 30 to 70 %.
Paper: Hu et al., REINFORCE++, arXiv:2501.03262. Its baseline form: --config.recipe.advantage.name=centered (whitened as
well).
Left out: its learned reward model.
"""

from configs import base
from configs.rl import problems


def get_config(arg: str = ''):
  """arg: 'start=DIR' (policy and reference), 'kl=0.01', 'steps=200', 'smoke'."""
  return problems.run(arg, kl=0.01, choices=lambda a: dict(
      advantage=base.choice('returns_to_go'), whiten=True, reduction=base.choice('token_mean'), estimator='k1',
      place='reward',
  ))
