"""The whole line: a teacher, its annotations, six ways to teach a student, RL, and what each step was worth.

Run: bash experiments/quickstart.sh                    (two CPU cores, 12 minutes; with --smoke 90 seconds)
     bash experiments/quickstart.sh --task=gsm8k       (human-written problems; $SRM_DATA_DIR or a network)
     bash experiments/quickstart.sh --teacher=DIR --student=DIR    (published models or workdirs; --format=chat)
Expected: experiments/quickstart/reference.json, five seeds.
"""

from ml_collections import ConfigDict

from configs import base
from configs.quickstart_sizes import DEFAULTS, ROOM, SIZES

DEV, TEST = 50_000, 60_000  # offsets of the problem seeds: train, dev and test problems are also disjoint by hash


def get_config(arg: str = ''):
  """arg: DEFAULTS of configs/quickstart_sizes.py, 'task=gsm8k,seed=2'; steps scales the length of every training."""
  a = base.parse_arg(arg, **DEFAULTS)
  given = a.student or a.teacher
  s = ConfigDict(SIZES[a.task] | SIZES[f'{a.task}/{a.size}'] | ROOM[a.format if given else 'own'])
  seed, task = a.seed * 1000, a.task
  steps = {name: max(2, round(a.steps * count)) for name, count in s.steps.items()}
  data = lambda *split, **options: base.data(task, *split, prompting=base.prompt(a.format), **options)
  gold = data(count=s.gold, seed=seed + 1)
  fresh = data(count=s.prompts, seed=seed + 2)
  annotated = data(records='{annotate}/annotations.jsonl', target=f'{s.annotations_used}completion')
  same_prompts = data(records='{annotate}/annotations.jsonl', target=f'{s.annotations_used}solution')
  rows, stages = base.batch(s.rows, s.length), {}

  def add(name, run, config):
    stages[name] = dict(run=run, config=config)

  def training(name, recipe, shape, run_seed, **options):
    start, how = a.student if shape == 'student' else '', dict(max_length=s.context, dtype=a.dtype)
    model = base.model_of(start, **how) if start else base.model(**s[shape], **how)
    optimizer = base.optimizer(**s.optimizer[options.pop('optimizer', name)])
    add(name, 'train', base.train(
        recipe, tokenizer='{tokenizer}', model=model, seed=run_seed, optimizer=optimizer,
        num_steps=steps[options.pop('steps', name)], **options,
    ))

  def evaluation(name, model, split, count, offset, strategies, **options):
    add(name, 'evaluate', base.evaluate(
        model, data(split, count=count, seed=seed + offset), strategies, max_new_tokens=s.new_tokens,
        batch_size=s.decode_rows, seed=seed + offset, **options,
    ))

  known = data(count=s.teacher_problems, seed=seed + 3)
  trained = dict(data=known, vocab_size=s.vocab, split_by_whitespace=False)
  add('tokenizer', 'given' if given else 'tokenizer', dict(folder=given) if given else trained)
  if a.teacher:
    add('teacher', 'given', dict(folder=a.teacher))
  else:
    training('teacher', base.sft(known, rows), 'teacher', seed + 3)
  several = base.sampling(samples=s.annotations, max_new_tokens=s.new_tokens, seed=seed + 4)
  add('annotate', 'annotate', base.annotate('{teacher}', fresh, several, batch_size=s.decode_rows))
  training('base', base.sft(gold, rows), 'student', seed + 5, init_from=a.student)
  # Cool samples: at temperature 1 a weak student derails, and the teacher's corrections on nonsense teach little.
  sampled = base.rollouts(
      prompts=s.opd_prompts, samples=1, length=s.row, max_new_tokens=s.new_tokens, temperature=s.opd_temperature,
  )
  kl = base.distillation(s.divergence)
  arms = dict(
      sft_small=base.sft(gold, rows),
      sft_gold=base.sft(same_prompts, rows),
      sft_annotations=base.sft(annotated, rows),
      logits=base.distill('{teacher}', annotated, rows, kl),
      hidden=base.distill('{teacher}', annotated, rows, base.distillation(s.divergence, hidden_weight=s.hidden_weight)),
      on_policy=base.on_policy_distill('{teacher}', same_prompts, sampled, base.distillation(s.on_policy_divergence)),
  )
  greedy = dict(greedy=base.strategy())
  for arm, recipe in arms.items():
    training(arm, recipe, 'student', seed + 6, init_from='{base}', steps='arm', optimizer='arm')
    evaluation(f'dev_{arm}', f'{{{arm}}}', 'dev', s.dev, DEV, greedy)
  add('best', 'select', dict(candidates={arm: f'{{dev_{arm}}}' for arm in arms}, row='greedy'))
  training('rl', base.grpo(
      data(count=s.rl_problems, seed=seed + 7),
      base.rollouts(prompts=s.rl_prompts, samples=s.group, length=s.row, max_new_tokens=s.new_tokens),
  ), 'student', seed + 7, init_from='{best}')
  for name in ('teacher', 'base', *arms, 'rl'):
    evaluation(f'test_{name}', f'{{{name}}}', 'test', s.test, TEST, greedy)
    if 'hard' in s:
      evaluation(f'hard_{name}', f'{{{name}}}', 'hard', s.hard, TEST, greedy)
  many = dict(samples=s.votes, temperature=1.0)
  evaluation('strategies', '{rl}', 'test', s.test, TEST, dict(
      direct=base.strategy('direct'), greedy=base.strategy(), sample=base.strategy(temperature=1.0),
      majority=base.strategy('self_consistency', **many), best_of_n=base.strategy('best_of_n', **many),
  ), scorer='{teacher}')
  return ConfigDict(dict(seed=a.seed, task=task, size=a.size, order=tuple(stages), stages=stages))
