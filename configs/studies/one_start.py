"""What the studies on running sums share: a teacher, one start for all students, arms of any length, evaluations.

Used by configs/studies/on_policy_or_rl.py, one_prompt.py and capacity_gap.py, so that stages which are the same run
once where they share a workdir.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import base
from configs.studies import lines
from srm_jax import schema

TEACHER = 3  # its seed

# The start is stopped on its way up, at a constant rate: right on a third of the problems, it would be right on nearly
# all after twice the steps. A start whose rate has fallen to 0 loses what it knows as soon as a rate rises again.
START = lines.MUON | dict(schedule='constant')
# Constant, so that arms may be of different lengths.
ADAM = dict(name='adamw', schedule='constant', warmup_steps=5, weight_decay=0.0)

FULL = dict(
    rows=24, length=112, row=26, new_tokens=14, decode_rows=512,
    teacher=dict(embed_dim=64, num_layers=2, num_heads=4, mlp_dim=192),
    student=dict(embed_dim=64, num_layers=2, num_heads=4, mlp_dim=192),
    teacher_problems=8000, gold=1500, fresh=20_000, test=1000, dev=400, temperature=1.0, log_every=4, start_rate=0.01,
    steps=dict(teacher=480, base=200),
)
SIZES = dict(full=FULL, smoke=FULL | dict(
    rows=4, decode_rows=32, teacher_problems=200, gold=100, fresh=64, test=32, dev=16, log_every=1,
    teacher=dict(embed_dim=32, num_layers=1, num_heads=2, mlp_dim=64),
    student=dict(embed_dim=16, num_layers=1, num_heads=2, mlp_dim=32), steps=dict(teacher=4, base=2),
))


class Arm(NamedTuple):
  """recipe, steps and Adam's rate of a training; every: steps between checkpoints, all of which are kept."""

  recipe: Any
  steps: int
  every: int
  rate: float


def line(a, make_arms, *, task='running_sums', rows_of_tests=None, **changed):
  """The stages of a study: teacher, start, what make_arms adds, arms, evaluations.

  Args:
    a: arguments of the config, with seed and size.
    make_arms: (sizes, data, stages) -> {arm: Arm}; it may add stages, data(...) is a section of the task.
    task: of the problems and of the chains that the teacher learns.
    rows_of_tests: {row: strategy} of every evaluation; one greedy row by default.
    changed: numbers of the size that are others here; steps.teacher 0 goes without a teacher.
  """
  s, seed, stages = ConfigDict(schema.choose('size', a.size, SIZES) | changed), a.seed * 1000, {}
  data = lambda *split, **options: base.data(task, *split, **options)
  rows = base.batch(s.rows, s.length)

  def training(name, recipe, run_seed, num_steps, optimizer, *, shape='student', **options):
    stages[name] = dict(run='train', config=base.train(
        recipe, tokenizer='byte', model=base.model(**s[shape], max_length=s.length), num_steps=num_steps,
        optimizer=base.optimizer(**optimizer), seed=run_seed, log_every=s.log_every, **options,
    ))

  if s.steps.teacher:
    # One teacher for all seeds: they tell of starts, prompts and samples, in a time that allows for several.
    known = base.sft(data(count=s.teacher_problems, seed=TEACHER), rows)
    training('teacher', known, TEACHER, s.steps.teacher, lines.MUON, shape='teacher')
  gold = base.sft(data(count=s.gold, seed=seed + 1), rows)
  start = START | dict(matrix_learning_rate=s.start_rate)
  training('base', gold, seed + 5, s.steps.base, start, checkpoint_every=0)
  arms = make_arms(s, data, stages)
  for name, arm in arms.items():
    keep = dict(checkpoint_every=arm.every, keep_checkpoints=-(-arm.steps // arm.every))
    adam = ADAM | dict(learning_rate=arm.rate)
    training(name, arm.recipe, seed + 6, arm.steps, adam, init_from='{base}', **keep)
  measure = dict(data=data('dev', count=s.dev, seed=lines.DEV), new_tokens=s.new_tokens, decode_rows=s.decode_rows)
  tested = (*(name for name in ('teacher', 'base') if name in stages), *arms)
  return lines.line(
      a, s, stages, tested, task=task, rows=rows_of_tests, seed=seed, arms=tuple(arms), measure=measure,
  )


def sampled(s, *, prompts, samples):
  """Rollouts of `prompts` groups of `samples` completions a step."""
  return base.rollouts(
      prompts=prompts, samples=samples, length=s.row, max_new_tokens=s.new_tokens, temperature=s.temperature,
  )
