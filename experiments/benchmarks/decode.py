"""Sampling speed beside Hugging Face transformers.

  python -m experiments.benchmarks.decode [--rounds=5] [--dtypes=float32,bfloat16]

6.8 M parameters (d=256, 6 layers, 4 heads, mlp 1024, vocabulary 2048), 64 prompts of 64 tokens, 128 new tokens each:
the whole distribution at temperature 1, log-probabilities of all sampled tokens, no early end. Both sides are warm.
Ours decodes the 64 rows as `make_generate` does by default: on a CPU of several cores, as two batches of 32 at once.
"""

import numpy as np
from absl import app, flags

from experiments import runtime
from experiments.benchmarks import peers, timing
from experiments.benchmarks.batches import Numbers
from srm_jax.models.config import TransformerConfig
from srm_jax.types import Prompt, SamplingParams

ROUNDS = flags.DEFINE_integer('rounds', 5, 'timed runs of each side', lower_bound=1)
DTYPES = flags.DEFINE_list('dtypes', ['float32', 'bfloat16'], 'compute types, the same on both sides')

BATCH, PROMPT, NEW = 64, 64, 128
SHAPE = dict(
    vocab_size=2048, num_layers=6, embed_dim=256, num_heads=4, num_kv_heads=4, head_dim=64, mlp_dim=1024, max_length=256
)


def ours(config: TransformerConfig, prompts: np.ndarray):
  """A function that samples NEW tokens for every prompt with srm_jax."""
  import jax

  from srm_jax import inference
  from srm_jax.models import transformer

  params = jax.jit(transformer.init_params, static_argnums=0)(config, jax.random.key(0))
  generate = inference.make_generate(config, params, Numbers, batch_size=BATCH, stop_at_eos=False)
  named = [Prompt(str(i), Numbers.decode(row)) for i, row in enumerate(prompts)]
  return lambda: generate(named, SamplingParams(max_new_tokens=NEW))


def compare(dtype: str, rounds: int) -> list[str]:
  """Lines of the table for one compute type."""
  prompts = np.random.default_rng(0).integers(1, SHAPE['vocab_size'], (BATCH, PROMPT))
  config = TransformerConfig(**SHAPE, dtype=dtype)
  runs = {'srm_jax': ours(config, prompts)}
  if peers.installed():
    runs['transformers'] = peers.sampler(config, prompts, max_new_tokens=NEW, dtype=dtype)
  timings = timing.interleaved(runs, rounds=rounds)
  lines = [
      f'{dtype:9} {name:13} {BATCH * NEW / took.wall:7.0f} tokens/s   '
      f'{took.wall:6.2f} s   {took.processor:6.2f} processor s'
      for name, took in timings.items()
  ]
  if 'transformers' in timings:
    lines.append(f'{dtype:9} ratio         {timings["transformers"].wall / timings["srm_jax"].wall:7.2f}')
  return lines


def main(argv):
  del argv
  runtime.prepare()
  print(f'{BATCH} prompts of {PROMPT} tokens, {NEW} new tokens each; medians of {ROUNDS.value} interleaved runs')
  for dtype in DTYPES.value:
    print('\n'.join(compare(dtype, ROUNDS.value)), flush=True)
  if not peers.installed():
    print(peers.MISSING)


if __name__ == '__main__':
  app.run(main)
