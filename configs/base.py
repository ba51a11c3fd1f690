"""Sections that the configs of all experiments are made of; every default of the project stands here.

Try one: python -m experiments.train --config=configs/sft/arithmetic.py --workdir=runs/sft
"""

import dataclasses

from ml_collections import ConfigDict

from srm_jax import checkpoints, schema
from srm_jax.models.families import PRESETS


def parse_arg(arg: str, **defaults):
  """'task=gsm8k,smoke' -> ConfigDict of defaults with what the argument of --config=file.py:arg changes.

  Raises:
    ValueError: a name that is not among the defaults.
  """
  values = ConfigDict(defaults)
  for part in filter(None, arg.split(',')):
    name, _, text = part.partition('=')
    if name not in defaults:
      raise ValueError(f'config argument {name!r} unknown; choose from {sorted(defaults)}')
    kind = type(defaults[name])
    values[name] = (text or 'true').lower() in ('1', 'true') if kind is bool else kind(text)
  return values


def model(*, embed_dim, num_layers, num_heads, mlp_dim, num_kv_heads=None, max_length=256, **options):
  """vocab_size 0 takes the tokenizer's."""
  return ConfigDict(dict(
      vocab_size=0, num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads,
      num_kv_heads=num_kv_heads or num_heads, head_dim=embed_dim // num_heads, mlp_dim=mlp_dim, max_length=max_length,
      rope_base=10_000.0, norm_eps=1e-6, tie_embeddings=True, qkv_bias=False, qk_norm=False,
      param_dtype='float32', dtype='float32', remat='none', unroll=1,
  ) | options)


def model_of(folder: str, **options):
  """The model of a folder: a published one, or a run's workdir."""
  return ConfigDict(dataclasses.asdict(checkpoints.model_config(folder)) | dict(param_dtype='float32') | options)


def preset(name: str, **options):
  """The shape of a published model, by its name in srm_jax.models.families."""
  return ConfigDict(dataclasses.asdict(schema.choose('preset', name, PRESETS)) | options)


def optimizer(name='muon', *, learning_rate=3e-3, matrix_learning_rate=0.02, **options):
  """matrix_learning_rate is Muon's, for the block matrices; learning_rate is Adam's, for the rest."""
  return ConfigDict(dict(
      name=name, learning_rate=learning_rate, matrix_learning_rate=matrix_learning_rate, schedule='linear',
      warmup_steps=20, weight_decay=0.01, b1=0.9, b2=0.95, clip_norm=1.0,
  ) | options)


def adapters(rank=0, *, alpha=None, targets=('attention/*', 'mlp/*'), kind='lora', scaling='alpha/r', base=''):
  """rank 0 trains the whole model; alpha is twice the rank by default. base: 'int8' or 'nf4' quantises the rest."""
  return ConfigDict(dict(
      rank=rank, alpha=float(alpha or 2 * rank or 16), targets=targets, kind=kind, scaling=scaling, base=base,
  ))


INSTRUCTION = "\n\nReason step by step. End with a line that holds '#### ' and the final answer alone."


def prompt(
    format='plain', *, preface='', hint='', system='', instruction=INSTRUCTION, options=None, supervised='all',
    turns='all',
):
  """'chat' asks through the chat template beside the tokenizer; preface stands before the problem in any format,
  hint=' ({answer})' behind it.
  """
  return ConfigDict(dict(
      format=format, preface=preface, hint=hint, system=system, instruction=instruction, options=options or {},
      supervised=supervised, turns=turns,
  ))


def data(
    task='arithmetic_mix', split='train', *, count=1000, seed=1, records='', target='solution', pass_rate=None,
    budget=None, prompting=None,
):
  return ConfigDict(dict(
      task=task, split=split, count=count, seed=seed, records=records, target=target, pass_rate=pass_rate,
      budget=budget, prompt=prompting or prompt(), mix={},
  ))


def mix(count=0, *, seed=1, **parts):
  """Several data sections; parts: name=(ratio, data(...)), a ratio is a number or a schedule.

  count: examples, drawn beforehand in exact shares; 0 draws row by row, in shares that may change over the run.
  """
  mixed = data('', '', count=count, seed=seed)
  mixed.mix = {name: dict(ratio=ratio, data=part) for name, (ratio, part) in parts.items()}
  return mixed


def batch(size=32, length=128, packing='plan'):
  return ConfigDict(dict(size=size, length=length, packing=packing))


def rollouts(
    *, prompts=32, samples=8, length=192, max_new_tokens=128, temperature=1.0, cut='learn', order='uniform',
    order_options=None, dynamic=None, patience=100,
):
  """order: which problems come when (srm_jax.recipes.difficulty); dynamic=dict(prompts=, rounds=) drops groups that
  tell nothing, and samples on.
  """
  return ConfigDict(dict(
      prompts=prompts, samples=samples, length=length, max_new_tokens=max_new_tokens, temperature=temperature,
      top_k=0, top_p=1.0, cut=cut, order=dict(name=order, options=order_options or {}), dynamic=dynamic,
      patience=patience,
  ))


def term(kind, weight=1.0, *, rows='all', **options):
  """One term of a loss; weights and options that are numbers may be schedules (srm_jax.recipes.schedules)."""
  return dict(kind=kind, weight=weight, rows=rows, options=options)


def divergence(name='forward_kl', weight=1.0, *, temperature=1.0, scaled=False, rows='all', **options):
  return term(
      'divergence', weight, rows=rows, name=name, options=options, temperature=temperature,
      scale_by_squared_temperature=scaled,
  )


def top_k(name='forward_kl', weight=1.0, *, policy='tail', rows='all', **options):
  """A divergence to a cached teacher."""
  return term('top_k', weight, rows=rows, name=name, policy=policy, options=options)


def hidden(feature='cosine', weight=1.0, *, layers='skip', projector='learned'):
  return term('hidden', weight, feature=feature, layers=layers, projector=projector)


def relations(relation='minilm_v2', weight=1.0, *, layers='final', **options):
  """Attention relations of one layer; options: relation_heads."""
  return term('relations', weight, relation=relation, layers=layers, options=options)


def policy(
    advantage='reverse_kl', weight=1.0, *, surrogate='importance_sampling', surrogate_options=None, reward_weight=0.0,
    whiten=False, rows='all', **options,
):
  """The teacher's opinion of each sampled token as an advantage, beside the task's reward with its weight."""
  return term(
      'policy', weight, rows=rows, advantage=advantage, advantage_options=options, surrogate=surrogate,
      surrogate_options=surrogate_options or {}, reward_weight=reward_weight, whiten=whiten,
  )


def loss(**terms):
  """A weighted sum of terms, by name; cross-entropy is measured in any case."""
  return ConfigDict(dict(terms={'cross_entropy': term('cross_entropy', 0.0), **terms}, head_chunk=None))


def distillation(
    name='forward_kl', *, weight=1.0, cross_entropy=0.0, hidden_weight=0.0, feature='cosine', layers='skip', **options,
):
  """A divergence, and where they have a weight cross-entropy and hidden states."""
  terms = {name: divergence(name, weight, **options)} if weight else {}
  if cross_entropy:
    terms['cross_entropy'] = term('cross_entropy', cross_entropy)
  if hidden_weight:
    terms['hidden'] = hidden(feature, hidden_weight, layers=layers)
  return loss(**terms)


def sampling(*, samples=1, temperature=1.0, max_new_tokens=128, seed=0):
  return ConfigDict(dict(
      temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens, samples=samples, seed=seed,
  ))


def strategy(name='chain_of_thought', *, samples=1, temperature=0.0):
  return ConfigDict(dict(name=name, samples=samples, temperature=temperature))


def train(recipe, *, tokenizer, model, optimizer, num_steps, seed=1, init_from='', **options):
  """A training run of any recipe."""
  return ConfigDict(dict(
      seed=seed, num_steps=num_steps, tokenizer=tokenizer, init_from=init_from, model=model, recipe=recipe,
      adapters=adapters(), optimizer=optimizer, mesh=(), microbatches=1, ema_decay=0.0, log_every=10,
      checkpoint_every=100, keep_checkpoints=2, overfit_one_batch=False, progress=True,
  ) | options)


def sft(data, batch, *, head_chunk=None):
  return ConfigDict(dict(name='sft', data=data, batch=batch, head_chunk=head_chunk))


def adaptive(*, every=100, held_out=64, smoothing=0.5):
  """Shares of a mix that are measured anew: rows go where the student lags behind its teacher."""
  return ConfigDict(dict(every=every, held_out=held_out, smoothing=smoothing))


def distill(teacher, data, batch, loss, *, cache='', adaptive=None):
  """teacher may be '' where no term needs its parameters, or {name: dict(folder, weight)} of several; cache: folder of
  its predictions, for terms `top_k`.
  """
  return ConfigDict(dict(
      name='distill', teacher=teacher, cache=cache, data=data, adaptive=adaptive, batch=batch, loss=loss,
  ))


def cross_tokenizer(teacher, data, batch, *, teacher_length, chunk_loss='binary_kl', chunk_options=None, **weights):
  """weights: of cross_entropy, chunk, shared and uld. binary_kl says little about long chunks at T=1: 100 it is."""
  options = {'temperature': 100.0} if chunk_options is None and chunk_loss == 'binary_kl' else chunk_options or {}
  loss = dict(cross_entropy=0.0, chunk=0.0, shared=0.0, uld=0.0, divergence='forward_kl', temperature=1.0) | weights
  return ConfigDict(dict(
      name='cross_tokenizer', teacher=teacher, data=data, batch=batch, teacher_length=teacher_length,
      loss=loss | dict(chunk_loss=chunk_loss, chunk_options=options, head_chunk=None),
  ))


def mixing(data, batch, *, mix='alternate', fraction=0.5):
  """Rows of a data set among those that the student samples."""
  return ConfigDict(dict(mix=mix, fraction=fraction, data=data, batch=batch))


def on_policy_distill(teacher, data, rollouts, loss, *, mixing=None):
  return ConfigDict(dict(
      name='on_policy_distill', teacher=teacher, data=data, rollouts=rollouts, loss=loss, mixing=mixing,
      advantage=dict(name='group_relative', options=dict(ddof=1, eps=1e-6)),
  ))


def reward(kind, weight=1.0, **options):
  """One summand of a reward, from srm_jax.rewards.REWARDS."""
  return dict(kind=kind, weight=weight, options=options)


def choice(name, **options):
  return dict(name=name, options=options)


def policy_gradient(
    data, rollouts, *, advantage=None, surrogate=None, reduction=None, rewards=None, whiten=False, truncation=None,
    kl=0.0, estimator='k3', place='loss', reference='', corrected=False, entropy=0.0, critic=None, epochs=1,
    minibatches=1,
):
  """GRPO where nothing else is said; critic=dict(coef=, clip=) for advantage 'gae'."""
  return ConfigDict(dict(
      name='policy_gradient', data=data, rollouts=rollouts, rewards=rewards or {},
      advantage=advantage or choice('group_relative', ddof=1, eps=1e-6), whiten=whiten,
      surrogate=surrogate or choice('clipped', clip_low=0.2, clip_high=0.2), truncation=truncation,
      reduction=reduction or choice('sequence_mean_token_mean'),
      kl=dict(coef=kl, estimator=estimator, place=place, reference=reference, corrected=corrected), entropy=entropy,
      critic=critic, updates=dict(epochs=epochs, minibatches=minibatches), head_chunk=None,
  ))


def grpo(data, rollouts, *, kl=0.0, reference='', clip_high=0.2):
  return policy_gradient(
      data, rollouts, surrogate=choice('clipped', clip_low=0.2, clip_high=clip_high), kl=kl, reference=reference,
  )


# Of the papers; gamma is a margin of rewards, not of mean log-probabilities.
PREFERENCE_OPTIONS = {
    'dpo': dict(beta=0.1, label_smoothing=0.0), 'ipo': dict(beta=0.1), 'simpo': dict(beta=2.0, gamma=1.0),
    'kto': dict(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0), 'orpo': dict(beta=0.1),
}


def preference(data, *, loss='dpo', batch=None, rollouts=None, reference='', per_problem=4, **options):
  """batch for pairs of annotations, rollouts for pairs that the student samples; options: of the loss."""
  return ConfigDict(dict(
      name='preference', data=data, batch=batch, rollouts=rollouts, per_problem=per_problem,
      loss=dict(name=loss, options={**PREFERENCE_OPTIONS.get(loss, {}), **options}), reference=reference,
      head_chunk=None,
  ))


def reward_model(data, batch, *, target='outcome', centering=0.01, labels='soft', segmentation='lines'):
  """data: of a file of annotations ('outcome') or of labelled steps ('process'), unfiltered."""
  return ConfigDict(dict(
      name='reward_model', target=target, data=data, batch=batch, centering=centering, labels=labels,
      segmentation=segmentation,
  ))


def process_labels(student, data, sampling, *, segmentation='lines', batch_size=256, chunk=64):
  """Labels of the steps of annotations; sampling.samples continuations a step."""
  return ConfigDict(dict(
      student=student, data=data, segmentation=segmentation, sampling=sampling, batch_size=batch_size, chunk=chunk,
      mesh=(), progress=True,
  ))


def annotate(teacher, data, sampling, *, batch_size=256, chunk=256, cache_k=0, hint='', paths=0):
  """cache_k above 0 caches so many of the teacher's next tokens for the right annotations, in WORKDIR/cache.

  hint: ' ({answer})' shows the answer of problems that have no right sample, and asks again (STaR). paths above 0 keeps
  so many right annotations a problem, of distinct paths, in WORKDIR/kept.jsonl (RFT).
  """
  return ConfigDict(dict(
      teacher=teacher, data=data, sampling=sampling, batch_size=batch_size, chunk=chunk, cache_k=cache_k, hint=hint,
      paths=paths, mesh=(), progress=True,
  ))


def cache_teacher(
    teacher, data, *, k=64, temperature=1.0, tokenizer='', batch_tokens=4096, chunk=256, measured_tokens=256,
):
  """The next tokens that a teacher expects in what students will learn; tokenizer '' is the teacher's own."""
  return ConfigDict(dict(
      teacher=teacher, tokenizer=tokenizer, data=data, k=k, temperature=temperature, batch_tokens=batch_tokens,
      chunk=chunk, measured_tokens=measured_tokens, mesh=(), progress=True,
  ))


def evaluate(model, data, strategies, *, scorer='', score='mean', max_new_tokens=128, seed=0, batch_size=256):
  return ConfigDict(dict(
      model=model, scorer=scorer, score=score, data=data, strategies=strategies, max_new_tokens=max_new_tokens,
      seed=seed, batch_size=batch_size, mesh=(), progress=True,
  ))
