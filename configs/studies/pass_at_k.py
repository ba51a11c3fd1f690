"""S6b: does RL bring new answers within reach, or the first answer nearer to what many samples hold already?

Run: python -m experiments.reproduce --run=S6b --workdir=runs/S6b      (a CPU core, 12 minutes; status: run)
One arm: GRPO, 16 prompts in groups of 8, 480 updates of Adam at 3e-4 (the rate of S2), from a start that SFT left on
its way up. Start and end answer 300 test problems 256 times each at temperature 1; pass@k is the unbiased estimate,
maj@k the share of problems whose most frequent answer among k is right.
Claims: 1. pass@1 rises; 2. pass@256 gains less than a third of what pass@1 gains. Rule, stated before the first run,
over 5 paired seeds, 1 to 5, on the difference (of claim 2: a third of the gain in pass@1 minus that in pass@256):
  supported     its 95 % t interval over seeds is above 0,
  contradicted  that interval is below 0,
  inconclusive  else.
maj@k, and pass@k between 1 and 256, are reported without a claim.
Reference: Shao et al., DeepSeekMath, figure 7, arXiv:2402.03300; Yue et al., Does Reinforcement Learning Really
Incentivize Reasoning Capacity in LLMs Beyond the Base Model?, arXiv:2504.13837.
"""

from configs import base
from configs.studies import lines, one_start
from configs.studies.one_start import Arm

_GROUPS = dict(full=dict(prompts=16, samples=8), smoke=dict(prompts=2, samples=2))
_STEPS = dict(full=480, smoke=2)
_ASKED = dict(full=dict(problems=300, samples=256), smoke=dict(problems=4, samples=256))


def get_config(arg: str = ''):
  """arg: 'seed=2,size=smoke'."""
  a = base.parse_arg(arg, **lines.DEFAULTS)
  asked, steps = _ASKED[a.size], _STEPS[a.size]

  def arms(s, data, stages):
    del stages
    fresh = data(count=s.fresh, seed=a.seed * 1000 + 7)
    return dict(grpo=Arm(base.grpo(fresh, one_start.sampled(s, **_GROUPS[a.size])), steps, steps, 3e-4))

  made = one_start.line(a, arms)
  made.measure.update(
      data=base.data('running_sums', 'test', count=asked['problems'], seed=lines.TEST), samples=asked['samples'],
  )
  return made
