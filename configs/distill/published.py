"""Logit distillation of a published model into another of the same vocabulary, rows of 4096 tokens, CE beside it.

Run: python -m experiments.train --config=configs/distill/published.py:teacher=DIR,student=DIR --workdir=runs/distilled
Plan: python -m experiments.plan --config=configs/distill/published.py --topology=v5e:4x4
Hardware: 16 TPU v5e chips. Status: compiled for v5e:4x4 (Qwen2.5-1.5B into 0.5B); the smallest shapes ran on a CPU.
DIR has config.json, safetensors and tokenizer.json; a preset's name in its place has the shape alone, for plan. The
two may pad their vocabularies differently (Qwen2.5 of 7B and of 0.5B). format=chat asks through the chat template.
Left out: on-policy samples (configs/distill/papers.py:paper=gkd), hidden states.
Reference: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531.
"""

from configs import base
from srm_jax.models.families import PRESETS


def get_config(arg: str = ''):
  """arg: 'teacher=DIR,student=DIR', 'divergence=reverse_kl', 'rows=64,length=4096', 'format=chat', 'smoke'."""
  a = base.parse_arg(
      arg, teacher='qwen2.5-1.5b', student='qwen2.5-0.5b', divergence='forward_kl', rows=64, length=4096,
      format='plain', smoke=False,
  )
  how = dict(dtype='bfloat16', param_dtype='float32', remat='full', max_length=a.length)
  known = a.student in PRESETS
  if a.smoke and known:
    how |= dict(vocab_size=0, num_layers=2, embed_dim=64, head_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=128)
  loss = base.loss(
      kl=base.divergence(a.divergence), cross_entropy=base.term('cross_entropy', 0.5),
  )
  data = base.data(
      'arithmetic_mix' if a.smoke else 'gsm8k', count=200 if a.smoke else 0, prompting=base.prompt(a.format),
  )
  return base.train(
      base.distill(a.teacher, data, base.batch(4, 256) if a.smoke else base.batch(a.rows, a.length), loss),
      tokenizer=('byte' if a.smoke else '') if known else a.student, init_from='' if known else a.student,
      model=base.preset(a.student, **how) if known else base.model_of(a.student, **how),
      optimizer=base.optimizer('adamw', learning_rate=1e-5, matrix_learning_rate=0.0, schedule='cosine', b2=0.999),
      num_steps=4 if a.smoke else 1000, mesh=() if a.smoke or not known else (1, 16, 1),
      microbatches=1 if a.smoke or not known else 4,
  )
