"""Held-out accuracy of a model: direct, greedy chain of thought, one sample, and majority of eight.

Run: python -m experiments.evaluate --config=configs/evaluate/arithmetic.py --config.model=runs/sft \\
       --workdir=runs/evaluation
Hardware: two CPU cores, two minutes. Expected: a row a strategy with a 95 % interval over problems. A scorer, such as
a reward model, adds best of eight and the weighted vote: arithmetic.py:scorer=runs/process,score=min
"""

from configs import base


def get_config(arg: str = ''):
  """arg: 'task=gsm8k,split=test,count=1000', 'scorer=runs/outcome', 'smoke'."""
  a = base.parse_arg(arg, task='arithmetic_mix', split='test', count=1000, scorer='', score='mean', smoke=False)
  rows = dict(
      direct=base.strategy('direct'), greedy=base.strategy(), sample=base.strategy(temperature=1.0),
      majority=base.strategy('self_consistency', samples=8, temperature=1.0),
  )
  if a.scorer:
    rows |= {name: base.strategy(name, samples=8, temperature=1.0) for name in ('best_of_n', 'weighted_vote')}
  data = base.data(a.task, a.split, count=4 if a.smoke else a.count, seed=9)
  return base.evaluate('runs/sft', data, rows, scorer=a.scorer, score=a.score, max_new_tokens=128)
