"""S2b: what one prompt teaches, asked again and again: on-policy distillation against GRPO, on held-out problems.

Run: python -m experiments.reproduce --run=S2b --workdir=runs/S2b      (a CPU core, 7 minutes; status: run)
Arms: 1 or 8 prompts with 256 samples a step in all, 20 steps, temperature 1; `opd`, the reverse KL to the teacher over
the whole vocabulary, or `grpo`, the task's reward in groups of 256 or 32. Start, optimizer and prompts are the same.
Claims, on greedy accuracy over 1000 test problems: 1. with 1 prompt opd is above GRPO; 2. with 8 prompts opd is above
GRPO. Rule, stated before the run, over 5 paired seeds (3 where time forces it):
  supported     the 95 % t interval of the difference over seeds is above 0, and p < .05 pooled over problems,
  contradicted  that interval is below 0, and p < .05,
  inconclusive  else; the seeds (or problems) that would decide are printed.
That both learn (are above the start) is reported, with no claim.
Reference: Lu et al., On-Policy Distillation, 2025, thinkingmachines.ai/blog/on-policy-distillation.
"""

from configs import base
from configs.studies import lines, one_start
from configs.studies.one_start import Arm

_SAMPLES = dict(full=256, smoke=16)
_STEPS = dict(full=(20, 4), smoke=(2, 1))
# Of 3e-5, 1e-4, 3e-4 and 1e-3 on development seed 901: below it hardly anything moves, above it all is lost.
_RATE = 3e-4


def get_config(arg: str = ''):
  """arg: 'seed=2,size=smoke'."""
  a = base.parse_arg(arg, **lines.DEFAULTS)

  def arms(s, data, stages):
    del stages
    found, loss = {}, base.loss(reverse_kl=base.divergence('reverse_kl'))
    for prompts in (1, 8):
      asked = data(count=prompts, seed=a.seed * 1000 + 8)
      rollouts = one_start.sampled(s, prompts=prompts, samples=_SAMPLES[a.size] // prompts)
      recipes = dict(opd=base.on_policy_distill('{teacher}', asked, rollouts, loss), grpo=base.grpo(asked, rollouts))
      found |= {f'{name}_{prompts}': Arm(recipe, *_STEPS[a.size], _RATE) for name, recipe in recipes.items()}
    return found

  return one_start.line(a, arms)
