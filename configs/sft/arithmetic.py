"""Supervised fine-tuning of a one-million-parameter transformer from scratch, on arithmetic with worked rationales.

Run: python -m experiments.train --config=configs/sft/arithmetic.py --workdir=runs/teacher
Hardware: two CPU cores, about ten minutes. Expected: token accuracy above 0.9 at the end.
"""

from configs import base


def get_config(arg: str = ''):
  """arg: 'smoke' shrinks it to seconds."""
  a = base.parse_arg(arg, smoke=False)
  return base.train(
      base.sft(base.data(count=100 if a.smoke else 20_000), base.batch(4 if a.smoke else 16, 256)),
      tokenizer='byte', model=base.model(embed_dim=128, num_layers=4, num_heads=4, mlp_dim=384),
      optimizer=base.optimizer(), num_steps=4 if a.smoke else 600,
  )
