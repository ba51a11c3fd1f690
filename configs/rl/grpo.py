"""GRPO with the task's verifier as reward; every choice of the algorithm is a field of config.recipe.

Run: python -m experiments.train --config=configs/rl/grpo.py --config.init_from=runs/logits --workdir=runs/grpo
Hardware: two CPU cores, minutes. Expected: the reward rises by several points in 50 steps from a student at 30 to 70 %.
Dr. GRPO: --config.recipe.advantage.name=centered --config.recipe.advantage.options='{}' and reduction fixed_length.
"""

from configs import base


def get_config(arg: str = ''):
  """arg: 'kl=0.04,reference=runs/logits' adds a k3 penalty to a reference policy, 'smoke'."""
  a = base.parse_arg(arg, kl=0.0, reference='', smoke=False)
  return base.train(
      base.grpo(
          base.data(count=50 if a.smoke else 4000, seed=3),
          base.rollouts(
              prompts=2 if a.smoke else 32, samples=2 if a.smoke else 8, length=256,
              max_new_tokens=16 if a.smoke else 128,
          ),
          kl=a.kl, reference=a.reference,
      ),
      tokenizer='byte', model=base.model(embed_dim=64, num_layers=3, num_heads=4, mlp_dim=192), init_from='runs/logits',
      optimizer=base.optimizer('adamw', learning_rate=3e-4, schedule='constant', weight_decay=0.0),
      num_steps=2 if a.smoke else 50,
  )
