"""S5-ii: does GRPO's division by the length of a completion make wrong answers longer, where Dr. GRPO does not?

Run: python -m experiments.reproduce --run=S5 --workdir=runs/S5      (a CPU core, 14 minutes; status: run)
The start has learnt to guess whether a sum of five digits is odd, to work it out behind the guess, and to write 1 to 17
points where the guess was right and question marks where it was wrong (srm_jax/tasks/guesses.py). The number of marks
is independent of everything in what it learnt. So the filler comes after an observable error, and the answer before it:
no length can help or harm it. Guesses stay right on about a half, as no arm learns the parity of five digits here.
Arms, 48 turns of 12 prompts in groups of 8 at temperature 1: `grpo`; `dr_grpo`, advantages without the deviation and
one constant in the place of lengths; `token_mean`, DAPO's reduction alone; `gspo`, in four minibatches. The mean
lengths are those of what is sampled to learn from; a slope is of their line over turns, by least squares.
Adam's rate is the same for all: at 5e-4 a hundredth of GRPO's completions met the limit in the end (development seed
902), at 1e-3 a half (seed 901, 60 turns of 16 prompts). The task was chosen on these seeds too. Before it, chains of
five sums of which half had slipped, with the fillers behind them, were tried: their errors are gone after some 30 turns
(pass rate 0.55 to 0.9), and wrong and right answers did not drift apart.
Claims: 1. the mean length of wrong answers rises faster under GRPO than under Dr. GRPO; 2. so does the gap, of wrong
minus of right ones; 3. and 4. accuracies (one answer at temperature 1 to each of 4000 test problems) of the two are
within 2 points, from below and from above. Rule, stated before the run, over 5 paired seeds, on the difference:
  supported     its 95 % t interval over seeds is above 0 (of claims 3 and 4: above -2 points),
  contradicted  that interval is below it,
  inconclusive  else.
token_mean and gspo are reported without a claim. Seen after the run, and no ground to leave it out: the start of seed 4
has not learnt the sums (10 % of its chains are right, of the others 89 to 96 %) and marks its guesses at random (50 %;
the others are right on 93 to 97 %). There no error can be observed, and GRPO moves no length, as its gradient says.
Reference: Liu et al., Understanding R1-Zero-Like Training: A Critical Perspective, arXiv:2503.20783. The exact gradient
is tested in tests/losses/advantages_test.py.
"""

from configs import base
from configs.studies import lines, one_start
from configs.studies.one_start import Arm

TASK = 'running_sums_guessed'
_GROUPS = dict(full=dict(prompts=12, samples=8), smoke=dict(prompts=2, samples=4))
_TURNS = dict(full=48, smoke=2)
_RATE = 5e-4
_SIZES = dict(row=48, new_tokens=38, length=128)  # room for 9 marks beyond what the start has seen
_CHANGED = dict(
    full=_SIZES | dict(gold=6000, fresh=8000, test=4000, steps=dict(teacher=0, base=320), start_rate=0.02),
    smoke=_SIZES | dict(steps=dict(teacher=0, base=2)),
)


def choices(limit: int):
  """{arm: what it has of its own}; the rest is GRPO's."""
  return dict(
      grpo={},
      dr_grpo=dict(advantage=base.choice('centered'), reduction=base.choice('fixed_length', max_length=limit)),
      token_mean=dict(reduction=base.choice('token_mean')),
      gspo=dict(surrogate=base.choice('gspo', clip_low=3e-4, clip_high=4e-4), minibatches=4),
  )


def get_config(arg: str = ''):
  """arg: 'seed=2,size=smoke'."""
  a = base.parse_arg(arg, **lines.DEFAULTS)

  def arms(s, data, stages):
    del stages
    fresh, rollouts = data(count=s.fresh, seed=a.seed * 1000 + 7), one_start.sampled(s, **_GROUPS[a.size])
    found = {}
    for name, own in choices(s.new_tokens).items():
      recipe = base.policy_gradient(fresh, rollouts, **own)
      steps = _TURNS[a.size] * recipe.updates.minibatches
      found[name] = Arm(recipe, steps, steps, _RATE)
    return found

  sampled = dict(sampled=base.strategy(temperature=1.0))
  return one_start.line(a, arms, task=TASK, rows_of_tests=sampled, **_CHANGED[a.size])
