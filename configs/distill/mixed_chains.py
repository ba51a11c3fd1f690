"""Mix distillation: long and short chains of thought, or those of a large and a small teacher, in an exact ratio.

Run: python -m experiments.train --config=configs/distill/mixed_chains.py \\
       --config.recipe.data.mix.long.data.records=runs/long/annotations.jsonl \\
       --config.recipe.data.mix.short.data.records=runs/short/annotations.jsonl --workdir=runs/mixed
Hardware: two CPU cores, minutes. The ratio is of examples, not of tokens.
Reference: Li et al., Small Models Struggle to Learn from Strong Reasoners, arXiv:2502.12143 (long : short = 1 : 4).
"""

from configs import base


def get_config(arg: str = ''):
  """arg: 'long=0.2' (share), 'count=2000', 'smoke'."""
  a = base.parse_arg(arg, long=0.2, count=2000, smoke=False)

  def part(name):
    return base.data(records=f'runs/{name}/annotations.jsonl', target='completion')

  data = base.mix(40 if a.smoke else a.count, long=(a.long, part('long')), short=(1 - a.long, part('short')))
  return base.train(
      base.sft(data, base.batch(4 if a.smoke else 16, 256)),
      tokenizer='byte', model=base.model(embed_dim=64, num_layers=3, num_heads=4, mlp_dim=192),
      optimizer=base.optimizer(learning_rate=1e-3, matrix_learning_rate=0.005), num_steps=4 if a.smoke else 300,
  )
