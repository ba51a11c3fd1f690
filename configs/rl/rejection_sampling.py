"""Rejection sampling: a model learns from its own right chains of thought, one of each path (RFT), in rounds (STaR).

Run: python -m experiments.sweep --config=configs/rl/rejection_sampling.py --workdir=runs/star
  RFT is one round of many samples, :rounds=1,samples=16. With :hint problems that have no right sample are asked again
  with their answer in sight, and what then is right is learnt as if they had not been (rationalisation).
A round: the last model samples; right samples of distinct paths are kept; the start learns anew from gold and from
them. A round that keeps nothing ends the line with an error. Left out: STaR's growing number of steps a round.
Hardware: two CPU cores, minutes. Expected: configs/studies/rejection_sampling.py, which runs these rounds.
Reference: Zelikman et al., STaR, arXiv:2203.14465; Yuan et al., RFT, arXiv:2308.01825.
"""

from ml_collections import ConfigDict

from configs import base

HINT = ' ({answer})'


def rounds(name, first, number, *, ask, learn):
  """Stages of so many rounds: NAME_1 learns from NAME_1_samples of the model `first`, NAME_2 from those of NAME_1.

  Args:
    name: of the rounds.
    first: stage of the model that samples first.
    number: of rounds.
    ask: (model) -> config of an annotation with paths.
    learn: (data of what is kept) -> config of a training.
  """
  stages, model = {}, first
  for at in range(1, number + 1):
    samples, asked = f'{name}_{at}_samples', ask(f'{{{model}}}')
    kept = base.data(asked.data.task, records=f'{{{samples}}}/kept.jsonl', target='completion')
    model = f'{name}_{at}'
    stages |= {samples: dict(run='annotate', config=asked), model: dict(run='train', config=learn(kept))}
  return stages


def with_gold(count, kept, gold, *, task, seed, hint='', share=0.25):
  """`count` examples, a share of them gold; with a hint, half of these show the answer, as rationalisation asks."""
  parts = dict(gold=(share, base.data(task, count=gold, seed=seed)))
  if hint:
    hinted = base.data(task, count=gold, seed=seed, prompting=base.prompt(hint=hint))
    parts = dict(gold=(share / 2, parts['gold'][1]), hinted=(share / 2, hinted))
  if kept is not None:
    parts['kept'] = (1 - share, kept)
  return base.mix(count, seed=seed, **parts)


def get_config(arg: str = ''):
  """arg: 'rounds=1,samples=16', 'hint', 'start=FOLDER,task=gsm8k,gold=300,prompts=5000', 'smoke'.

  start: a published model, from which every round begins; by default a random one.
  """
  a = base.parse_arg(
      arg, task='short_sums_in_any_order', rounds=3, samples=4, hint=False, start='', gold=1500, prompts=4000,
      steps=240, seed=1, smoke=False,
  )
  hint, new_tokens = HINT if a.hint else '', 128 if a.start else 32
  steps, gold, prompts = (40, 50, 200) if a.smoke else (a.steps, a.gold, a.prompts)
  small = base.model(embed_dim=64, num_layers=2, num_heads=4, mlp_dim=192)

  def learn(kept):
    return base.train(
        base.sft(with_gold(steps * 50, kept, gold, task=a.task, seed=a.seed, hint=hint), base.batch(8, 256)),
        tokenizer=a.start or 'byte', model=base.model_of(a.start, max_length=512) if a.start else small,
        init_from=a.start, optimizer=base.optimizer(), num_steps=steps, seed=a.seed,
    )

  def ask(model):
    return base.annotate(
        model, base.data(a.task, count=prompts, seed=a.seed + 1),
        base.sampling(samples=a.samples, temperature=0.7, max_new_tokens=new_tokens, seed=a.seed), hint=hint,
        paths=2 * a.samples,
    )

  stages = dict(gold=dict(run='train', config=learn(None))) | rounds('round', 'gold', a.rounds, ask=ask, learn=learn)
  test, rows = base.data(a.task, 'test', count=4 if a.smoke else 1000), dict(greedy=base.strategy())
  for model in ('gold', *(f'round_{at}' for at in range(1, a.rounds + 1))):
    evaluated = base.evaluate(f'{{{model}}}', test, rows, max_new_tokens=new_tokens)
    stages[f'test_{model}'] = dict(run='evaluate', config=evaluated)
  return ConfigDict(dict(task=a.task, seed=a.seed, order=tuple(stages), stages=stages))
