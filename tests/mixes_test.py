"""Configs of several data sets or teachers run, and their terms count the rows that they name."""

import importlib
import pathlib

import jax
import numpy as np
import pytest

from configs import base
from configs.distill import papers
from srm_jax import schema
from srm_jax.data import records, tokenizer
from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import context, distill, on_policy_distill
from srm_jax.tasks import TASKS
from srm_jax.train import train
from srm_jax.train_step import value_and_grad
from srm_jax.types import SamplingParams
from tests import tiny
from tests.tiny import one_device, tiny_tasks  # noqa: F401

MODEL = TransformerConfig(258, 1, 16, 2, 2, 8, 32)


def smoke(name, arg='smoke'):
  """The smallest form of a config, with a smaller student yet."""
  config = importlib.import_module(f'configs.distill.{name}').get_config(arg)
  config.model = base.model(**{**tiny.MODEL, 'max_length': 256})
  config.log_every, config.progress = 1, False
  return config


def write_chains(path, *, rates=(1.0,)):
  """Annotations of ten problems a rate, each with four samples of which that share is right."""
  problems = TASKS['arithmetic_mix'].problems('train', count=10 * len(rates), seed=5)
  records.write(path, [
      records.Annotation(
          problem=problem, prompt='p', completion=f'a\n#### {problem.answer}', num_tokens=9,
          correct=sample < 4 * rates[number // 10], finished=True, teacher=records.Teacher('t', 1, 'h'),
          sampling=SamplingParams(), sample=sample, config_hash='c',
      )
      for number, problem in enumerate(problems) for sample in range(4)
  ])
  return str(path)


def model(folder, seed):
  return tiny.write_model(folder, TransformerConfig(258, 1, 16, 2, 2, 8, 32, max_length=256), seed=seed)


def test_step_by_step_runs(tmp_path):
  run = train(smoke('step_by_step'), tmp_path)
  last = run.metrics[-1]
  assert {'answer', 'rationale'} <= last.keys() and last['finite'] == 1.0


def test_mixed_chains_run(tmp_path):
  config = smoke('mixed_chains')
  for name in ('long', 'short'):
    config.recipe.data.mix[name].data.records = write_chains(tmp_path / f'{name}.jsonl')
  assert train(config, tmp_path / 'run').metrics[-1]['finite'] == 1.0


def test_a_curriculum_begins_with_the_easy(tmp_path):
  config, path = smoke('curriculum'), write_chains(tmp_path / 'a.jsonl', rates=(1.0, 0.5))
  for part in config.recipe.data.mix.values():
    part.data.records = path
  data = schema.parse(context.DataConfig, config.recipe.data, 'data')
  asked = context.Context(MODEL, tokenizer.load('byte'), 0, 4)
  source = context.dataset(data, schema.parse(context.BatchConfig, config.recipe.batch, 'batch'), asked)
  hard = [int(source.next(None, step).sources.max(axis=1).sum()) for step in range(4)]
  assert hard[0] == 0 and hard == sorted(hard) and hard[-1] == 2
  assert train(config, tmp_path / 'run').metrics[-1]['finite'] == 1.0


def test_every_domain_has_its_teacher(tmp_path):
  config = smoke('several_teachers')
  for seed, (name, teacher) in enumerate(sorted(config.recipe.teacher.items())):
    teacher.folder = model(tmp_path / name, seed)
  run = train(config, tmp_path / 'run')
  assert run.metrics[-1]['forward_kl'] > 0 and run.metrics[-1]['finite'] == 1.0


def test_shares_follow_the_student(tmp_path):
  config = smoke('adaptive')
  config.recipe.teacher = model(tmp_path / 'teacher', 3)
  assert train(config, tmp_path / 'run').metrics[-1]['finite'] == 1.0


@pytest.mark.parametrize('paper', papers.PAPERS)
def test_the_losses_of_papers_are_sound(paper, tmp_path):
  config = smoke('papers', f'smoke,paper={paper}')
  if config.recipe.name == 'on_policy_distill':  # what samples takes longer, and runs in on_policy_distill_test
    parsed = schema.parse(on_policy_distill.OnPolicyDistillConfig, config.recipe, 'recipe')
    assert distill.open_terms(parsed.loss, MODEL, MODEL)
    return
  config.recipe.teacher = model(tmp_path / 'teacher', 3)
  run = train(config, tmp_path / 'run')
  assert set(config.recipe.loss.terms) <= run.metrics[-1].keys() and run.metrics[-1]['finite'] == 1.0


def test_all_configs_of_mixes_are_run_here():
  folder = pathlib.Path(__file__).parents[1] / 'configs' / 'distill'
  found = {path.stem for path in folder.glob('*.py') if 'base.mix(' in path.read_text()}
  assert found == {'step_by_step', 'mixed_chains', 'curriculum', 'several_teachers', 'adaptive'}


@pytest.mark.parametrize('source, other', [('law', 'math'), ('math', 'law')])
def test_a_term_counts_the_tokens_of_its_part(source, other):
  """Its value and gradient do not depend on what the other part holds."""
  batch, names = tiny.random_batch(), ('law', 'math')
  sources = np.tile((np.arange(16) >= 9).astype(np.int32), (8, 1))
  small = TransformerConfig(64, 1, 16, 2, 2, 8, 32)
  loss = schema.parse(distill.LossConfig, base.loss(own=base.term('cross_entropy', 1.0, rows=source)), 'loss')
  objective = distill.objective(loss, small, None, sources=names)
  params = {'model': jax.jit(transformer.init_params, static_argnums=0)(small, jax.random.key(0))}
  run = jax.jit(lambda batch: value_and_grad(objective, params, batch, {}, jax.random.key(0)))
  plain = jax.jit(lambda batch: value_and_grad(
      distill.objective(schema.parse(distill.LossConfig, base.loss(
          own=base.term('cross_entropy', 1.0)), 'loss'), small, None), params, batch, {}, jax.random.key(0)))
  found = run(batch._replace(sources=sources))
  alone = plain(batch._replace(loss_mask=batch.loss_mask * (sources == names.index(source))))
  np.testing.assert_allclose(found[0], alone[0], rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found[1], alone[1])
  assert found[2]['own'].count == (batch.loss_mask * (sources != names.index(other))).sum()
