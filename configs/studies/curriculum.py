"""S11: does GRPO get further on the hardest problems when it comes to them from easy ones, level by level?

Run: python -m experiments.reproduce --run=S11 --workdir=runs/S11      (a CPU core, 9 minutes; status: run)
Running sums of 2 to 8 digits, as many of each (srm_jax/tasks/levels.py). Arms, from one start that SFT left on its way
up on all levels: GRPO, 8 prompts in groups of 8, 240 updates of Adam at 3e-4 (the rate of S2 and S6b), on problems in
the order `uniform`, all levels alike; or `levels`, those up to a level that rises when 70 % of the last 64 completions
of its hardest problems are right. Greedy accuracy on 1000 test problems of each number of digits; there are 8 of two
digits and 80 of three, which count more than once.
By development seed 901: the start, of 8000 problems and 400 steps, whose samples are right on 39 % over all levels.
After 200 to 280 steps, on 2000 or 8000, starts were right on 5 to 13 % of 8 digits, which is chance, and no order that
was tried left it in 240 updates. Rate, updates and window were not tuned.
Claim: at 8 digits `levels` is at least 5 points above `uniform`. Rule, stated before the run, over 5 paired seeds, 1 to
5, by the 95 % t interval over seeds of the difference:
  supported     it is above 5 points,
  contradicted  it is below 5 points,
  inconclusive  else; the seeds that would decide are printed.
Accuracy at other levels is reported without a claim. Seen after the run: three starts were nearly right at 8 digits
already, two were at chance there, so that neither order had much to win.
Reference: Bengio et al., Curriculum Learning, 2009; Stojanovski et al., Reasoning Gym, arXiv:2505.24760.
"""

from ml_collections import ConfigDict

from configs import base
from configs.studies import lines, one_start
from srm_jax import schema

TASK = 'running_sums_2_to_8'
ORDERS = dict(uniform=dict(), levels=dict(advance=0.7, window=64))
FULL = dict(
    rows=24, length=112, row=34, new_tokens=18, decode_rows=512, gold=8000, fresh=20_000, test=7000, log_every=10,
    model=dict(embed_dim=64, num_layers=2, num_heads=4, mlp_dim=192), prompts=8, samples=8, rate=3e-4,
    steps=dict(base=400, rl=240),
)
SMOKE = FULL | dict(
    rows=4, decode_rows=32, gold=100, fresh=64, test=28, log_every=1, prompts=2, samples=2,
    model=dict(embed_dim=16, num_layers=1, num_heads=2, mlp_dim=32), steps=dict(base=2, rl=2),
)


def get_config(arg: str = ''):
  """arg: 'seed=2,size=smoke'."""
  a = base.parse_arg(arg, **lines.DEFAULTS)
  s, seed, stages = ConfigDict(schema.choose('size', a.size, dict(full=FULL, smoke=SMOKE))), a.seed * 1000, {}

  def training(name, recipe, run_seed, steps, optimizer, **options):
    stages[name] = dict(run='train', config=base.train(
        recipe, tokenizer='byte', model=base.model(**s.model, max_length=s.length), num_steps=steps,
        optimizer=base.optimizer(**optimizer), seed=run_seed, log_every=s.log_every, checkpoint_every=0, **options,
    ))

  gold = base.sft(base.data(TASK, count=s.gold, seed=seed + 1), base.batch(s.rows, s.length))
  start = one_start.START | dict(matrix_learning_rate=one_start.FULL['start_rate'])
  training('base', gold, seed + 5, s.steps.base, start)
  fresh, adam = base.data(TASK, count=s.fresh, seed=seed + 7), one_start.ADAM | dict(learning_rate=s.rate)
  for order, options in ORDERS.items():
    asked = base.rollouts(
        prompts=s.prompts, samples=s.samples, length=s.row, max_new_tokens=s.new_tokens, order=order,
        order_options=options,
    )
    training(order, base.grpo(fresh, asked), seed + 6, s.steps.rl, adam, init_from='{base}')
  return lines.line(a, s, stages, ('base', *ORDERS), task=TASK, seed=seed, arms=tuple(ORDERS))
