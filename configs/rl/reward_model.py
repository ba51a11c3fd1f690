"""A reward model: of completions by pairs of right and wrong ones, or of steps by Monte-Carlo labels.

Run: python -m experiments.train --config=configs/rl/reward_model.py --config.init_from=runs/sft --workdir=runs/outcome
  or ... --config=configs/rl/reward_model.py:process --workdir=runs/process, after experiments.process_labels.
Hardware: two CPU cores, minutes. Expected: `accuracy` of pairs (or steps) well above one half. Then
  python -m experiments.evaluate --config=configs/evaluate/arithmetic.py:scorer=runs/process,score=min
"""

from configs import base

RECORDS = {'outcome': 'runs/annotations/annotations.jsonl', 'process': 'runs/steps/steps.jsonl'}


def get_config(arg: str = ''):
  """arg: 'outcome' (the default), 'process', 'smoke'; 'task=gsm8k'."""
  a = base.parse_arg(arg, outcome=False, process=False, task='arithmetic_mix', smoke=False)
  target = 'process' if a.process else 'outcome'
  return base.train(
      base.reward_model(
          base.data(a.task, records=RECORDS[target], target='unfiltered_completion'),
          base.batch(4 if a.smoke else 32, 256, 'one_per_row' if target == 'outcome' else 'plan'), target=target,
      ),
      tokenizer='byte', model=base.model(embed_dim=64, num_layers=3, num_heads=4, mlp_dim=192), init_from='runs/sft',
      optimizer=base.optimizer('adamw', learning_rate=3e-4), num_steps=4 if a.smoke else 300,
  )
