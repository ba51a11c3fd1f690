"""On-policy distillation: the student samples, the teacher's distribution corrects every token it visited.

Run: python -m experiments.train --config=configs/distill/on_policy.py --config.recipe.teacher=runs/teacher \\
       --config.init_from=runs/sft --workdir=runs/on_policy
Hardware: two CPU cores, minutes. Expected: the reward (share of right samples) rises from the start.
"""

from configs import base


def get_config(arg: str = ''):
  """arg: 'divergence=forward_kl', 'smoke'."""
  a = base.parse_arg(arg, divergence='reverse_kl', smoke=False)
  return base.train(
      base.on_policy_distill(
          'runs/teacher', base.data(count=50 if a.smoke else 2000, seed=2),
          base.rollouts(prompts=4 if a.smoke else 64, samples=1, length=256, max_new_tokens=16 if a.smoke else 128),
          base.distillation(a.divergence),
      ),
      tokenizer='byte', model=base.model(embed_dim=64, num_layers=3, num_heads=4, mlp_dim=192), init_from='runs/sft',
      optimizer=base.optimizer(learning_rate=1e-3, matrix_learning_rate=0.005), num_steps=2 if a.smoke else 200,
  )
