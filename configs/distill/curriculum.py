"""A difficulty curriculum on annotations: problems that the teacher mostly solves first, the others move in.

Run: python -m experiments.train --config=configs/distill/curriculum.py \\
       --config.recipe.data.mix.easy.data.records=runs/annotations/annotations.jsonl \\
       --config.recipe.data.mix.hard.data.records=runs/annotations/annotations.jsonl --workdir=runs/curriculum
Hardware: two CPU cores, minutes. Difficulty is the share of right answers among a problem's annotations: annotate with
several samples. Left out: levels that advance by the student's own accuracy.
Reference: Bengio et al., Curriculum Learning, ICML 2009; Platanios et al., arXiv:1903.09848.
"""

from configs import base


def get_config(arg: str = ''):
  """arg: 'solved=0.75' (pass rate from which a problem is easy), 'smoke'."""
  a = base.parse_arg(arg, solved=0.75, smoke=False)
  steps = 4 if a.smoke else 300

  def part(*pass_rate):
    return base.data(records='runs/annotations/annotations.jsonl', target='completion', pass_rate=pass_rate)

  data = base.mix(
      easy=(dict(name='linear', start=1.0, end=0.5, steps=steps // 2), part(a.solved, 1.0)),
      hard=(dict(name='linear', start=0.0, end=0.5, steps=steps // 2), part(0.0, a.solved - 1e-6)),
  )
  return base.train(
      base.sft(data, base.batch(4 if a.smoke else 16, 256)),
      tokenizer='byte', model=base.model(embed_dim=64, num_layers=3, num_heads=4, mlp_dim=192),
      optimizer=base.optimizer(learning_rate=1e-3, matrix_learning_rate=0.005), num_steps=steps,
  )
