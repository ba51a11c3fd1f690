"""Training speed beside PyTorch with Hugging Face transformers.

  python -m experiments.benchmarks.train_step [--rounds=5] [--dtypes=float32,bfloat16] [--shape=peer]

Shape `peer`: 6.8 M parameters (d=256, 6 layers, 4 heads, mlp 1024, vocabulary 2048), batches of 32 x 256. Both sides
take the same steps: forward, cross-entropy, backward, AdamW. Ours is the train step of every recipe, with its masks,
gradient norm and check for NaN. In bfloat16 PyTorch runs both with autocast and with bfloat16 weights; the ratio is to
the faster. Without instructions for bfloat16 PyTorch takes minutes a step: a side whose first step takes longer than
--patience is timed by that step alone, and its line says so.
"""

import dataclasses

from absl import app, flags

from experiments import runtime
from experiments.benchmarks import peers, timing
from experiments.benchmarks.batches import make_batch
from srm_jax.models.config import TransformerConfig, num_params, train_flops
from srm_jax.types import Batch

ROUNDS = flags.DEFINE_integer('rounds', 5, 'timed steps of each side', lower_bound=1)
DTYPES = flags.DEFINE_list('dtypes', ['float32', 'bfloat16'], 'compute types, the same on both sides')
PATIENCE = flags.DEFINE_float('patience', 60.0, 'seconds of a first step after which a side is not timed again')
ROWS = flags.DEFINE_integer('rows', 32, 'rows of a batch', lower_bound=1)
SHAPE = flags.DEFINE_enum(
    'shape', 'peer', ['peer', 'teacher', 'student'], 'which model; the last two are a quickstart\'s',
)
PEERS = flags.DEFINE_bool('peers', True, 'also time PyTorch')

LEARNING_RATE = 1e-3
# name -> (model, length of a row)
SHAPES = {
    'peer': (TransformerConfig(
        2048, num_layers=6, embed_dim=256, num_heads=4, num_kv_heads=4, head_dim=64, mlp_dim=1024, unroll=6,
    ), 256),
    'teacher': (TransformerConfig(
        512, num_layers=4, embed_dim=128, num_heads=4, num_kv_heads=4, head_dim=32, mlp_dim=384, unroll=4,
    ), 128),
    'student': (TransformerConfig(
        512, num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=4, head_dim=16, mlp_dim=192, unroll=2,
    ), 128),
}


def ours(config: TransformerConfig, batch: Batch):
  """A function that takes one step of srm_jax."""
  import jax

  from srm_jax import optimizers, train_step
  from srm_jax.models import transformer
  from srm_jax.recipes import sft

  settings = optimizers.OptimizerConfig(
      name='adamw', learning_rate=LEARNING_RATE, matrix_learning_rate=0.0, schedule='constant', warmup_steps=0,
      weight_decay=0.01, b1=0.9, b2=0.999, clip_norm=0.0,
  )
  params = {'model': jax.jit(transformer.init_params, static_argnums=0)(config, jax.random.key(0))}
  tx = optimizers.make_optimizer(settings, 1000, {'model': transformer.param_names(config)})
  step = jax.jit(train_step.build_train_step(sft.objective(config, head_chunk=None), tx), donate_argnums=0)
  state, batch, key = train_step.init_state(params, tx), jax.device_put(batch), jax.random.key(1)

  def run():
    nonlocal state
    state, metrics = step(state, batch, {}, key)
    jax.block_until_ready((state, metrics))

  return run


def torch_step(config: TransformerConfig, batch: Batch, *, weights: str, autocast: bool):
  """A function that takes one step of PyTorch's AdamW on a transformers Llama."""
  import torch

  model = peers.llama(config, dtype=weights).train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=0.01)
  inputs, targets = (torch.as_tensor(field, dtype=torch.long) for field in (batch.inputs, batch.targets))

  def run():
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
      loss = model(input_ids=inputs, labels=targets, shift_labels=targets).loss
    loss.backward()
    optimizer.step()

  return run


def competitors(config: TransformerConfig, batch: Batch):
  """{name: function that takes one step}, ours first."""
  runs = {'srm_jax': ours(config, batch)}
  if not PEERS.value or not peers.installed():
    return runs
  if config.dtype == 'float32':
    return runs | {'torch': torch_step(config, batch, weights='float32', autocast=False)}
  return runs | {
      'torch autocast': torch_step(config, batch, weights='float32', autocast=True),
      'torch weights': torch_step(config, batch, weights=config.dtype, autocast=False),
  }


def compare(config: TransformerConfig, length: int, rounds: int) -> list[str]:
  """Lines of the table for one compute type."""
  batch = make_batch(config.vocab_size, ROWS.value, length)
  timings = timing.interleaved(competitors(config, batch), rounds=rounds, patience=PATIENCE.value)
  flops = train_flops(config, batch.inputs.size, context=length / 2)
  lines = [
      f'{config.dtype:9} {name:15} {batch.inputs.size / took.wall:8.0f} tokens/s   {took.wall:7.3f} s   '
      f'{took.processor:7.3f} processor s   {flops / took.processor / 1e9:6.1f} GFLOP per processor s'
      f'{"" if took.rounds == rounds else "   (its first step only)"}'
      for name, took in timings.items()
  ]
  if len(timings) > 1:
    mine = timings.pop('srm_jax')
    fastest = min(timings, key=lambda name: timings[name].wall)
    theirs = timings[fastest]
    lines.append(
        f'{config.dtype:9} ratio to {fastest}: {theirs.wall / mine.wall:.2f} by the clock, '
        f'{theirs.processor / mine.processor:.2f} by processor time'
    )
  return lines


def main(argv):
  del argv
  runtime.prepare(bfloat16='bfloat16' in DTYPES.value)
  shape, length = SHAPES[SHAPE.value]
  print(
      f'{num_params(shape) / 1e6:.2f} M parameters, batches of {ROWS.value} x {length}; '
      f'medians of {ROUNDS.value} interleaved steps'
  )
  for dtype in DTYPES.value:
    print('\n'.join(compare(dataclasses.replace(shape, dtype=dtype), length, ROUNDS.value)), flush=True)
  if PEERS.value and not peers.installed():
    print(peers.MISSING)


if __name__ == '__main__':
  app.run(main)
