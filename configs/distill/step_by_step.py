"""Distilling step by step: a student learns to answer and to explain, two tasks told apart by a word before the prompt.

  loss = L_answer + weight * L_rationale,  each the mean over its own tokens

Run: python -m experiments.train --config=configs/distill/step_by_step.py \\
       --config.recipe.data.mix.rationale.data.records=runs/annotations/annotations.jsonl \\
       --config.recipe.data.mix.answer.data.records=runs/annotations/annotations.jsonl --workdir=runs/step_by_step
Hardware: two CPU cores, minutes. Ask the trained model with --config.data.prompt.preface='[answer] ' (short) or
'[rationale] ' (long). Left out: T5's encoder; the sentence 'The answer is'.
Reference: Hsieh et al., arXiv:2305.02301.
"""

from configs import base


def get_config(arg: str = ''):
  """arg: 'weight=0.5', 'count=2000', 'smoke'."""
  a = base.parse_arg(arg, weight=1.0, count=4000, smoke=False)

  def part(target):
    where = {} if a.smoke else dict(records='runs/annotations/annotations.jsonl')
    return 1.0, base.data(count=50, target=target, prompting=base.prompt(preface=f'[{target}] '), **where)

  data = base.mix(100 if a.smoke else a.count, answer=part('answer'), rationale=part('rationale'))
  loss = base.loss(
      answer=base.term('cross_entropy', 1.0, rows='answer'),
      rationale=base.term('cross_entropy', a.weight, rows='rationale'),
  )
  return base.train(
      base.distill('', data, base.batch(4 if a.smoke else 16, 256), loss),
      tokenizer='byte', model=base.model(embed_dim=64, num_layers=3, num_heads=4, mlp_dim=192),
      optimizer=base.optimizer(learning_rate=1e-3, matrix_learning_rate=0.005), num_steps=4 if a.smoke else 300,
  )
