"""Several teachers: every domain is taught by its own (mixed=0), or all by a weighted mixture of all.

  p(. | x) = sum_k w_k(domain) p_k(. | x) / sum_k w_k(domain)

Run: python -m experiments.train --config=configs/distill/several_teachers.py \\
       --config.recipe.teacher.arithmetic.folder=runs/a --config.recipe.teacher.worded.folder=runs/b --workdir=runs/both
Hardware: two CPU cores, minutes. All teachers run on all rows, whatever their weights.
Reference: Liu et al., FuseLLM, arXiv:2401.10491; Tian et al., TinyLLM, arXiv:2402.04616.
"""

from configs import base

DOMAINS = dict(arithmetic='arithmetic_mix', worded='worded_mix')


def get_config(arg: str = ''):
  """arg: 'mixed=0.25' (weight of the teachers of other domains), 'smoke'."""
  a = base.parse_arg(arg, mixed=0.0, smoke=False)
  count = 40 if a.smoke else 2000
  data = base.mix(2 * count, **{name: (1.0, base.data(task, count=count)) for name, task in DOMAINS.items()})
  teachers = {
      name: dict(folder=f'runs/{name}', weight={domain: 1.0 if domain == name else a.mixed for domain in DOMAINS})
      for name in DOMAINS
  }
  return base.train(
      base.distill(teachers, data, base.batch(4 if a.smoke else 16, 256), base.distillation()),
      tokenizer='byte', model=base.model(embed_dim=64, num_layers=3, num_heads=4, mlp_dim=192),
      optimizer=base.optimizer(learning_rate=1e-3, matrix_learning_rate=0.005), num_steps=4 if a.smoke else 300,
  )
