"""What the studies on running sums share: a teacher, one start for all students, arms of any length, evaluations.

Used by configs/studies/on_policy_or_rl.py, one_prompt.py and capacity_gap.py, so that stages which are the same run
once where they share a workdir.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import base

DEFAULTS = dict(size='full', seed=1)
DEV, TEST = 50_000, 60_000  # all seeds are tested on the same problems, so that a pooled test has each in its place
TEACHER = 3  # its seed

MUON = dict(name='muon', learning_rate=3e-3, matrix_learning_rate=0.02)
# One rule for all arms that are compared, whatever their loss; constant, so that arms may be of different lengths.
ADAM = dict(name='adamw', learning_rate=1e-3, schedule='constant', warmup_steps=5, weight_decay=0.0)

FULL = dict(
    rows=24, length=112, row=26, new_tokens=14, decode_rows=512,
    teacher=dict(embed_dim=64, num_layers=2, num_heads=4, mlp_dim=192),
    student=dict(embed_dim=64, num_layers=2, num_heads=4, mlp_dim=192),
    optimizer=dict(teacher=MUON, base=MUON, arm=ADAM),
    teacher_problems=8000, gold=4000, fresh=20_000, test=1000, dev=400, temperature=1.0, log_every=4,
    steps=dict(teacher=360, base=240),
)
SMOKE = FULL | dict(
    rows=4, decode_rows=32, teacher_problems=200, gold=100, fresh=64, test=32, dev=16, log_every=1,
    teacher=dict(embed_dim=32, num_layers=1, num_heads=2, mlp_dim=64),
    student=dict(embed_dim=16, num_layers=1, num_heads=2, mlp_dim=32), steps=dict(teacher=4, base=2),
)


class Arm(NamedTuple):
  """recipe: of the training. steps: its length. every: steps between checkpoints, all of which are kept."""

  recipe: Any
  steps: int
  every: int


def line(a, sizes: Mapping[str, Any], make_arms, *, task='running_sums', rows_of_tests=None):
  """The stages of a study: teacher, start, what make_arms adds, arms, evaluations.

  Args:
    a: arguments of the config, with seed and size.
    sizes: as FULL.
    make_arms: (sizes, data, stages) -> {arm: Arm}; it may add stages, data(...) is a section of the task.
    task: of the problems and of the chains that the teacher learns.
    rows_of_tests: {row: strategy} of every evaluation; one greedy row by default.
  """
  s, seed, stages = ConfigDict(sizes), a.seed * 1000, {}
  data = lambda *split, **options: base.data(task, *split, **options)
  rows = base.batch(s.rows, s.length)

  def training(name, recipe, run_seed, num_steps, *, shape='student', kind, **options):
    stages[name] = dict(run='train', config=base.train(
        recipe, tokenizer='byte', model=base.model(**s[shape], max_length=s.length), num_steps=num_steps,
        optimizer=base.optimizer(**s.optimizer[kind]), seed=run_seed, log_every=s.log_every, **options,
    ))

  # One teacher for all seeds: they tell of starts, prompts and samples, in a time that allows for several.
  known = base.sft(data(count=s.teacher_problems, seed=TEACHER), rows)
  training('teacher', known, TEACHER, s.steps.teacher, shape='teacher', kind='teacher')
  gold = base.sft(data(count=s.gold, seed=seed + 1), rows)
  training('base', gold, seed + 5, s.steps.base, kind='base', checkpoint_every=0)
  arms = make_arms(s, data, stages)
  for name, arm in arms.items():
    keep = dict(checkpoint_every=arm.every, keep_checkpoints=-(-arm.steps // arm.every))
    training(name, arm.recipe, seed + 6, arm.steps, kind='arm', init_from='{base}', **keep)
  test = data('test', count=s.test, seed=TEST)
  for name in ('teacher', 'base', *arms):
    stages[f'test_{name}'] = dict(run='evaluate', config=base.evaluate(
        f'{{{name}}}', test, rows_of_tests or dict(greedy=base.strategy()), max_new_tokens=s.new_tokens,
        batch_size=s.decode_rows, seed=seed,
    ))
  for stage in stages.values():
    stage['config']['progress'] = False  # two runs at once would write over each other
  dev = data('dev', count=s.dev, seed=DEV)
  measure = dict(data=dev, new_tokens=s.new_tokens, decode_rows=s.decode_rows)
  return ConfigDict(dict(
      seed=a.seed, task=task, size=a.size, arms=tuple(arms), measure=measure, order=tuple(stages), stages=stages,
  ))


def sampled(s, *, prompts, samples):
  """Rollouts of `prompts` groups of `samples` completions a step."""
  return base.rollouts(
      prompts=prompts, samples=samples, length=s.row, max_new_tokens=s.new_tokens, temperature=s.temperature,
  )


def teacher_advantage(advantage='reverse_kl', *, reward=0.0):
  """The teacher's opinion of each sampled token as an advantage, the task's reward beside it with this weight."""
  return base.term(
      'policy', advantage=advantage, advantage_options={}, surrogate='importance_sampling', surrogate_options={},
      reward_weight=reward,
  )
