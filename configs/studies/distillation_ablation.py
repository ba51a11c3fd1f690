"""Logits matching against intermediate matching, off-policy and on-policy at matched prompts, for one task and seed.

Run: bash experiments/distillation_ablation/run.sh      (two tasks, five seeds, two cores; --smoke: two minutes)
Arms: SFT on the teacher's annotations; forward KL, reverse KL, Jensen-Shannon (beta 0.5), skew KL (alpha 0.1); FitNets,
cosine, MiniLMv2 without any term on logits; forward KL + cosine. Each distilled arm learns once on the annotations
(off-policy) and once on what the student writes for the same prompts (on-policy). One start, one number of steps, one
optimizer; annotations are not filtered, as a filter would take prompts from one side only.
Expected: experiments/distillation_ablation/README.md. A claim is, by the rule stated before the run,
  supported     where on every task the 95 % t interval of the difference over seeds is above 0 and pooled p < .05,
  contradicted  where on some task that interval is below 0 and pooled p < .05,
  inconclusive  else; the seeds (or problems) that would decide are printed.
CLAIMS 1 to 4 are the ablation's, the last two are S1.
"""

from configs import base
from configs.studies import teaching


LOGITS, HIDDEN = ('forward_kl', 'reverse_kl', 'jsd', 'skew'), ('fitnets', 'cosine', 'minilm')
_OFF, _ON = ([f'{name}_{where}' for name in LOGITS] for where in ('off', 'on'))
CLAIMS = (
    teaching.claim('Off-policy, logits teach more than SFT on the same annotations', _OFF, ['sft']),
    teaching.claim('Logits teach more on-policy than off-policy, at matched prompts', _ON, _OFF),
    teaching.claim('Off-policy, logits teach more than hidden states', _OFF, [f'{name}_off' for name in HIDDEN]),
    teaching.claim('Off-policy, cosine of hidden states adds to forward KL', ['logit_hidden_off'], ['forward_kl_off']),
    teaching.claim('S1: logits on-policy teach more than forward KL off-policy', _ON, ['forward_kl_off']),
    teaching.claim(
        'S1: on-policy, reverse KL leaves less entropy than forward KL', ['forward_kl_on'], ['reverse_kl_on'],
        what='entropy',
    ),
)


def losses():
  """{arm: loss}."""
  forward_kl, cosine = base.divergence('forward_kl'), base.hidden('cosine')
  return dict(
      forward_kl=base.loss(logits=forward_kl),
      reverse_kl=base.loss(logits=base.divergence('reverse_kl')),
      jsd=base.loss(logits=base.divergence('jensen_shannon', beta=0.5)),
      skew=base.loss(logits=base.divergence('skew_kl', alpha=0.1)),
      fitnets=base.loss(hidden=base.hidden('fitnets')),
      cosine=base.loss(hidden=cosine),
      minilm=base.loss(relations=base.relations(relation_heads=2)),
      logit_hidden=base.loss(logits=forward_kl, hidden=cosine),
  )


def get_config(arg: str = ''):
  """arg: 'task=rewriting,seed=2,size=smoke'."""

  def arms(s, data, rows):
    where = dict(records='{annotate}/annotations.jsonl', target='unfiltered_completion')
    sampled = base.rollouts(
        prompts=s.sampled, samples=1, length=s.row, max_new_tokens=s.new_tokens, temperature=s.temperature,
    )
    found = dict(sft=base.sft(data(**where), rows))
    for name, loss in losses().items():
      found[f'{name}_off'] = base.distill('{teacher}', data(**where), rows, loss)
      found[f'{name}_on'] = base.on_policy_distill('{teacher}', data(**where), sampled, loss)
    return found

  return teaching.line(base.parse_arg(arg, **teaching.DEFAULTS), arms, CLAIMS)
