"""Data sections become examples: whose completion is learnt, which annotations count, and where loss lies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from srm_jax import checkpoints, schema
from srm_jax.data import records, tokenizer
from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import context
from srm_jax.types import SamplingParams, TrainState
from tests import tiny
from tests.tiny import tiny_tasks  # noqa: F401

BYTES = tokenizer.load('byte')
MODEL = TransformerConfig(258, 1, 16, 2, 2, 8, 32)
CONTEXT = context.Context(MODEL, BYTES, 1, 10)
PROBLEMS = tiny.SUMS.problems('train', count=3)


def annotation(problem, sample, completion, correct, *, finished=True):
  return records.Annotation(
      problem=problem, prompt=tiny.SUMS.prompt(problem), completion=completion, num_tokens=9, correct=correct,
      finished=finished, teacher=records.Teacher('t', 1, 'h'), sampling=SamplingParams(), sample=sample,
      config_hash='c',
  )


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  """Two right samples of the first problem (and a copy of one), a cut one of the second, none that is right of the
  third.
  """
  path = tmp_path_factory.mktemp('records') / 'annotations.jsonl'
  first, second, third = PROBLEMS
  records.write(path, [
      annotation(first, 0, 'one way', True), annotation(first, 1, 'another way', True),
      annotation(first, 2, 'one way', True), annotation(first, 3, 'wrong', False),
      annotation(second, 0, 'cut sho', True, finished=False),
      annotation(third, 0, 'wrong', False), annotation(third, 1, 'who knows', None),
  ])
  return str(path)


def section(**options):
  return schema.parse(context.DataConfig, tiny.data(**options), 'data')


def test_gold_solutions():
  worked = context.worked_examples(section(count=3))
  assert [(item.problem, item.completion, item.finished) for item in worked] == [
      (problem, f'#### {problem.answer}', True) for problem in tiny.SUMS.problems('train', count=3, seed=1)
  ]


def test_right_annotations_without_repetitions(path):
  worked = context.worked_examples(section(records=path, target='completion'))
  assert sorted((item.problem.id, item.completion, item.finished) for item in worked) == sorted([
      (PROBLEMS[0].id, 'one way', True), (PROBLEMS[0].id, 'another way', True), (PROBLEMS[1].id, 'cut sho', False),
  ])
  assert len({item.id for item in worked}) == 3


def test_gold_for_the_same_prompts(path):
  """The control of distillation: the prompts of the right annotations, with the problems' own solutions."""
  worked = context.worked_examples(section(records=path, target='solution'))
  expected = [(problem, f'#### {problem.answer}') for problem in PROBLEMS[:2]]
  assert [(item.problem, item.completion) for item in worked] == expected


def test_problems_of_a_file_are_all_of_them_once(path):
  assert context.load_problems(section(records=path)) == PROBLEMS
  assert context.load_problems(section(count=0)) == tiny.SUMS.problems('train', seed=1)


@pytest.mark.parametrize('options, message', [
    (dict(task='sum'), r"task 'sum' unknown \(did you mean 'sums'"),
    (dict(target='text'), "data.target 'text' unknown"), (dict(target='completion'), 'needs data.records'),
    (dict(records='/nowhere.jsonl'), 'run the annotation first'),
])
def test_wrong_sections(options, message):
  options = dict(options)
  with pytest.raises(schema.ConfigError, match=message):
    context.worked_examples(section(**{'name': options.pop('task', 'sums'), **options}))


def test_unfiltered_targets_learn_from_wrong_annotations_too(tmp_path):
  path = str(tmp_path / 'annotations.jsonl')
  records.write(path, [annotation(problem, 0, 'no idea', False) for problem in PROBLEMS[:2]])
  with pytest.raises(schema.ConfigError, match='nothing to learn from'):
    context.worked_examples(section(records=path, target='completion'))
  own = context.worked_examples(section(records=path, target='unfiltered_completion'))
  assert [item.completion for item in own] == ['no idea'] * 2
  gold = context.worked_examples(section(records=path, target='unfiltered_solution'))
  assert [item.completion for item in gold] == [f'#### {problem.answer}' for problem in PROBLEMS[:2]]


def test_loss_lies_on_the_completion_and_its_end():
  prompt = tiny.SUMS.prompt(PROBLEMS[0])
  asked = context.open_data(section(), BYTES)
  whole, cut = (asked.example('x', PROBLEMS[0], 'ab', finished=finished) for finished in (True, False))
  assert whole.tokens.tolist() == [*prompt.encode(), *b'ab', BYTES.eos_id]
  assert cut.tokens.tolist() == [*prompt.encode(), *b'ab']  # what the length limit cut must not learn to end
  for example in (whole, cut):
    np.testing.assert_array_equal(example.loss_mask, np.arange(len(example.tokens)) >= len(prompt))


@pytest.mark.parametrize('packing', context.PLANS)
def test_data_sets_hold_every_example(packing):
  batch = schema.parse(context.BatchConfig, base.batch(6, 24, packing), 'batch')
  source = context.dataset(section(count=6), batch, CONTEXT)
  found = source.next(None, 0)
  assert found.inputs.shape == (6, 24)
  supervised = sum(len(f'#### {problem.answer}') + 1 for problem in tiny.SUMS.problems('train', count=6, seed=1))
  assert (found.loss_mask.sum() == supervised) == (packing == 'one_per_row')
  assert found.segment_ids.max() == (2 if packing == 'plan' else 1)


def save(workdir, config, name='byte'):
  checkpoints.describe_model(workdir, config, name)
  opened = checkpoints.open_checkpoints(workdir)
  shapes = jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))
  params = jax.tree.map(lambda x: jnp.full(x.shape, 0.1, x.dtype), shapes)
  opened.save(TrainState(jnp.asarray(1, jnp.int32), {'model': params}, {}, None), {})
  opened.close()
  return str(workdir)


def test_a_teacher_comes_in_the_students_compute_dtype(tmp_path):
  folder = save(tmp_path, MODEL)
  student = CONTEXT._replace(model=dataclasses.replace(MODEL, dtype='bfloat16'))
  assert context.load_teacher(folder, student).params['embedding'].dtype == jnp.bfloat16


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path):
  folder = save(tmp_path, MODEL)
  other = BYTES._replace(name='pieces', fingerprint='other', vocabulary='other', vocab_size=512)
  with pytest.raises(schema.ConfigError, match='has tokenizer byte of 258 pieces, the student pieces of 512'):
    context.load_teacher(folder, CONTEXT._replace(tokenizer=other))


def test_a_teacher_whose_vocabulary_is_padded_otherwise_is_welcome(tmp_path):
  folder = save(tmp_path, MODEL)
  padded = CONTEXT._replace(model=dataclasses.replace(MODEL, vocab_size=264))
  assert context.load_teacher(folder, padded).config.vocab_size == 258
