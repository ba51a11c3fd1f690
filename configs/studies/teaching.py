"""What the distillation studies share: a teacher, its annotations, one start for all students, arms, evaluations.

Used by configs/studies/distillation_ablation.py and logits_or_hidden.py, so that their stages are the same and run
once. Both tasks have models of one shape and rows of one length, so that the programs of one serve the other.
"""

from ml_collections import ConfigDict

from configs import base
from configs.studies import lines
from srm_jax import schema

DEFAULTS = dict(task='sums') | lines.DEFAULTS

# One rule for all arms, whatever their loss. 8 packed rows hold about as many texts as `sampled` prompts.
_ARM = dict(name='muon', learning_rate=2e-3, matrix_learning_rate=0.015, warmup_steps=8)

# Heads are 16 wide in both models: relations of queries and of keys then turn with distance alike.
_FULL = dict(
    pieces=0, vocab=276, rows=12, arm_rows=8, length=176, context=224, new_tokens=68, decode_rows=1024,
    teacher=dict(embed_dim=64, num_layers=3, num_heads=4, mlp_dim=192),
    student=dict(embed_dim=32, num_layers=2, num_heads=2, mlp_dim=96),
    optimizer=dict(teacher=lines.MUON, base=lines.MUON | dict(learning_rate=6e-3, matrix_learning_rate=0.04), arm=_ARM),
    teacher_problems=8000, gold=400, prompts=1500, fixed=400, temperature=0.7, sampled=32, row=164,
    test=1000, dev=200, text_rows=24, steps=dict(teacher=400, base=300, arm=90),
)
_SMOKE = _FULL | dict(
    teacher=dict(embed_dim=32, num_layers=2, num_heads=2, mlp_dim=96),
    student=dict(embed_dim=16, num_layers=1, num_heads=1, mlp_dim=48),
    rows=4, arm_rows=4, new_tokens=32, context=208, teacher_problems=400, gold=100, prompts=32, fixed=32, sampled=4,
    test=32, dev=16, text_rows=4, steps=dict(teacher=6, base=3, arm=3),
)

SIZES = {
    'sums/full': _FULL | dict(new_tokens=48, row=144),  # twice a text: see row_length in srm_jax/recipes/on_policy.py
    'sums/smoke': _SMOKE,
    'rewriting/full': _FULL | dict(pieces=276),
    'rewriting/smoke': _SMOKE | dict(pieces=270),
}


def claim(text, above, below, *, what='accuracy', margin=0.0):
  """What a study is to decide: the mean of `what` over the arms `above` is higher than over the arms `below`.

  what: accuracy, entropy, divergence, cka, flops or seconds. The rule is in experiments/study/verdicts.py.
  """
  return dict(text=text, above=tuple(above), below=tuple(below), what=what, margin=margin)


def line(a, make_arms, claims=()):
  """Stages: what the studies share, then the arms. make_arms(sizes, data, rows) -> {arm: recipe}."""
  s, seed, stages = ConfigDict(schema.choose('task and size', f'{a.task}/{a.size}', SIZES)), a.seed * 1000, {}
  data = lambda *split, **options: base.data(a.task, *split, **options)
  rows, arm_rows = (base.batch(size, s.length) for size in (s.rows, s.arm_rows))

  def training(name, recipe, run_seed, *, shape='student', kind, **options):
    stages[name] = dict(run='train', config=base.train(
        recipe, tokenizer='{tokenizer}' if s.pieces else 'byte', seed=run_seed, num_steps=s.steps[kind],
        model=base.model(**s[shape], vocab_size=s.vocab, max_length=s.context),
        optimizer=base.optimizer(**s.optimizer[kind]), **options,
    ))

  known = data(count=s.teacher_problems, seed=seed + 3)
  if s.pieces:
    trained = dict(data=known, vocab_size=s.pieces, split_by_whitespace=False)
    stages['tokenizer'] = dict(run='tokenizer', config=trained)
  last = dict(checkpoint_every=0, keep_checkpoints=1)
  training('teacher', base.sft(known, rows), seed + 3, shape='teacher', kind='teacher', **last)
  sampling = base.sampling(temperature=s.temperature, max_new_tokens=s.new_tokens, seed=seed + 4)
  fresh = data(count=s.prompts, seed=seed + 2)
  annotated = base.annotate('{teacher}', fresh, sampling, batch_size=s.decode_rows, chunk=s.prompts)
  stages['annotate'] = dict(run='annotate', config=annotated)
  training('base', base.sft(data(count=s.gold, seed=seed + 1), rows), seed + 5, kind='base', **last)
  arms = make_arms(s, data, arm_rows)
  for name, recipe in arms.items():
    every = s.steps.arm // 3  # checkpoints of which the curve over steps is made
    training(name, recipe, seed + 6, kind='arm', init_from='{base}', checkpoint_every=every, keep_checkpoints=3)
  dev = data('dev', count=s.dev, seed=lines.DEV)
  measure = dict(data=dev, batch=base.batch(s.text_rows, s.length), new_tokens=s.new_tokens, decode_rows=s.decode_rows)
  return lines.line(
      a, s, stages, ('teacher', 'base', *arms), task=a.task, arms=tuple(arms), claims=tuple(claims), measure=measure,
  )
