"""Logit distillation of a student on a teacher's annotations; arg hidden=1.0 adds hidden-state matching.

Run: python -m experiments.train --config=configs/distill/logits.py --config.recipe.teacher=runs/teacher \\
       --config.recipe.data.records=runs/annotations/annotations.jsonl --workdir=runs/logits
Hardware: two CPU cores, minutes. Expected: the divergence falls below a tenth of its first value.
"""

from configs import base


def get_config(arg: str = ''):
  """arg: 'divergence=reverse_kl', 'hidden=1.0' (weight of the hidden-state term), 'smoke'."""
  a = base.parse_arg(arg, divergence='forward_kl', hidden=0.0, smoke=False)
  return base.train(
      base.distill(
          'runs/teacher', base.data(records='runs/annotations/annotations.jsonl', target='completion'),
          base.batch(4 if a.smoke else 16, 256), base.distillation(a.divergence, hidden_weight=a.hidden),
      ),
      tokenizer='byte', model=base.model(embed_dim=64, num_layers=3, num_heads=4, mlp_dim=192),
      optimizer=base.optimizer(learning_rate=1e-3, matrix_learning_rate=0.005), num_steps=4 if a.smoke else 300,
  )
