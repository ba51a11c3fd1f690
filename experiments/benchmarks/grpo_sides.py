"""The sides of the GRPO benchmark, each in a process of its own: a line read asks for a step, a line of JSON tells it.

  python -m experiments.benchmarks.grpo_sides ours '{"model": {...}, "prompts": 8, ...}'

`experiments.benchmarks.grpo` starts them and says what is compared. Nothing but the standard library is imported at the
top: Tunix's environment has no srm_jax.
"""

import collections
import dataclasses
import importlib
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from experiments import runtime

PARTS = ('rollout', 'scoring', 'update')
LEARNING_RATE, CLIP_NORM, CLIP = 1e-6, 1.0, 0.2
FOR_EVER = 1_000_000  # steps; the parent says when it is enough
DISTINCT = 8  # batches of prompts before the first comes again
PRODUCTS = 10  # of one step of `product`


@dataclasses.dataclass(frozen=True)
class Work:
  """One step: `samples` completions of `new_tokens` tokens to each of `prompts` prompts of `prompt_tokens` tokens.

  model: vocab_size, num_layers, embed_dim, num_heads, num_kv_heads, head_dim, mlp_dim. dtype: what is computed in.
  weights: what TRL keeps weights in; with float32 and another dtype it computes by autocast. microbatches: parts of an
  update that ours and TRL take one after the other. tokenizer: a folder in which ids are words, and end-of-text, which
  is padding too, is an id that the model does not have.
  """

  model: Mapping[str, int]
  prompts: int
  samples: int
  prompt_tokens: int
  new_tokens: int
  dtype: str
  weights: str
  microbatches: int
  tokenizer: str

  @property
  def rows(self) -> int:
    return self.prompts * self.samples

  @property
  def row_tokens(self) -> int:
    return self.prompt_tokens + self.new_tokens


def write_tokenizer(folder, vocab_size: int):
  """A tokenizer.json whose ids are words, '17' for 17; '<end>' is the id behind the model's last."""
  import tokenizers

  made = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token='0'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  made.add_special_tokens(['<end>'])
  made.save(str(folder / 'tokenizer.json'))
  words = dict(tokenizer_class='PreTrainedTokenizerFast', eos_token='<end>', pad_token='<end>')
  (folder / 'tokenizer_config.json').write_text(json.dumps(words), encoding='utf-8')


def prompts(work: Work) -> list[str]:
  """Texts of `prompt_tokens` words, enough for DISTINCT steps."""
  draw, size = random.Random(0), work.model['vocab_size']
  line = lambda: ' '.join(str(draw.randrange(size)) for _ in range(work.prompt_tokens))
  return [line() for _ in range(DISTINCT * work.prompts)]


def reward(text: str) -> float:
  """Share of even numbers: an untrained model's completions differ in it, so that advantages are not zero."""
  words = text.split()
  return sum(int(word) % 2 == 0 for word in words) / len(words)


class Turns:
  """A side's end of the pipe. It times the parts of each step, and refuses a step that was not the work."""

  def __init__(self, work: Work, asked: TextIO, told: TextIO):
    self.work, self.asked, self.told, self.steps = work, asked, told, 0
    self.grade = self.timed('scoring', self._grade)

  def wait(self) -> bool:
    """Sleeps until a step is asked for; False where none will be."""
    asked = self.asked.readline()
    self.seconds, self.graded = collections.Counter(), 0
    self.begun = time.perf_counter(), time.process_time()
    return bool(asked)

  def timed(self, part: str, call: Callable) -> Callable:
    """The call, with its seconds counted to `part`, less those of the parts inside it."""

    def run(*arguments, **options):
      inside, begun = self.seconds.total(), time.perf_counter()
      found = call(*arguments, **options)
      self.seconds[part] += time.perf_counter() - begun - (self.seconds.total() - inside)
      return found

    return run

  def _grade(self, text: str) -> float:
    if len(text.split()) != self.work.new_tokens:
      raise AssertionError(f'a completion of {len(text.split())} tokens instead of {self.work.new_tokens}: {text!r}')
    self.graded += 1
    return reward(text)

  def check(self, *, parameters: int, encode: Callable[[str], Any]):
    """Raises AssertionError where the model or a prompt is not of the size that it should be."""
    lengths = {len(encode(text)) for text in prompts(self.work)}
    if lengths != {self.work.prompt_tokens}:
      raise AssertionError(f'prompts of {lengths} tokens instead of {self.work.prompt_tokens}')
    m = self.work.model
    heads = m['head_dim'] * (2 * m['num_heads'] + 2 * m['num_kv_heads'])
    matrices = m['embed_dim'] * (m['vocab_size'] + m['num_layers'] * (heads + 3 * m['mlp_dim']))
    if not 1 <= parameters / matrices < 1.02:  # norms, and Tunix's biases
      raise AssertionError(f'a model of {parameters} parameters, {matrices} of them expected in matrices')

  def done(self, steps: int):
    """The step is taken, and `steps` optimizer steps in all.

    Raises:
      AssertionError: the side took another number of steps, or scored another number of completions.
    """
    self.steps += 1
    if (steps, self.graded) != (self.steps, self.work.rows):
      raise AssertionError(f'{steps} steps, {self.graded} graded; expected {self.steps} and {self.work.rows}')
    self.tell()

  def tell(self):
    wall, processor = time.perf_counter() - self.begun[0], time.process_time() - self.begun[1]
    self.seconds['update'] = wall - self.seconds.total()
    print(json.dumps({**self.seconds, 'processor': processor}), file=self.told, flush=True)


def ours(work: Work, turns: Turns):
  """srm_jax: recipe and train step, as `srm_jax.train` takes them."""
  import jax

  from configs import base
  from srm_jax import optimizers, sharding, train_step
  from srm_jax.data import tokenizer as tokenizers
  from srm_jax.models import transformer
  from srm_jax.models.config import TransformerConfig
  from srm_jax.recipes import policy_gradient
  from srm_jax.recipes.context import Context
  from srm_jax.tasks import TASKS

  # Unrolled, the program is faster by a seventh; with oneDNN's products of bfloat16 it compiles for minutes.
  unroll = 1 if work.dtype == 'bfloat16' else work.model['num_layers']
  model = TransformerConfig(**work.model, dtype=work.dtype, max_length=work.row_tokens, unroll=unroll)
  # Padding is embedded, before it is masked: its id must be one that the model has.
  tokenizer = tokenizers.load(work.tokenizer)._replace(pad_id=0)
  TASKS['numbers'] = _numbers(work, turns)
  rollouts = base.rollouts(
      prompts=work.prompts, samples=work.samples, length=work.row_tokens, max_new_tokens=work.new_tokens,
  )
  section = base.grpo(base.data('numbers'), rollouts, clip_high=CLIP)
  recipe = policy_gradient.build(section, Context(model, tokenizer, 1, FOR_EVER))
  params = {'model': jax.jit(transformer.init_params, static_argnums=0)(model, jax.random.key(0))}
  turns.check(parameters=sum(leaf.size for leaf in jax.tree.leaves(params)), encode=tokenizer.encode)
  settings = optimizers.OptimizerConfig(
      name='adamw', learning_rate=LEARNING_RATE, matrix_learning_rate=0.0, schedule='constant', warmup_steps=0,
      weight_decay=0.0, b1=0.9, b2=0.999, clip_norm=CLIP_NORM,
  )
  tx = optimizers.make_optimizer(settings, FOR_EVER, {'model': transformer.param_names(model)})
  sample, mesh = turns.timed('rollout', recipe.source.next), sharding.make_mesh()
  whole = jax.NamedSharding(mesh, jax.P())
  step = jax.jit(
      train_step.build_train_step(recipe.objective, tx, microbatches=work.microbatches), donate_argnums=0,
      out_shardings=(whole, None),
  )
  with jax.set_mesh(mesh):
    state = jax.device_put(train_step.init_state(params, tx), whole)
    for number in itertools.count():
      if not turns.wait():
        return
      batch = sharding.shard_rows(sample(state.params, number), mesh)
      state, metrics = step(state, batch, {}, jax.random.fold_in(jax.random.key(1), number))
      tokens = metrics['completion_tokens']
      assert float(tokens.total) == work.rows * work.new_tokens and float(metrics['finite'].total) == 1, metrics
      jax.block_until_ready(state)
      turns.done(int(state.step))


def _numbers(work: Work, turns: Turns):
  """The prompts as a task."""
  from srm_jax.tasks import task
  from srm_jax.types import Problem

  problems = [Problem(str(i), text, '') for i, text in enumerate(prompts(work))]
  return task.Task(
      name='numbers', domain='math', splits=('train',), problems=lambda split, **_: problems,
      prompt=lambda problem: problem.question, solution=task.worked_solution, extract=str.strip,
      grade=lambda problem, text: turns.grade(text), first_wrong_step=task.no_step_oracle,
  )


def trl(work: Work, turns: Turns):
  """TRL's GRPOTrainer with generation by transformers: its own loop, held up at each step's end."""
  import transformers
  from trl import GRPOConfig, GRPOTrainer

  from experiments.benchmarks import peers
  from srm_jax.models.config import TransformerConfig

  class Hold(transformers.TrainerCallback):

    def on_train_begin(self, args, state, control, **_):
      turns.wait()

    def on_step_end(self, args, state, control, **_):
      turns.done(state.global_step)
      control.should_training_stop = not turns.wait()

  model = peers.llama(TransformerConfig(**work.model, max_length=work.row_tokens), dtype=work.weights)
  tokenizer = transformers.AutoTokenizer.from_pretrained(work.tokenizer)
  turns.check(parameters=sum(leaf.numel() for leaf in model.parameters()), encode=tokenizer.encode)
  with tempfile.TemporaryDirectory() as folder:
    config = GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=work.weights != work.dtype, gradient_checkpointing=False,
        per_device_train_batch_size=work.rows // work.microbatches, gradient_accumulation_steps=work.microbatches,
        num_generations=work.samples, max_completion_length=work.new_tokens,
        max_steps=FOR_EVER, learning_rate=LEARNING_RATE, lr_scheduler_type='constant', weight_decay=0.0,
        max_grad_norm=CLIP_NORM, beta=0.0, epsilon=CLIP, loss_type='grpo', use_vllm=False, logging_strategy='no',
        save_strategy='no', report_to='none', disable_tqdm=True,
    )
    # Comes with trl; by name, as nothing in setup.py asks for it.
    rows = importlib.import_module('datasets').Dataset.from_dict({'prompt': prompts(work)})
    trainer = GRPOTrainer(
        model=model, reward_funcs=lambda completions, **_: [turns.grade(text) for text in completions], args=config,
        train_dataset=rows, processing_class=tokenizer, callbacks=[Hold()],
    )
    trainer._generate = turns.timed('rollout', trainer._generate)
    trainer.train()


def tunix(work: Work, turns: Turns):
  """Tunix's GRPOLearner with its own sampler: its own loop, held up where it asks for the next step's prompts."""
  import jax
  import numpy as np
  import optax
  import transformers
  from flax import nnx

  clusters, rollouts, learners = (importlib.import_module(f'tunix.rl.{name}') for name in (
      'rl_cluster', 'rollout.base_rollout', 'grpo.grpo_learner'))
  mesh = jax.make_mesh((1, 1), ('fsdp', 'tp'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  with mesh:
    model = _tunix_model(work)
  tokenizer = transformers.AutoTokenizer.from_pretrained(work.tokenizer)
  turns.check(parameters=sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))), encode=tokenizer.encode)
  optimizer = optax.chain(optax.clip_by_global_norm(CLIP_NORM), optax.adamw(LEARNING_RATE, weight_decay=0.0))
  roles = clusters.Role
  config = clusters.ClusterConfig(
      role_to_mesh={role: mesh for role in (roles.ACTOR, roles.REFERENCE, roles.ROLLOUT)},
      training_config=clusters.RLTrainingConfig(
          actor_optimizer=optimizer, eval_every_n_steps=FOR_EVER, max_steps=FOR_EVER,
      ),
      rollout_config=rollouts.RolloutConfig(
          max_tokens_to_generate=work.new_tokens, max_prompt_length=work.prompt_tokens, temperature=1.0, top_p=1.0,
          kv_cache_size=work.row_tokens,
      ),
  )
  cluster = clusters.RLCluster(actor=model, tokenizer=tokenizer, cluster_config=config)
  cluster.generate = turns.timed('rollout', cluster.generate)
  learner = learners.GRPOLearner(
      cluster, learners.GRPOConfig(num_generations=work.samples, num_iterations=1, beta=0.0, epsilon=CLIP),
      reward_fns=lambda prompts, completions, **_: [turns.grade(text) for text in completions],
  )

  def batches():
    for start in itertools.cycle(range(0, DISTINCT * work.prompts, work.prompts)):
      if not turns.wait():
        return
      yield {'prompts': np.array(prompts(work)[start : start + work.prompts])}
      jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
      turns.done(cluster.actor_trainer.train_steps)

  learner.train(batches())


def _tunix_model(work: Work):
  import jax.numpy as jnp
  from flax import nnx

  qwen2, words = importlib.import_module('tunix.models.qwen2.model'), dict(work.model)
  config = qwen2.ModelConfig(
      hidden_dim=words.pop('mlp_dim'), **words, rope_theta=10_000, norm_eps=1e-6, use_tied_embedding=True,
      dtype=jnp.dtype(work.dtype), param_dtype=jnp.float32,
  )
  return qwen2.Qwen2(config, rngs=nnx.Rngs(0))


def product(work: Work, turns: Turns):
  """No side, but what bounds them: the largest product of the model with weights, PRODUCTS times."""
  import jax
  import jax.numpy as jnp

  inputs = jnp.ones((work.rows * work.row_tokens, work.model['embed_dim']), work.dtype)
  weights = jnp.ones((work.model['embed_dim'], work.model['mlp_dim']), work.dtype)
  multiply = jax.jit(jnp.matmul)
  while turns.wait():
    for _ in range(PRODUCTS):
      multiply(inputs, weights).block_until_ready()
    turns.tell()


SIDES = {'ours': ours, 'trl': trl, 'tunix': tunix, 'product': product}


def main():
  name, words = sys.argv[1:]
  told = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # libraries print what they like
  work = Work(**json.loads(words))
  if name != 'trl':
    runtime.prepare(bfloat16=work.dtype == 'bfloat16')
  SIDES[name](work, Turns(work, sys.stdin, told))


if __name__ == '__main__':
  main()
