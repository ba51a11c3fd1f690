"""Logit distillation from a cache, without the teacher: forward KL over its k likeliest tokens and one for the rest.

Run: python -m experiments.train --config=configs/distill/cached.py --config.recipe.cache=runs/cache \\
       --config.recipe.data.records=runs/annotations/annotations.jsonl --workdir=runs/cached
Hardware: two CPU cores, minutes. Expected: the curve of configs/distill/logits.py, in less time a step; the data must
be those of the cache, config.recipe.teacher is only checked against it where it is given.
"""

from configs import base


def get_config(arg: str = ''):
  """arg: 'divergence=reverse_kl', 'policy=renormalise', 'smoke'."""
  a = base.parse_arg(arg, divergence='forward_kl', policy='tail', smoke=False)
  return base.train(
      base.distill(
          '', base.data(records='runs/annotations/annotations.jsonl', target='completion'),
          base.batch(4 if a.smoke else 16, 256), base.loss(cached=base.top_k(a.divergence, policy=a.policy)),
          cache='runs/cache',
      ),
      tokenizer='byte', model=base.model(embed_dim=64, num_layers=3, num_heads=4, mlp_dim=192),
      optimizer=base.optimizer(learning_rate=1e-3, matrix_learning_rate=0.005), num_steps=4 if a.smoke else 300,
  )
