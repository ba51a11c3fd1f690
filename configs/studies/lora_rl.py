"""S10: does GRPO on low-rank adapters get as far as on all weights, in the same updates at ten times the rate?

Run: python -m experiments.reproduce --run=S10 --workdir=runs/S10      (a CPU core, 12 minutes; status: run)
Arms, from one start that SFT left on its way up: GRPO, 8 prompts in groups of 8, 160 updates of Adam, on all weights
at 3e-4 (the rate of S2 and S6b), or on LoRA of rank 2, 8 or 32 (alpha twice the rank, on all projections) at 3e-3.
Rates are those of the publications' rule, ten times, and were not tuned here.
Claims, on greedy accuracy over 1000 test problems: 1. rank 8 is within 5 points of all weights; 2. rank 2 is not better
than rank 8, by more than a point. Rule, stated before the run, over 5 paired seeds, 1 to 5, by the 95 % t interval over
seeds of the difference (rank 8 minus all weights; rank 8 minus rank 2):
  supported     1. it lies within -5 and +5 points; 2. it is above -1 point,
  contradicted  1. it lies beyond one of the two; 2. it is below -1 point,
  inconclusive  else.
Rank 32, and the pass rate over updates, are reported without a claim. Seen after the run: in 160 updates on 64 samples
all weights gain nothing over the start either, and rank 32 unlearns the task: ten times the rate is too much here.
Reference: Wang et al., Tina: Tiny Reasoning Models via LoRA, arXiv:2504.15777; Schulman et al., LoRA Without Regret,
2025, thinkingmachines.ai/blog/lora.
"""

from configs import base
from configs.studies import lines, one_start
from configs.studies.one_start import Arm

RANKS = dict(full=0, lora_2=2, lora_8=8, lora_32=32)  # 0: no adapters
RATE, TIMES = 3e-4, 10
_GROUPS = dict(full=dict(prompts=8, samples=8), smoke=dict(prompts=2, samples=2))
_STEPS = dict(full=160, smoke=2)


def get_config(arg: str = ''):
  """arg: 'seed=2,size=smoke'."""
  a = base.parse_arg(arg, **lines.DEFAULTS)
  steps = _STEPS[a.size]

  def arms(s, data, stages):
    del stages
    recipe = base.grpo(data(count=s.fresh, seed=a.seed * 1000 + 7), one_start.sampled(s, **_GROUPS[a.size]))
    return {name: Arm(recipe, steps, steps, RATE * TIMES if rank else RATE) for name, rank in RANKS.items()}

  made = one_start.line(a, arms)
  for name, rank in RANKS.items():
    made.stages[name].config.adapters = base.adapters(rank)
  return made
