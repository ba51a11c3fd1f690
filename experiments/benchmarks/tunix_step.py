"""Runs in an environment that has Tunix: compiles its distillation step for a TPU topology, prints a line of JSON.

  python -m experiments.benchmarks.tunix_step '{"topology": "v5e:4x4", "rows": 64, "length": 4096, "fsdp": 16, ...}'

`experiments.benchmarks.tunix` makes the environment and calls this; srm_jax is not there and not needed. The step is
the one that `DistillationTrainer` jits, with what it donates (the optimizer), for a Qwen2.5-1.5B teacher and a
Qwen2.5-0.5B student. Forward functions, labels and masks are what Tunix asks of its users, written as its example does.
"""

import importlib
import json
import math
import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# By name: what setup.py does not install cannot be imported by a statement (see tests/architecture_test.py).
qwen2 = importlib.import_module('tunix.models.qwen2.model')
strategies = importlib.import_module('tunix.distillation.strategies')
distillation = importlib.import_module('tunix.distillation.distillation_trainer')
masks = importlib.import_module('tunix.sft.utils')

TINY = dict(num_layers=1, vocab_size=8, embed_dim=4, hidden_dim=4, num_heads=1, head_dim=4, num_kv_heads=1)


def model_inputs(x):
  inside = x.input_mask
  return dict(
      input_tokens=x.input_tokens, input_mask=inside, positions=masks.build_positions_from_mask(inside),
      attention_mask=masks.make_causal_attn_mask(inside),
  )


def forward(model, input_tokens, input_mask, positions, attention_mask):
  """Logits of the next tokens."""
  del input_mask
  return model(input_tokens, positions, None, attention_mask)[0][:, :-1]


def labels(vocab_size):
  def one_hot(input_tokens, input_mask, **_):
    return jax.nn.one_hot(input_tokens[:, 1:], vocab_size) * input_mask[:, 1:, None]

  return one_hot


def shapes(settings):
  """Tunix's configs of student and teacher."""
  student, teacher = qwen2.ModelConfig.qwen2p5_0p5b(), qwen2.ModelConfig.qwen2p5_1p5b()
  for config in (student, teacher):
    config.dtype, config.use_flash_attention = jnp.bfloat16, settings['splash']
  student.remat_config = qwen2.RematConfig.DECODER
  student.param_dtype, teacher.param_dtype = jnp.float32, jnp.bfloat16
  return student, teacher


def trainer_of(vocab_size, microbatches):
  """The trainer around models that are too small to matter: its step takes others as arguments."""
  tiny = lambda: qwen2.Qwen2(qwen2.ModelConfig(rope_theta=10_000, norm_eps=1e-6, **TINY), rngs=nnx.Rngs(0))
  strategy = strategies.LogitStrategy(forward, forward, labels(vocab_size), temperature=1.0, alpha=0.5)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))
  config = distillation.TrainingConfig(
      eval_every_n_steps=1000, max_steps=1000, gradient_accumulation_steps=microbatches if microbatches > 1 else None,
  )
  trainer = distillation.DistillationTrainer(tiny(), tiny(), strategy, optimizer, config)
  return trainer.with_gen_model_input_fn(model_inputs)


def placed(module, mesh):
  """The abstract module with its parameters' shardings."""
  graph, state = nnx.split(module)
  places = nnx.get_named_sharding(state, mesh)
  state = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places)
  return nnx.merge(graph, state)


def bytes_of_a_chip(module, mesh):
  leaves = jax.tree.leaves(nnx.state(placed(module, mesh)))
  return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in leaves)


def inputs_of(settings, vocab_size, mesh):
  """Tokens, mask and the teacher's logits of the next tokens, split over all chips."""
  rows, length = settings['rows'] // settings['microbatches'], settings['length']

  def array(shape, dtype, *axes):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

  return distillation.TrainingInput(
      input_tokens=array((rows, length), jnp.int32, 'fsdp'), input_mask=array((rows, length), jnp.bool_, 'fsdp'),
      teacher_output=array((rows, length - 1, vocab_size), jnp.float32, 'fsdp', None, 'tp'),
  )


def lowered(settings):
  """(the step, traced; what else is to be said of it: the chip's name, bytes of the teacher's weights on a chip)."""
  devices = list(topologies.get_topology_desc(platform='tpu', topology_name=settings['topology']).devices)
  jax.devices = lambda *_: devices  # Tunix leaves activations unconstrained where the first device is a CPU
  mesh = jax.make_mesh(
      (settings['fsdp'], settings['tensor']), ('fsdp', 'tp'), axis_types=(AxisType.Auto,) * 2, devices=devices,
  )
  student, teacher = shapes(settings)
  trainer = trainer_of(student.vocab_size, settings['microbatches'])

  def build():
    model = qwen2.Qwen2(student, rngs=nnx.Rngs(0))
    return model, nnx.Optimizer(model, trainer.optimizer.tx, wrt=nnx.Param)

  model, optimizer = (placed(module, mesh) for module in nnx.eval_shape(build))
  weights = bytes_of_a_chip(nnx.eval_shape(lambda: qwen2.Qwen2(teacher, rngs=nnx.Rngs(0))), mesh)
  inputs = inputs_of(settings, student.vocab_size, mesh)
  with mesh:
    step = nnx.jit(trainer.create_train_step_fn(), donate_argnames=('optimizer',))
    return step.lower(model, optimizer, inputs), dict(chip=devices[0].device_kind, teacher=weights)


def main(settings):
  step, found = lowered(settings)
  try:
    stats = step.compile().memory_analysis()
  except jax.errors.JaxRuntimeError as error:  # what does not fit is in the message; srm_jax.plan reads it
    found['error'] = str(error)
  else:
    names = ('argument', 'temp', 'output', 'alias', 'generated_code')
    found |= {name: getattr(stats, f'{name}_size_in_bytes') for name in names}
  print(json.dumps(found))


if __name__ == '__main__':
  main(json.loads(sys.argv[1]))
