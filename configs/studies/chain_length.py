"""S7: do small students learn better from short chains, larger ones from long chains, and does a mix help?

Run: python -m experiments.reproduce --run=S7 --workdir=runs/S7        (a CPU core, 20 minutes; status: run)
Short chains are partial sums; long ones undo and repeat every step, and one step in ten is wrong at first and corrected
(srm_jax/tasks/chains.py): some four times as long. 1000 problems, the same for all; students of three sizes start from
scratch. Arms of a size: `long`; `short`, as many epochs as long; `short_more`, as many tokens as long; `mix_20` and
`mix_50`, that share of the examples long, as many tokens as long. Greedy accuracy on 1000 test problems.
Claims, the gap being long minus short: at equal epochs 1. it is below 0 for the smallest student, 2. its rank
correlation with size is above .8; at equal tokens 3. and 4. the same; 5. mix_20, averaged over sizes, is no more than a
point below the better of long and short_more. Rule, stated before the run, over 3 paired seeds (time forces it):
  supported     the 95 % t interval over seeds is above 0 (1, 3: of short minus long, and p < .05 pooled over problems),
                above .8 (2, 4), above -1 point (5),
  contradicted  that interval is below it (1, 3: and p < .05),
  inconclusive  else; the seeds (or problems) that would decide are printed.
Reference: Li et al., Small Models Struggle to Learn from Strong Reasoners, arXiv:2502.12143.
"""

from ml_collections import ConfigDict

from configs import base
from configs.studies import lines
from srm_jax import schema

SIZES = dict(
    w16=dict(embed_dim=16, num_layers=1, num_heads=1, mlp_dim=48),
    w32=dict(embed_dim=32, num_layers=2, num_heads=2, mlp_dim=96),
    w64=dict(embed_dim=64, num_layers=2, num_heads=4, mlp_dim=192),
)
# Of 1000 problems, texts with short chains have 0.417 times the tokens of those with long ones: as many epochs.
FULL = dict(problems=1000, rows=16, length=192, new_tokens=160, decode_rows=512, test=1000, steps=300, short_steps=125)
SMOKE = FULL | dict(problems=40, rows=2, test=16, decode_rows=16, new_tokens=32, steps=2, short_steps=2)


def get_config(arg: str = ''):
  """arg: 'seed=2,size=smoke'."""
  a = base.parse_arg(arg, **lines.DEFAULTS)
  s, seed, stages = ConfigDict(schema.choose('size', a.size, dict(full=FULL, smoke=SMOKE))), a.seed * 1000, {}
  chains = {name: base.data(task, count=s.problems, seed=seed + 1) for name, task in (
      ('short', 'sums'), ('long', 'sums_checked'),
  )}
  mix = lambda share: base.mix(
      s.problems, seed=seed + 2, short=(1 - share, chains['short']), long=(share, chains['long'])
  )
  arms = dict(
      long=(chains['long'], s.steps), short=(chains['short'], s.short_steps), short_more=(chains['short'], s.steps),
      mix_20=(mix(0.2), s.steps), mix_50=(mix(0.5), s.steps),
  )
  for size, shape in SIZES.items():
    for arm, (data, steps) in arms.items():
      name = f'{size}_{arm}'
      stages[name] = dict(run='train', config=base.train(
          base.sft(data, base.batch(s.rows, s.length)), tokenizer='byte', seed=seed + 3, num_steps=steps,
          model=base.model(**shape, max_length=s.length), optimizer=base.optimizer(**lines.MUON),
      ))
  return lines.line(a, s, stages, tuple(stages), task='sums', arms=tuple(stages))
