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


@pytest.fixture(scope='module')
def chains(tmp_path_factory):
  """Two right chains and a wrong one of the first problem, a right one of the second, a wrong one of the third."""
  path = tmp_path_factory.mktemp('chains') / 'annotations.jsonl'
  first, second, third = PROBLEMS
  records.write(path, [
      annotation(first, 0, f'a\nb\n#### {first.answer}', True), annotation(first, 1, f'c\n#### {first.answer}', True),
      annotation(first, 2, 'd\n#### x', False), annotation(second, 0, f'e\n#### {second.answer}', True),
      annotation(third, 0, '#### x', False),
  ])
  return str(path)


@pytest.mark.parametrize('target, expected', [
    ('rationale', ['a\nb', 'c', 'e']), ('answer', [f'#### {problem.answer}' for problem in PROBLEMS[:2]]),
])
def test_chains_and_answers_apart(chains, target, expected):
  assert [item.completion for item in context.worked_examples(section(records=chains, target=target))] == expected


def test_gold_answers_and_no_rationale():
  answers = context.worked_examples(section(count=3, target='answer'))
  assert [item.completion for item in answers] == [f'#### {item.problem.answer}' for item in answers]
  with pytest.raises(schema.ConfigError, match='nothing to learn from'):  # these solutions are an answer alone
    context.worked_examples(section(count=3, target='rationale'))


def test_problems_by_pass_rate(chains):
  rates = context.pass_rates(list(records.read(chains)))
  assert rates == {PROBLEMS[0].id: 2 / 3, PROBLEMS[1].id: 1.0, PROBLEMS[2].id: 0.0}
  first, second, _ = (problem.id for problem in PROBLEMS)

  def learnt(*rate):
    data = section(records=chains, target='completion', pass_rate=rate)
    return {item.problem.id for item in context.worked_examples(data)}

  assert learnt(0.5, 1.0) == {first, second} and learnt(0.9, 1.0) == {second} and learnt(0, 0.9) == {first}


@pytest.mark.parametrize('rate, message', [
    ((0.5,), 'expected'), ((0.9, 0.1), 'expected'), ((0, 2), 'expected'), ((0.0, 'x'), 'expected'),
])
def test_pass_rates_that_cannot_be(chains, rate, message):
  with pytest.raises(schema.ConfigError, match=f'data.pass_rate .* {message}'):
    context.worked_examples(section(records=chains, target='completion', pass_rate=rate))


def test_what_read_a_hint_says_nothing_of_the_pass_rate(tmp_path):
  path, (problem, other, _) = str(tmp_path / 'a.jsonl'), PROBLEMS
  hinted = [dataclasses.replace(annotation(one, 5, 'led', True), hint=' ({answer})') for one in (problem, other)]
  records.write(path, [annotation(problem, 0, 'wrong', False), annotation(problem, 1, 'right', True), *hinted])
  assert context.pass_rates(records.read(path)) == {problem.id: 0.5}
  learnt = lambda low, high: [
      item.completion for item in context.worked_examples(
          section(records=path, target='completion', pass_rate=(low, high)),
      )
  ]
  assert learnt(0.5, 0.5) == ['right', 'led'] and learnt(0.0, 0.0) == ['led']


def test_pass_rates_are_of_annotations():
  with pytest.raises(schema.ConfigError, match='is of data.records'):
    context.worked_examples(section(pass_rate=(0.0, 1.0)))


def mix(count=0, **ratios):
  parts = {name: (ratio, tiny.data(count=6, seed=seed)) for seed, (name, ratio) in enumerate(ratios.items())}
  return schema.parse(context.DataConfig, base.mix(count, **parts), 'data')


BATCH = schema.parse(context.BatchConfig, base.batch(4, 16, 'one_per_row'), 'batch')


def test_a_mix_drawn_beforehand_has_exact_shares():
  examples = context.examples_of(mix(10, b=4.0, a=1), BYTES)
  assert [example.source for example in examples].count(0) == 2 and len(examples) == 10  # a comes first by name
  batch = context.dataset(mix(10, b=4.0, a=1), BATCH, CONTEXT).next(None, 0)
  assert batch.sources.shape == batch.inputs.shape and set(batch.sources[batch.segment_ids > 0]) <= {0, 1}


def test_a_mix_drawn_row_by_row_follows_schedules():
  growing = dict(name='switch', start=0.0, end=1.0, steps=2)
  source = context.dataset(mix(a=1.0, b=growing), BATCH, CONTEXT)
  assert [int(source.next(None, step).sources.max(axis=1).sum()) for step in range(4)] == [0, 0, 2, 2]


@pytest.mark.parametrize('section, message', [
    (lambda: mix(4, all=1, b=1), "data.mix.all: rows of a loss are called so"),
    (lambda: mix(4, a=dict(name='linear', start=0.0, end=1.0, steps=2)), 'ratio changes over the run'),
    (lambda: mix(4, a='much'), 'data.mix.a.ratio'), (lambda: mix(4, a=-1, b=2), 'must be non-negative'),
])
def test_mixes_that_cannot_be_are_refused(section, message):
  with pytest.raises(schema.ConfigError, match=message):
    context.dataset(section(), BATCH, CONTEXT)


def test_what_reads_a_mix_whole_needs_a_count():
  with pytest.raises(schema.ConfigError, match='needs a count'):
    context.examples_of(mix(a=1.0), BYTES)
  with pytest.raises(schema.ConfigError, match='needs problems'):
    context.load_problems(mix(4, a=1.0))


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
