"""How the lines of all studies end: evaluations of every model on problems that are the same for all seeds."""

from ml_collections import ConfigDict

from configs import base

DEV, TEST = 50_000, 60_000  # seeds of the problems: a pooled test has each in its place
DEFAULTS = dict(size='full', seed=1)
MUON = dict(name='muon', learning_rate=3e-3, matrix_learning_rate=0.02)


def line(a, s, stages, models, *, task, rows=None, seed=0, **known):
  """A study's config: its stages, and an evaluation `test_NAME` of every model after them.

  Args:
    a: arguments of the config, with seed and size.
    s: numbers of the size, with test, new_tokens and decode_rows.
    stages: {name: stage} so far.
    models: names of those to be evaluated.
    task: of the test problems.
    rows: {row: strategy} of every evaluation; one greedy row by default.
    seed: of what is sampled there.
    known: further fields of the config.
  """
  test = base.data(task, 'test', count=s.test, seed=TEST)
  rows = rows or dict(greedy=base.strategy())
  evaluations = {f'test_{name}': dict(run='evaluate', config=base.evaluate(
      f'{{{name}}}', test, rows, max_new_tokens=s.new_tokens, batch_size=s.decode_rows, seed=seed,
  )) for name in models}
  stages = stages | evaluations
  for stage in stages.values():
    if 'progress' in stage['config']:
      stage['config']['progress'] = False  # two runs at once would write over each other
  return ConfigDict(dict(task=task, seed=a.seed, size=a.size, order=tuple(stages), stages=stages, **known))
