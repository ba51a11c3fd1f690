"""Distillation from a published teacher with another tokenizer: probabilities of chunks that both cut out of a text.

Run: python -m experiments.train --config=configs/distill/cross_tokenizer.py:teacher=DIR,student=DIR \\
       --workdir=runs/cross
Hardware: one accelerator of 16 GB for models around a billion parameters. Status: run on a CPU at tiny sizes only.
hybrid=1 compares distributions too: shared ids where both sides have the same token, sorted probabilities elsewhere.
On a CPU keep that to small vocabularies: sorting 64 x 152k numbers takes 0.3 s.
Left out: samples of the student.
Reference: Minixhofer et al., arXiv:2503.20083; Boizard et al., arXiv:2402.12030; Patiño et al., GOLD, 2025.
"""

from configs import base


def get_config(arg: str = ''):
  """arg: 'teacher=DIR,student=DIR', 'hybrid=1.0' (weight), 'rows=16,length=1024', 'format=chat', 'smoke'."""
  a = base.parse_arg(
      arg, teacher='runs/teacher', student='', hybrid=0.0, rows=16, length=1024, format='plain', smoke=False,
  )
  data = base.data(
      'arithmetic_mix' if a.smoke else 'gsm8k', count=200 if a.smoke else 0, prompting=base.prompt(a.format),
  )
  length = 256 if a.smoke else a.length
  recipe = base.cross_tokenizer(
      a.teacher, data, base.batch(4 if a.smoke else a.rows, length), teacher_length=length, cross_entropy=0.5,
      chunk=1.0, shared=a.hybrid, uld=a.hybrid,
  )
  shape = dict(embed_dim=64, num_layers=2, num_heads=4, mlp_dim=128, max_length=length)
  how = dict(dtype='bfloat16', param_dtype='float32', remat='full', max_length=length)
  return base.train(
      recipe, tokenizer=a.student or 'byte', init_from=a.student,
      model=base.model_of(a.student, **how) if a.student else base.model(**shape),
      optimizer=base.optimizer('adamw', learning_rate=1e-5 if a.student else 1e-3, schedule='cosine', b2=0.999),
      num_steps=4 if a.smoke else 1000,
  )
