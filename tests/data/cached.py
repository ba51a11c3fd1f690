"""A small teacher and what it predicts, for tests of its cache; a process of its own imports it to be killed."""

import dataclasses

import numpy as np
from scipy import special

from srm_jax.data import packing, teacher_cache, teacher_shards
from srm_jax.data.teacher_cache import Identity, writer

VOCAB, K, EOS = 300, 8, 1


def make_examples(count=11, *, seed=0):
  """Prompts and completions; the one with number 3 has no completion, so no row."""
  generator, examples = np.random.default_rng(seed), []
  for number in range(count):
    prompt, completion = (generator.integers(2, VOCAB, size) for size in generator.integers(1, 9, 2))
    completion, end = (completion[:0], None) if number == 3 else (completion, EOS)
    examples.append(packing.from_prompt_completion(f'e{number}', prompt, completion, end))
  return examples


def logits_of(example):
  """The dense teacher at the supervised targets: a function of the token before each and its position."""
  before = np.flatnonzero(np.append(example.loss_mask[1:], False))
  seeds = [(int(example.tokens[i]), int(i)) for i in before]
  return np.array([np.random.default_rng(seed).normal(0, 3, VOCAB) for seed in seeds]).reshape(len(seeds), VOCAB)


def top_of(example):
  logprobs = special.log_softmax(logits_of(example), axis=1) if example.loss_mask.any() else np.empty((0, VOCAB))
  ids = np.argsort(-logprobs, axis=1)[:, :K]
  return ids, np.take_along_axis(logprobs, ids, axis=1).astype(np.float32)


def identity_of(examples, **changes):
  plain = Identity(
      teacher='t1', tokenizer='v1', data=teacher_cache.data_hash(examples), vocab_size=VOCAB, k=K, temperature=1.0)
  return dataclasses.replace(plain, **changes)


def write(folder, examples, *, shard_examples=4, stop=None, **changes):
  """Writes a cache; with `stop` the writer fails before that many examples."""
  with writer(folder, identity_of(examples, **changes), shard_examples=shard_examples) as out:
    for number, example in enumerate(examples):
      if number == stop:
        raise InterruptedError
      if example.id not in out.finished:
        out.append(example, *top_of(example))


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def shards(folder):
  return {name: raw for name, raw in contents(folder).items() if name != teacher_shards.MANIFEST}
