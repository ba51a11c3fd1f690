"""Domains in shares that follow the student (DDK): more rows where its perplexity is further above the teacher's.

Run: python -m experiments.train --config=configs/distill/adaptive.py --config.recipe.teacher=runs/teacher \\
       --workdir=runs/adaptive
Hardware: two CPU cores, minutes. Left out: averaging over measurements.
Reference: Liu et al., DDK, arXiv:2407.16154.
"""

from configs import base


def get_config(arg: str = ''):
  """arg: 'every=50', 'smoothing=0.5', 'smoke'."""
  a = base.parse_arg(arg, every=50, smoothing=0.5, smoke=False)
  count = 40 if a.smoke else 2000
  data = base.mix(
      arithmetic=(1.0, base.data('arithmetic_mix', count=count)), worded=(1.0, base.data('worded_mix', count=count)),
  )
  return base.train(
      base.distill(
          'runs/teacher', data, base.batch(4 if a.smoke else 16, 256), base.distillation(),
          adaptive=base.adaptive(every=2 if a.smoke else a.every, held_out=4 if a.smoke else 64, smoothing=a.smoothing),
      ),
      tokenizer='byte', model=base.model(embed_dim=64, num_layers=3, num_heads=4, mlp_dim=192),
      optimizer=base.optimizer(learning_rate=1e-3, matrix_learning_rate=0.005), num_steps=4 if a.smoke else 300,
  )
