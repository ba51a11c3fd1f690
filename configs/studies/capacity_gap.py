"""S1b: does reverse KL seek a mode where the student is smaller than the teacher? A teacher of two ways.

Run: python -m experiments.reproduce --run=S1b --workdir=runs/S1b      (a CPU core, 14 minutes; status: run)
The teacher learns running sums worked forward or backward (srm_jax/tasks/running_sums.py), as a coin of each problem
falls, which nobody can foresee: at the first token it has two ways to go on. Its student has half of its width and has
begun to write chains, forward ones first, when the arms start.
Arms: `forward_off`, forward KL on what the teacher wrote; `forward_on` and `reverse_on`, forward and reverse KL on what
the student writes; `minillm_on`, reverse KL of whole completions (MiniLLM: what later tokens earn as an advantage, the
single step over the vocabulary). Of 800 samples at temperature 1: share of each way (by its first digit), its entropy
in bits, and the share of texts that are neither chain throughout (invalid), and that have digits of both (mixed).
Claims: 1. reverse_on has a lower share of invalid texts than forward_on; 2. reverse_on has a lower entropy of ways than
forward_on; 3. and 4. the same of minillm_on against forward_off, each divergence on its own samples.
Rule, stated before the run, over 5 paired seeds (3 where time forces it):
  supported     the 95 % t interval of the difference over seeds is below 0,
  contradicted  that interval is above 0,
  inconclusive  else; the seeds that would decide are printed.
Reference: Gu et al., MiniLLM, arXiv:2306.08543.
"""

from configs import base
from configs.studies import lines, one_start
from configs.studies.one_start import Arm

# Sums of four digits: of six, 900 steps teach this teacher the forward way alone. There are 800 test problems of them.
_CHANGED = dict(full=dict(
    teacher_problems=6000, gold=6000, test=800, steps=dict(teacher=1600, base=900), start_rate=0.02,
    student=dict(embed_dim=32, num_layers=2, num_heads=2, mlp_dim=96),
), smoke={})
_STEPS = dict(full=(120, 120), smoke=(2, 2))
_PROMPTS = dict(full=64, smoke=4)
_RATE = 1e-3


def losses():
  """{arm on samples of the student: loss}."""
  reverse = base.divergence('reverse_kl')
  return dict(
      forward_on=base.loss(forward_kl=base.divergence('forward_kl')),
      reverse_on=base.loss(reverse_kl=reverse),
      minillm_on=base.loss(policy=base.policy('minillm'), reverse_kl=reverse),
  )


def get_config(arg: str = ''):
  """arg: 'seed=2,size=smoke'."""
  a = base.parse_arg(arg, **lines.DEFAULTS)

  def arms(s, data, stages):
    fresh = data(count=s.fresh // 4, seed=a.seed * 1000 + 7)
    how = base.sampling(max_new_tokens=s.new_tokens, seed=a.seed * 1000 + 4)
    annotated = base.annotate('{teacher}', fresh, how, batch_size=s.decode_rows, chunk=s.fresh)
    stages['annotate'] = dict(run='annotate', config=annotated)
    written = data(records='{annotate}/annotations.jsonl', target='unfiltered_completion')
    off = base.distill('{teacher}', written, base.batch(s.rows, s.length), losses()['forward_on'])
    rollouts = one_start.sampled(s, prompts=_PROMPTS[a.size], samples=1)
    on = {name: base.on_policy_distill('{teacher}', written, rollouts, loss) for name, loss in losses().items()}
    return {name: Arm(recipe, *_STEPS[a.size], _RATE) for name, recipe in (dict(forward_off=off) | on).items()}

  rows = dict(greedy=base.strategy(), sampled=base.strategy(temperature=1.0))
  return one_start.line(a, arms, task='running_sums_either_way', rows_of_tests=rows, **_CHANGED.get(a.size, {}))
