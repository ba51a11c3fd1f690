"""Learning from preferences: a right against a wrong completion of a problem, from annotations or sampled on the way.

Run: python -m experiments.train --config=configs/rl/preference.py:loss=dpo --config.init_from=runs/sft \\
       --config.recipe.reference=runs/sft --workdir=runs/dpo
It reads runs/annotations/annotations.jsonl, or records=FILE; with 'online' the student samples and the task's verifier
says what is better.
Losses: dpo, ipo and kto compare with the reference, simpo and orpo with none (leave out --config.recipe.reference).
Hardware: two CPU cores, minutes. Expected of dpo on 3200 annotations by the student itself, 18 % of them right: in 50
steps the margin rises from 0.00 to 0.77 and the accuracy from 0.49 to 0.86 (both on the pairs about to be learnt).
Online, 50 steps of that student, of whose groups a third had a difference, raised neither margin nor reward.
"""

from configs import base
from srm_jax.losses.preference import REFERENCED


def get_config(arg: str = ''):
  """arg: 'loss=kto', 'online', 'records=FILE', 'smoke'."""
  a = base.parse_arg(arg, loss='dpo', online=False, records='runs/annotations/annotations.jsonl', smoke=False)
  if a.online:
    data, batch = base.data(count=50 if a.smoke else 4000, seed=3), None
    rollouts = base.rollouts(
        prompts=2 if a.smoke else 16, samples=2 if a.smoke else 8, length=256, max_new_tokens=16 if a.smoke else 128,
    )
  else:
    data, rollouts = base.data(records=a.records, target='unfiltered_completion'), None
    batch = base.batch(4 if a.smoke else 32, 256, 'one_per_row')
  return base.train(
      base.preference(
          data, loss=a.loss, batch=batch, rollouts=rollouts, reference='runs/sft' if a.loss in REFERENCED else '',
      ),
      tokenizer='byte', model=base.model(embed_dim=64, num_layers=3, num_heads=4, mlp_dim=192), init_from='runs/sft',
      optimizer=base.optimizer('adamw', learning_rate=3e-4, schedule='constant', weight_decay=0.0),
      num_steps=2 if a.smoke else 50,
  )
