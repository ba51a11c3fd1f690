"""S3: what intermediate matching adds to cross-entropy and to logits on a small fixed set, for one task and seed.

Run: bash experiments/distillation_ablation/run.sh      (with the ablation, whose teacher and start it shares)
Arms, all on gold solutions of 400 problems: cross-entropy; cross-entropy + forward KL, + FitNets, + cosine,
+ MiniLMv2, + Patient KD on the last layers, + Patient KD on every other layer, + forward KL and cosine.
Expected: experiments/distillation_ablation/README.md. CLAIMS are judged by the rule of
configs/studies/distillation_ablation.py.
"""

from configs import base
from configs.studies import teaching


EVERY_LAYER = ('ce_fitnets', 'ce_cosine', 'ce_patient_skip')
CLAIMS = (
    teaching.claim('S3: logits add to cross-entropy on a small fixed set', ['ce_logits'], ['ce']),
    teaching.claim(
        'S3: hidden states at every layer raise linear CKA to the teacher by 0.1', EVERY_LAYER, ['ce'], what='cka',
        margin=0.1,
    ),
    teaching.claim('S3, no sign expected: cosine of hidden states adds to logits', ['ce_logits_cosine'], ['ce_logits']),
)


def losses(student_layers: int, teacher_layers: int):
  """{arm: loss} beside cross-entropy alone."""
  # The map 'skip' of two layers onto three is the map 'last'.
  every_other = tuple((l, teacher_layers - 1 - 2 * (student_layers - 1 - l)) for l in range(student_layers))
  label, forward_kl = base.term('cross_entropy', 1.0), base.divergence('forward_kl')
  terms = dict(
      ce_logits=dict(logits=forward_kl),
      ce_fitnets=dict(hidden=base.hidden('fitnets')),
      ce_cosine=dict(hidden=base.hidden('cosine')),
      ce_minilm=dict(relations=base.relations(relation_heads=2)),
      ce_patient_last=dict(hidden=base.hidden('patient', layers='last')),
      ce_patient_skip=dict(hidden=base.hidden('patient', layers=every_other)),
      ce_logits_cosine=dict(logits=forward_kl, hidden=base.hidden('cosine')),
  )
  return {arm: base.loss(cross_entropy=label, **own) for arm, own in terms.items()}


def get_config(arg: str = ''):
  """arg: 'task=rewriting,seed=2,size=smoke'."""

  def arms(s, data, rows):
    gold = data(count=s.fixed, seed=a.seed * 1000 + 7)
    made = losses(s.student.num_layers, s.teacher.num_layers)
    return dict(ce=base.sft(gold, rows), **{arm: base.distill('{teacher}', gold, rows, made[arm]) for arm in made})

  a = base.parse_arg(arg, **teaching.DEFAULTS)
  return teaching.line(a, arms, CLAIMS)
