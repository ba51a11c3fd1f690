"""The distillation ablation with published models: Qwen2.5-1.5B-Instruct into 0.5B on GSM8K, one arm a run.

Run: python -m experiments.train --workdir=runs/forward_kl_on \\
       --config=configs/distill/published_ablation.py:arm=forward_kl_on,teacher=DIR,student=DIR
Plan: python -m experiments.plan --config=configs/distill/published_ablation.py:arm=forward_kl_on --topology=v5e:4x4
Hardware: 16 TPU v5e chips. Status: compiled for v5e:4x4; with models of two layers each arm takes its steps on a CPU.
Arms: sft, and each loss of configs/studies/distillation_ablation.py with _off (on annotations, which
experiments.annotate writes) or _on (on what the student samples).
A preset's name in the place of DIR has the shape alone, for plan.
"""

from configs import base
from configs.studies.distillation_ablation import losses
from srm_jax.models.families import PRESETS

ARMS = ('sft', *(f'{name}_{where}' for name in losses() for where in ('off', 'on')))


def get_config(arg: str = ''):
  """arg: 'arm=minilm_off', 'teacher=DIR,student=DIR,records=FILE', 'format=plain', 'smoke'."""
  a = base.parse_arg(
      arg, arm='forward_kl_on', teacher='qwen2.5-1.5b', student='qwen2.5-0.5b',
      records='runs/annotations/annotations.jsonl', format='chat', smoke=False,
  )
  if a.arm not in ARMS:
    raise ValueError(f'arm {a.arm!r} unknown; choose from {ARMS}')
  known, on_policy = a.student in PRESETS, a.arm.endswith('_on')
  where = {} if on_policy or a.smoke else dict(records=a.records, target='unfiltered_completion')
  data = base.data(
      'arithmetic_mix' if a.smoke else 'gsm8k', count=32 if a.smoke else 0, prompting=base.prompt(a.format), **where,
  )
  length, rows = (320, 4) if a.smoke else (1024, 64)
  if a.arm == 'sft':
    recipe = base.sft(data, base.batch(rows, length))
  elif on_policy:
    rollouts = base.rollouts(prompts=rows, samples=1, length=length, max_new_tokens=8 if a.smoke else 512)
    recipe = base.on_policy_distill(a.teacher, data, rollouts, losses()[a.arm.removesuffix('_on')])
  else:
    recipe = base.distill(a.teacher, data, base.batch(rows, length), losses()[a.arm.removesuffix('_off')])
  how = dict(dtype='float32' if a.smoke else 'bfloat16', param_dtype='float32', remat='full', max_length=length)
  return base.train(
      recipe, tokenizer='' if known else a.student, init_from='' if known else a.student,
      model=base.preset(a.student, **how) if known else base.model_of(a.student, **how),
      optimizer=base.optimizer('adamw', learning_rate=1e-5, matrix_learning_rate=0.0, schedule='cosine', b2=0.999),
      num_steps=2 if a.smoke else 500, mesh=(1, 16, 1) if known else (),
  )
