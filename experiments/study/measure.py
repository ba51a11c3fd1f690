"""What an arm's checkpoints say beyond its test accuracy: a curve over steps, entropy, and likeness to the teacher."""

import functools
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from srm_jax import checkpoints, metrics
from srm_jax.data.records import content_hash
from srm_jax.inference import make_generate
from srm_jax.losses.features import linear_cka
from srm_jax.models import transformer
from srm_jax.recipes.context import BatchConfig, Context, DataConfig, dataset, load_problems, open_data
from srm_jax.recipes.layer_terms import layer_map
from srm_jax.rollout import rollout
from srm_jax.schema import parse, resolve
from srm_jax.types import SamplingParams


def measured(arm, teacher, section: Mapping[str, Any]) -> dict[str, Any]:
  """{'curve': {step: dev accuracy}, 'entropy', 'divergence', 'cka': [a student layer each], 'measuring': seconds}.

  Kept beside the arm's checkpoints, so that it is measured once.

  Args:
    arm, teacher: workdirs of training runs.
    section: config.measure of a study: data, batch, new_tokens, decode_rows.
  """
  section = resolve(section)
  path = pathlib.Path(arm) / f'measured-{content_hash(section)[:10]}.json'
  if not path.exists():
    data, start = parse(DataConfig, section['data'], 'measure.data'), time.perf_counter()
    found = {
        'curve': curve(arm, data, section['new_tokens'], section['decode_rows']),
        **likeness(arm, teacher, data, parse(BatchConfig, section['batch'], 'measure.batch')),
    }
    checkpoints.write_whole(path, json.dumps(found | {'measuring': time.perf_counter() - start}))
  return json.loads(path.read_text())


def curve(folder, data: DataConfig, new_tokens: int, decode_rows: int) -> dict[str, float]:
  """{step: greedy accuracy} of all checkpoints that a run has kept."""
  config, tokenizer = checkpoints.model_config(folder), checkpoints.model_tokenizer(folder)
  prompting, problems = open_data(data, tokenizer), load_problems(data)
  greedy = SamplingParams(temperature=0.0, max_new_tokens=new_tokens, samples=1, seed=0)
  saved, found = checkpoints.open_checkpoints(folder), {}
  try:
    for step in sorted(saved.manager.all_steps()):
      params = saved.restore_params(step, {'model': transformer.param_names(config)})['model']
      generate = make_generate(config, params, tokenizer, batch_size=decode_rows)
      groups = rollout(generate, prompting, problems, greedy)
      found[str(step)] = float(np.mean([group[0].reward == 1.0 for group in groups]))
  finally:
    saved.close()
  return found


def likeness(arm, teacher, data: DataConfig, batch: BatchConfig) -> dict[str, Any]:
  """Of a student on held-out worked solutions: its entropy and KL(student || teacher) a token in nats, and linear CKA
  of each layer to the teacher's layer at the same relative depth.
  """
  student, frozen = checkpoints.load_model(arm), checkpoints.load_model(teacher)
  context = Context(student.config, student.tokenizer, 0, 1)
  rows = jax.tree.map(jnp.asarray, dataset(data, batch, context).next(None, 0))
  found = _compare(student.config, frozen.config, student.params, frozen.params, rows)
  return jax.tree.map(float, found)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compare(config, teacher_config, params, teacher_params, batch):
  ours, theirs = (_forward(c, p, batch) for c, p in ((config, params), (teacher_config, teacher_params)))
  mine, others = (jax.nn.log_softmax(output.logits) for output in (ours, theirs))
  mean = lambda values: jnp.sum(values * batch.loss_mask) / jnp.sum(batch.loss_mask)
  pairs = layer_map('skip', config.num_layers, teacher_config.num_layers)
  return {
      'entropy': mean(-jnp.sum(jnp.exp(mine) * mine, axis=-1)),
      'divergence': mean(jnp.sum(jnp.exp(mine) * (mine - others), axis=-1)),
      'cka': [1 - linear_cka(ours.taps['hidden'][s], theirs.taps['hidden'][t], batch.loss_mask) for s, t in pairs],
  }


def _forward(config, params, batch):
  return transformer.Transformer(config).apply(
      {'params': params}, batch.inputs, positions=batch.positions, segment_ids=batch.segment_ids, taps=('hidden',),
  )


def training_cost(folder) -> dict[str, float]:
  """{'flops', 'seconds'} of a training run; seconds by its median step, so that compiling does not count."""
  rows = metrics.read(folder)
  steps = [row['seconds_per_step'] for row in rows]
  return {'flops': rows[-1]['flops'], 'seconds': float(np.median(steps)) * rows[-1]['step']}
