"""Tiny runs for the tests above the model: two tasks of a few bytes, a one-layer model, and the configs around them."""

import contextlib
import functools
import hashlib
import random
import signal

import jax
import numpy as np
import pytest

from configs import base
from srm_jax import checkpoints, sharding
from srm_jax.models import transformer
from srm_jax.tasks import TASKS, graders, task
from srm_jax.train import step_flops
from srm_jax.types import Batch, Problem, Rollouts, TrainState

MODEL = dict(embed_dim=16, num_layers=1, num_heads=2, mlp_dim=32, max_length=64)


def _problems(split, *, count=None, seed=0):
  task.check_split('sums', split, ('train', 'dev', 'test'))
  names = {0: 'dev', 1: 'test'}
  pairs = [(a, b) for a in range(10) for b in range(10) if names.get((a + 3 * b) % 5, 'train') == split]
  random.Random(seed).shuffle(pairs)
  return [Problem(f'{a}+{b}', f'{a}+{b}', str(a + b), '', {'steps': 1 + (a + b > 9)}) for a, b in pairs][:count]


def _grade_sum(problem, text):
  return float(graders.extract_hash_answer(text) == problem.answer)


def _grade_parity(problem, text):
  """A reward that an untrained model earns half of the time, and sometimes none at all."""
  number = hashlib.sha256(f'{problem.id} {text}'.encode()).digest()[0]
  return None if number % 8 == 0 else float(number % 2)


def _task(name, grade):
  return task.Task(
      name=name, domain='math', splits=('train', 'dev', 'test'), problems=_problems, prompt=task.question_prompt,
      solution=task.worked_solution, extract=graders.extract_hash_answer, grade=grade,
      first_wrong_step=task.no_step_oracle,
  )


SUMS = _task('sums', _grade_sum)  # 'a+b' of two digits, 60 train problems; a prompt has 4 bytes, a solution 7 to 8
PARITY = _task('parity', _grade_parity)  # the same prompts


def register():
  """Adds the two tasks to TASKS, for a process that only these tests start."""
  TASKS.update(sums=SUMS, parity=PARITY)


@pytest.fixture(scope='module', autouse=True)
def tiny_tasks():
  """TASKS with the two tasks, for a test module that imports this fixture."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(TASKS, 'sums', SUMS)
    patch.setitem(TASKS, 'parity', PARITY)
    yield


@pytest.fixture(scope='module', autouse=True)
def one_device():
  """Runs use the first device, whatever the process has: one-device programs compile in half the time."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
    yield


def write_model(workdir, config, *, seed=0, scale=1.0, tokenizer='byte', extra=None):
  """A workdir as a finished training run leaves it, with random parameters, and with what it trained beside them."""
  params = jax.jit(transformer.init_params, static_argnums=0)(config, jax.random.key(seed))
  params = {**params, 'embedding': params['embedding'] * scale}  # the head is tied: above 1, samples are less even
  checkpoints.describe_model(workdir, config, tokenizer)
  opened = checkpoints.open_checkpoints(workdir)
  opened.save(TrainState(jax.numpy.asarray(7, jax.numpy.int32), {'model': params, **(extra or {})}, {}, None), {})
  opened.close()
  return str(workdir)


def data(name='sums', **options):
  return base.data(name, **{'count': 12, **options})


def batch(size=4, length=32, packing='plan'):
  return base.batch(size, length, packing)


def rollouts(**options):
  return base.rollouts(**{'prompts': 2, 'samples': 4, 'length': 16, 'max_new_tokens': 8, **options})


def train(recipe, *, num_steps=3, name='adamw', learning_rate=3e-3, model=None, **options):
  """A training run of a few steps."""
  optimizer = base.optimizer(name, learning_rate=learning_rate, warmup_steps=1, schedule='constant', weight_decay=0.0)
  return base.train(
      recipe, **{
          'tokenizer': 'byte', 'model': base.model(**{**MODEL, **(model or {})}), 'optimizer': optimizer,
          'num_steps': num_steps, 'progress': False, 'log_every': 1, 'checkpoint_every': 0, **options,
      },
  )


@contextlib.contextmanager
def stopped_after(steps):
  """The training run inside is interrupted, as by Ctrl-C, in its step of this number, and says so."""
  calls = []

  def interrupt(*args):
    calls.append(args)
    if len(calls) == steps:
      signal.raise_signal(signal.SIGINT)
    return step_flops(*args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('srm_jax.train.step_flops', interrupt)
    with pytest.raises(KeyboardInterrupt, match=f'stopped after step {steps}; the same command continues'):
      yield


def sft(**options):
  return train(base.sft(data(), batch()), **options)


def grpo(**options):
  return train(base.grpo(data('parity'), rollouts(), kl=0.0), **options)


def random_batch(seed=0, *, rows=8, length=16, vocab=64):
  """One ragged segment a row, supervised from the middle on; the last row is all padding."""
  rng = np.random.default_rng(seed)
  lengths = np.append(rng.integers(4, length + 1, rows - 1), 0)
  inside = np.arange(length) < lengths[:, None]
  tokens = rng.integers(1, vocab, (rows, length + 1))
  return Batch(
      inputs=np.where(inside, tokens[:, :-1], 0).astype(np.int32),
      targets=np.where(inside, tokens[:, 1:], 0).astype(np.int32),
      loss_mask=(inside & (np.arange(length) >= lengths[:, None] // 3)).astype(np.float32),
      positions=np.where(inside, np.arange(length), 0).astype(np.int32), segment_ids=inside.astype(np.int32),
  )


def random_rollouts(seed=0, **options):
  """Rollouts around `random_batch`: log-probabilities of a nearly uniform policy, one advantage a row."""
  made = random_batch(seed, **options)
  rng = np.random.default_rng(seed + 1)
  rows = len(made.inputs)
  noise = rng.normal(-4.2, 0.3, made.inputs.shape)
  return Rollouts(
      batch=made, sampler_logprobs=(noise * made.loss_mask).astype(np.float32),
      advantages=(rng.normal(size=(rows, 1)) * made.loss_mask).astype(np.float32),
      rewards=rng.integers(0, 2, rows).astype(np.float32), valid=(np.arange(rows) != 2).astype(np.float32),
      group=(np.arange(rows) // 2).astype(np.int32),
  )
