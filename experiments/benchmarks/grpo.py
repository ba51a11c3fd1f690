"""One whole GRPO step (rollout, scoring, update) beside TRL's GRPOTrainer and Tunix's GRPOLearner, on this CPU.

  python -m experiments.benchmarks.grpo [--rounds=5] [--dtype=float32,bfloat16] [--sides=ours,trl,tunix] [--smoke]

6.8 M parameters (d=256, 6 layers, 4 heads, mlp 1024, vocabulary 2048), random weights; 8 prompts of 53 tokens, 8
completions each, which all reach 128 tokens: end-of-text is an id that no model has. All sides sample from the whole
distribution at temperature 1, grade the decoded text by the same Python function, and take one step of AdamW on all 64
rows, with clipped gradients, the advantage over its group's deviation, the mean over a completion's tokens and no
penalty. Each runs in a process of its own through its public trainer, held up between steps, so that they take turns; a
side that samples, scores or steps otherwise than asked stops the benchmark.

What differs. Ours runs each prompt once, in sampling and in the update, the others in every row; on several cores it
decodes two batches side by side; it also returns the sampler's log-probabilities, and its ratio is to those, where the
others' ratio is to themselves, which is 1. TRL's model is transformers' Llama, Tunix's its Qwen2 (biases on queries,
keys and values). Gradient checkpointing, which is TRL's default, is off; Tunix's cache is no longer than a row. In
bfloat16 ours and Tunix keep float32 weights; TRL runs both by autocast and with bfloat16 weights; a side whose first
step takes longer than --patience, which then is most of compiling too, is timed by that step alone.

Ours takes its update in four microbatches of two groups, the same gradient up to rounding: temporaries of all rows at
once, 2 GB, are asked for anew at each step, and finding the pages takes up to half of the update again. TRL runs both
ways, too (`parts`: gradients accumulated over four), and the ratio is to the fastest. Tunix runs as it comes.

The update is what is neither sampling (decoding of text included) nor grading. GFLOP/s are of the least work: each
prompt run once, no padding. The line of a single product says what the processor gives at most.

TRL needs pip install -e '.[bench]'; Tunix gets an environment of its own (`tunix_environment`), 2 GB.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from absl import app, flags

from experiments import command
from experiments.benchmarks import peers, timing
from experiments.benchmarks.grpo_sides import PARTS, PRODUCTS, Work, write_tokenizer
from experiments.benchmarks.tunix_environment import ROOT, cache, environment
from srm_jax.models.config import TransformerConfig, active_params, forward_flops, num_params, train_flops

NAMES = ['ours', 'trl', 'tunix']
SHAPE = dict(vocab_size=2048, num_layers=6, embed_dim=256, num_heads=4, num_kv_heads=4, head_dim=64, mlp_dim=1024)
TINY = dict(vocab_size=64, num_layers=1, embed_dim=64, num_heads=2, num_kv_heads=2, head_dim=32, mlp_dim=128)
FULL_STEP = dict(model=SHAPE, prompts=8, samples=8, prompt_tokens=53, new_tokens=128, microbatches=4)
SMOKE_STEP = dict(model=TINY, prompts=2, samples=4, prompt_tokens=5, new_tokens=8, microbatches=2)


class Least(NamedTuple):
  """What a step cannot do without: FLOPs of its parts, and bytes of weights and cache that its decoding reads."""

  rollout: float
  update: float
  read: float


def least(work: Work) -> Least:
  """Each prompt run once, all rows decoded together, no padding; a sampled token attends to its prompt and, on average,
  half of its completion.
  """
  model, size = TransformerConfig(**work.model), 2 if work.dtype == 'bfloat16' else 4
  prefilled, sampled = work.prompts * (work.prompt_tokens - 1), work.rows * work.new_tokens
  context = work.prompt_tokens + work.new_tokens / 2
  cached = 2 * model.num_layers * model.num_kv_heads * model.head_dim * context
  return Least(
      forward_flops(model, prefilled, (work.prompt_tokens - 1) / 2) + forward_flops(model, sampled, context),
      train_flops(model, prefilled, (work.prompt_tokens - 1) / 2) + train_flops(model, sampled, context),
      size * work.new_tokens * (active_params(model) + work.rows * cached),
  )


class Side:
  """A process of `grpo_sides` that takes one step a call, and the reports of its steps."""

  def __init__(self, name: str, work: Work, *, python=sys.executable):
    words = [python, '-m', 'experiments.benchmarks.grpo_sides', name, json.dumps(dataclasses.asdict(work))]
    self.name, self.reports, self.said = name, [], tempfile.TemporaryFile('w+')
    self.process = subprocess.Popen(
        words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True,
        env=os.environ | {'JAX_PLATFORMS': 'cpu', 'HF_HUB_OFFLINE': '1'},
    )

  def __call__(self):
    with contextlib.suppress(BrokenPipeError):  # what it died of is on stderr
      print(file=self.process.stdin, flush=True)
    line = self.process.stdout.readline()
    if not line:
      self.process.wait()
      self.said.seek(0)
      raise RuntimeError(f'{self.name} stopped in step {len(self.reports) + 1}:\n{self.said.read()[-4000:]}')
    self.reports.append(json.loads(line))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    with contextlib.suppress(BrokenPipeError):
      self.process.stdin.close()
    try:
      self.process.wait(60)
    except subprocess.TimeoutExpired:
      self.process.kill()


def starters(work: Work, sides: Sequence[str]) -> dict[str, Callable[[], Side]]:
  """{label: what starts a side asked for}, ours first; `product` is no side, but what bounds them."""
  found = {'srm_jax': functools.partial(Side, 'ours', work)} if 'ours' in sides else {}
  if 'trl' in sides and peers.installed('trl'):
    ways = {'TRL': (work.dtype, 1), 'TRL parts': (work.dtype, work.microbatches)}
    if work.dtype != 'float32':
      ways = {'TRL autocast': ('float32', 1), 'TRL weights': ways['TRL'], 'TRL w. parts': ways['TRL parts']}
    for label, (weights, parts) in ways.items():
      found[label] = functools.partial(Side, 'trl', dataclasses.replace(work, weights=weights, microbatches=parts))
  if 'tunix' in sides:
    found['Tunix'] = functools.partial(Side, 'tunix', work, python=environment(cache()))
  return found | {'product': functools.partial(Side, 'product', work)}


def line(label: str, took: timing.Timing, reports: list[Mapping[str, float]], needed: Least) -> str:
  """Seconds of a step and of its parts: medians of the timed reports, which are the last."""
  timed = reports[-took.rounds :]
  part = {name: statistics.median(report.get(name, 0.0) for report in timed) for name in (*PARTS, 'processor')}
  rate = lambda name, flops: f'{part[name]:7.3f} s ({flops / part[name] / 1e9:6.1f} GFLOP/s)'
  return (
      f'{label:13} {took.wall:7.3f} s   rollout {rate("rollout", needed.rollout)}   scoring {part["scoring"]:6.3f} s   '
      f'update {rate("update", needed.update)}   {part["processor"]:7.3f} processor s'
      f'{"" if len(reports) > 1 else "   (its first step only)"}'
  )


def ratios(timings: Mapping[str, timing.Timing]) -> str:
  """How many times ours is as fast as the fastest of each peer."""
  fastest = lambda peer: min((took.wall for label, took in timings.items() if label.startswith(peer)), default=None)
  walls = {peer: fastest(peer) for peer in ('TRL', 'Tunix')}
  return ', '.join(f'{wall / timings["srm_jax"].wall:.2f} x {peer}' for peer, wall in walls.items() if wall)


def compare(work: Work, sides: Sequence[str], *, rounds: int, patience: float) -> list[str]:
  """Lines of the table for one compute type."""
  needed, model = least(work), TransformerConfig(**work.model)
  with contextlib.ExitStack() as stack:
    runs = {label: stack.enter_context(start()) for label, start in starters(work, sides).items()}
    timings = timing.interleaved(runs, rounds=rounds, patience=patience)
  alone = timings.pop('product')
  product = PRODUCTS * 2 * work.rows * work.row_tokens * model.embed_dim * model.mlp_dim
  lines = [
      f'{work.dtype}: rollout {needed.rollout / 1e9:.1f} GFLOP and {needed.read / 1e9:.1f} GB read, update '
      f'{needed.update / 1e9:.1f} GFLOP; a product of {work.rows * work.row_tokens} x {model.embed_dim} x '
      f'{model.mlp_dim} alone {product / alone.wall / 1e9:.1f} GFLOP/s',
      *(line(label, took, runs[label].reports, needed) for label, took in timings.items()),
  ]
  return lines + ([f'speed of srm_jax: {ratios(timings)}'] if 'srm_jax' in timings and len(timings) > 1 else [])


def run(sides: Sequence[str], dtypes: Sequence[str], *, rounds: int, patience: float, smoke: bool):
  """Prints the table of every compute type."""
  unknown = set(sides) - set(NAMES)
  if unknown:
    raise ValueError(f'--sides has {sorted(unknown)}; choose from {NAMES}')
  chosen, rounds = (SMOKE_STEP, 1) if smoke else (FULL_STEP, rounds)
  print(
      f'{num_params(TransformerConfig(**chosen["model"])) / 1e6:.2f} M parameters, {chosen["prompts"]} prompts of '
      f'{chosen["prompt_tokens"]} tokens x {chosen["samples"]} completions of {chosen["new_tokens"]}; '
      f'medians of {rounds} interleaved steps', flush=True,
  )
  with tempfile.TemporaryDirectory() as folder:
    write_tokenizer(pathlib.Path(folder), chosen['model']['vocab_size'])
    for dtype in dtypes:
      work = Work(**chosen, dtype=dtype, weights='float32', tokenizer=folder)
      print('\n'.join(compare(work, sides, rounds=rounds, patience=patience)), flush=True)
  if 'trl' in sides and not peers.installed('trl'):
    print(peers.MISSING)


def launch():
  """Flags are defined here, as other benchmarks that a test imports have some of the same names."""
  rounds = flags.DEFINE_integer('rounds', 5, 'timed steps of each side', lower_bound=1)
  dtypes = flags.DEFINE_list('dtype', ['float32', 'bfloat16'], 'compute types, the same on all sides')
  sides = flags.DEFINE_list('sides', NAMES, 'what to compare')
  patience = flags.DEFINE_float('patience', 300.0, 'seconds of a first step after which a side is not timed again')
  smoke = flags.DEFINE_bool('smoke', False, 'a tiny model, two prompts and one round: shows that all sides run')

  def main(argv):
    del argv
    command.guarded(lambda: run(
        sides.value, dtypes.value, rounds=rounds.value, patience=patience.value, smoke=smoke.value,
    ))

  app.run(main)


if __name__ == '__main__':
  launch()
