"""Reward models: what is read where, counts from masks, pairs and labelled steps from files, exact resume, and that a
tiny model learns which steps of a chain are right.
"""

import functools
import random
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from srm_jax import checkpoints, inspection, schema
from srm_jax.data import records, steps, tokenizer
from srm_jax.inference.reward_scores import make_reward_scorer, reduced
from srm_jax.losses import reward_model as losses
from srm_jax.models import heads, transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import reward_model
from srm_jax.recipes.context import Context, forward
from srm_jax.schema import ConfigError
from srm_jax.tasks import TASKS, running_sums
from srm_jax.train import train
from srm_jax.train_step import value_and_grad
from srm_jax.types import Completion, Problem, Prompt, SamplingParams
from tests import tiny
from tests.tiny import one_device, tiny_tasks  # noqa: F401

BYTES = tokenizer.load('byte')
MODEL = TransformerConfig(258, 1, 16, 2, 2, 8, 32, max_length=64)
CONTEXT = Context(MODEL, BYTES, 1, 10)
TEACHER = records.Teacher('teacher', 0, 'hash')


def annotation(problem, text, correct, sample=0, *, finished=True, task='sums'):
  return records.Annotation(
      problem, TASKS[task].prompt(problem), text, len(text), correct, finished, TEACHER, SamplingParams(), sample, 'c'
  )


def labelled(one, rates, *, segmentation='lines'):
  ends = steps.SEGMENTATIONS[segmentation](one.completion)
  assert len(ends) == len(rates)
  return records.StepLabels(one, segmentation, ends, rates, 0, TEACHER, SamplingParams(), 'c')


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """{target: file}: of twelve problems, right and wrong completions, some twice, and their steps."""
  folder, annotations = tmp_path_factory.mktemp('records'), []
  for number, problem in enumerate(tiny.SUMS.problems('train', count=12)):
    texts = [(f'#### {problem.answer}', True), ('#### 99', False), ('so\n#### 1', False), ('#### 99', False)]
    texts += [('none', None)] * (number == 3)
    annotations += [annotation(problem, text, correct, i) for i, (text, correct) in enumerate(texts)]
  records.write(folder / 'outcome.jsonl', annotations)
  rates = {1: [0.75], 2: [0.5, 0.0]}
  chosen = [one for one in annotations if one.correct is not None]
  records.write(folder / 'process.jsonl', [labelled(one, rates[len(one.completion.splitlines())]) for one in chosen])
  return {target: str(folder / f'{target}.jsonl') for target in reward_model.TARGETS}


def section(files, target, *, size=4, length=32, data=None, **options):
  packing = 'one_per_row' if target == 'outcome' else 'plan'
  data = data or tiny.data(records=files[target], target='unfiltered_completion')
  return base.reward_model(data, base.batch(size, length, packing), target=target, **options)


@functools.cache
def params():
  model = jax.jit(transformer.init_params, static_argnums=0)(MODEL, jax.random.key(0))
  return {'model': model, **reward_model.extra_params(MODEL)(jax.random.key(1))}


@pytest.fixture(scope='module')
def recipes(files):
  return {target: reward_model.build(section(files, target), CONTEXT) for target in reward_model.TARGETS}


def spelled(batch, row):
  """Segments of a row as texts, with the score's token marked by '|' behind it; masks mark tokens as targets."""
  read = np.roll(batch.loss_mask[row], 1)
  texts = {}
  for token, segment, ends in zip(batch.inputs[row], batch.segment_ids[row], read):
    if segment:
      letter = '$' if token == BYTES.eos_id else chr(token)
      texts[segment] = texts.get(segment, '') + letter + ('|' if ends else '')
  return list(texts.values())


def test_pairs_hold_a_right_and_a_wrong_completion_of_one_problem(recipes):
  answers, seen = {one.question: one.answer for one in tiny.SUMS.problems('train', count=12)}, []
  for step in range(6):
    pairs = recipes['outcome'].source.next(None, step)
    for row in range(4):
      (chosen,), (rejected,) = spelled(pairs.chosen, row), spelled(pairs.rejected, row)
      question, _, text = chosen.partition('\n')
      assert text == f'#### {answers[question]}$|'
      assert rejected in (f'{question}\n#### 99$|', f'{question}\nso\n#### 1$|')
      seen.append(rejected)
  assert len(seen) == len(set(seen)) == 24  # an epoch: each wrong completion once, repetitions left out


def test_pairs_take_turns_where_one_side_has_fewer():
  problems = tiny.SUMS.problems('train', count=3)
  rights = [annotation(problems[0], f'r{i}', True, i) for i in range(3)]
  wrongs = [annotation(problems[0], f'w{i}', False, 3 + i) for i in range(2)]
  others = [annotation(problems[1], 'r', True), annotation(problems[2], 'w', False)]
  others += [annotation(problems[2], '?', None, 1), annotation(problems[0], 'r0', True, 9)]
  pairs = reward_model.compared_annotations([*wrongs, *rights, *others])
  assert [(a.completion, b.completion) for a, b in pairs] == [('r0', 'w0'), ('r1', 'w1'), ('r2', 'w0')]


def test_labels_stand_where_their_steps_end(recipes):
  batch, labels = recipes['process'].source.next(None, 0)
  texts = [[text.partition('\n')[2] for text in spelled(batch, row)] for row in range(4)]
  assert {'#### 99|$', 'so\n|#### 1|$'} < set(sum(texts, []))
  for row, segments in enumerate(texts):
    expected = [rate for text in segments for rate in ([0.5, 0.0] if text.startswith('so') else [0.75])]
    assert labels[row][batch.loss_mask[row] > 0].tolist() == expected
  assert not labels[batch.loss_mask == 0].any()


def test_a_step_that_nobody_could_grade_is_not_learnt():
  one = annotation(tiny.SUMS.problems('train', count=1)[0], 'a\nb\nc', False, finished=False)
  prompting = reward_model.open_data(schema.parse(reward_model.DataConfig, tiny.data(), 'data'), BYTES)
  for kind, expected in {'soft': [0.25, 0.0], 'hard': [1.0, 0.0]}.items():
    example, known = reward_model.step_example(prompting, BYTES, labelled(one, [0.25, None, 0.0]), kind)
    assert list(known.values()) == expected
    assert [bytes(example.tokens[: i + 1].tolist())[-2:] for i in known] == [b'a\n', b'\nc']
    assert np.flatnonzero(example.loss_mask).tolist() == list(known)


def by_hand(rows):
  """What the head says of every token of unpacked rows, [B, T]."""
  return heads.value(params()['value_head'], forward(MODEL, params()['model'], rows).hidden)


def test_outcomes_are_read_at_the_last_token(recipes):
  pairs = recipes['outcome'].source.next(None, 0)
  terms, metrics = jax.jit(recipes['outcome'].objective.terms)(params(), pairs, {}, None)
  rows = np.arange(4)
  ends = [np.asarray(by_hand(side))[rows, (side.segment_ids > 0).sum(1) - 1] for side in pairs]
  expected = losses.bradley_terry(*map(jnp.array, ends), centering=0.01)
  np.testing.assert_allclose(terms['pairs'][1], expected.sum(), rtol=1e-5)
  assert metrics['accuracy'] == (np.sum(ends[0] > ends[1]), 4)
  totals = [metrics[f'{side}_score'].total for side in ('chosen', 'rejected')]
  np.testing.assert_allclose(totals, np.sum(ends, 1), rtol=1e-4)


def test_steps_are_read_where_they_end(recipes):
  steps_of = recipes['process'].source.next(None, 0)
  terms, metrics = jax.jit(recipes['process'].objective.terms)(params(), steps_of, {}, None)
  ends = np.roll(steps_of.batch.loss_mask, 1, axis=1) > 0
  read, labels = np.asarray(by_hand(steps_of.batch))[ends], steps_of.labels[steps_of.batch.loss_mask > 0]
  expected = np.log1p(np.exp(read)) - labels * read
  np.testing.assert_allclose(terms['steps'][1], expected.sum(), rtol=1e-5)
  right = labels >= 0.5
  assert metrics['accuracy'] == (np.sum((read > 0) == right), len(read))
  assert metrics['right_steps'] == (right.sum(), len(read))
  np.testing.assert_allclose(metrics['wrong_score'].total, np.sum(1 / (1 + np.exp(-read[~right]))), rtol=1e-5)


@pytest.mark.parametrize('target', reward_model.TARGETS)
def test_the_gradient_does_not_depend_on_microbatches_and_reaches_head_and_model(recipes, target):
  recipe = recipes[target]
  batch = recipe.source.next(None, 1)
  run = functools.partial(value_and_grad, recipe.objective, params(), batch, {}, jax.random.key(0))
  whole, grads, _ = jax.jit(run)()
  split, parts, _ = jax.jit(functools.partial(run, microbatches=2))()
  np.testing.assert_allclose(whole, split, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, parts)
  norms = jax.tree.map(lambda x: float(jnp.linalg.norm(x)), grads)
  assert norms['value_head']['kernel'] > 1e-3 and norms['model']['embedding'] > 1e-3


def test_labels_where_no_step_ends_have_no_influence(recipes):
  terms, batch = jax.jit(recipes['process'].objective.terms), recipes['process'].source.next(None, 0)
  blank = batch._replace(labels=np.where(batch.batch.loss_mask > 0, batch.labels, np.nan))
  totals = [terms(params(), one, {}, None)[0]['steps'][1] for one in (batch, blank)]
  assert totals[0] == totals[1] and np.isfinite(totals[0])


def test_a_pair_with_an_empty_row_counts_nowhere(recipes):
  objective = recipes['outcome'].objective
  pairs = recipes['outcome'].source.next(None, 0)
  keep = np.array([1, 0, 1, 1])[:, None]
  less = pairs._replace(rejected=pairs.rejected._replace(loss_mask=pairs.rejected.loss_mask * keep))
  assert objective.denominators(pairs) == {'pairs': 4} and objective.denominators(less) == {'pairs': 3}
  terms = jax.jit(objective.terms)
  alone = jax.tree.map(lambda x: x[1:2], pairs)
  whole, rest, one = (terms(params(), batch, {}, None)[0]['pairs'][1] for batch in (pairs, less, alone))
  np.testing.assert_allclose(rest, whole - one, rtol=1e-5)


@pytest.mark.parametrize('target', reward_model.TARGETS)
def test_a_stopped_run_continues_bit_for_bit(files, tmp_path, target):
  config = functools.partial(tiny.train, section(files, target), checkpoint_every=1, microbatches=2)
  whole = train(config(), tmp_path / 'whole')
  with tiny.stopped_after(2):
    train(config(), tmp_path / 'stopped')
  again = train(config(), tmp_path / 'stopped')
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.params), jax.device_get(whole.params))
  fresh = reward_model.extra_params(MODEL)(jax.random.split(jax.random.key(1))[1])
  assert np.any(np.asarray(whole.params['value_head']['kernel']) != np.asarray(fresh['value_head']['kernel']))
  loaded = checkpoints.load_model(tmp_path / 'whole').extra['value_head']
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded), jax.device_get(whole.params['value_head']))
  assert inspection.inspect(config(), rows=2).supervised > 0


def test_other_data_are_not_resumed(files, recipes):
  state = recipes['process'].source.get_state()
  other = reward_model.build(section(files, 'process', labels='hard'), CONTEXT)
  with pytest.raises(ValueError, match='has data_hash'):
    other.source.set_state(state)


@pytest.mark.parametrize('target, changes, message', [
    ('outcome', dict(target='value'), "target 'value' unknown"),
    ('process', dict(labels='noisy'), "labels 'noisy' unknown"),
    ('process', dict(segmentation='words'), "segmentation 'words' unknown"),
    ('process', dict(segmentation='characters'), r"has steps by \['lines'\], config.recipe.segmentation='characters'"),
    ('outcome', dict(batch=base.batch(4, 32)), "pairs are not packed; fix: 'one_per_row'"),
    ('outcome', dict(data=tiny.data(records='x', target='completion')), "target='unfiltered_completion'"),
    ('process', dict(data=tiny.data(records='x', target='unfiltered_completion')), "'x' does not exist; run exp"),
    ('outcome', dict(data=tiny.data(records='x', target='unfiltered_completion')), 'x does not exist'),
])
def test_errors(files, target, changes, message):
  made = section(files, target).to_dict() | changes
  with pytest.raises(ConfigError, match=message):
    reward_model.build(made, CONTEXT)


def test_nothing_to_compare_or_to_learn(tmp_path):
  one = annotation(tiny.SUMS.problems('train', count=1)[0], 'a', False)
  records.write(tmp_path / 'outcome', [one])
  records.write(tmp_path / 'process', [labelled(one, [None])])
  files = {target: str(tmp_path / target) for target in reward_model.TARGETS}
  for target, message in {'outcome': 'no problem with a right and a wrong', 'process': 'no labelled step'}.items():
    with pytest.raises(ConfigError, match=message):
      reward_model.build(section(files, target), CONTEXT)


# Whether steps of a chain are right can be learnt: running sums of digits, each of which has one truth.


def chain_with_errors(problem, rng):
  """(a chain that goes wrong at every fourth digit or so and never comes back, whether each of its steps is right)."""
  digits, text, truth = running_sums.digits_of(problem), '', []
  total, right = digits[0], True
  for digit in digits[1:]:
    slip = rng.random() < 0.25
    total, right = (total + digit + slip * rng.randrange(1, 10)) % 10, right and not slip
    text, truth = text + str(total), [*truth, float(right)]
  return f'{text}\n#### {total}', [*truth, float(right)]


def chains(problems, count):
  """{problem id: its annotations with their labelled steps}."""
  rng, found = random.Random(1), {}
  for sample in range(count):
    for problem in problems:
      text, truth = chain_with_errors(problem, rng)
      one = annotation(problem, text, bool(truth[-1]), sample, task='running_sums')
      found.setdefault(problem.id, []).append(labelled(one, truth, segmentation='characters'))
  return found


def completion(one):
  asked, tokens = BYTES.encode(one.prompt), (*BYTES.encode(one.completion), BYTES.eos_id)
  return Completion(Prompt(one.id, one.prompt), 0, one.completion, tuple(asked), tokens, (0.0,) * len(tokens), True)


def test_a_tiny_process_model_learns_the_truth_of_every_step(tmp_path):
  problems = [Problem(q, q, str(sum(map(int, q.split('+'))) % 10)) for q in map('+'.join, product('012', repeat=5))]
  random.Random(0).shuffle(problems)
  learnt, held_out = chains(problems[:200], 25), chains(problems[200:], 8)
  records.write(tmp_path / 'steps.jsonl', sum(learnt.values(), []))
  data = tiny.data('running_sums', records=str(tmp_path / 'steps.jsonl'), target='unfiltered_completion')
  recipe = base.reward_model(data, base.batch(64, 24, 'one_per_row'), target='process', segmentation='characters')
  model = dict(embed_dim=32, num_layers=2, num_heads=4, mlp_dim=64)
  config = tiny.train(recipe, model=model, num_steps=90, log_every=30)
  config.optimizer = base.optimizer('muon', learning_rate=5e-3, matrix_learning_rate=0.04, warmup_steps=10)
  run = train(config, tmp_path / 'run')
  model, head = checkpoints.model_config(run.workdir), run.params['value_head']
  scorer = make_reward_scorer(model, run.params['model'], head, BYTES, segment=steps.characters)
  scores = {name: scorer([completion(one.annotation) for one in group]) for name, group in held_out.items()}
  flat = np.concatenate(sum(scores.values(), []))
  truth = np.concatenate([one.rates for group in held_out.values() for one in group])
  assert np.mean(flat[truth == 1][:, None] > flat[truth == 0][None]) > 0.9  # area under the curve
  # The aggregate of the steps finds a right chain among eight wherever there is one, nearly always.
  solvable = {name: group for name, group in held_out.items() if any(one.annotation.correct for one in group)}
  best = {name: group[int(np.argmax(reduced('min', scores[name])))] for name, group in solvable.items()}
  chance = np.mean([one.annotation.correct for group in solvable.values() for one in group])
  assert np.mean([one.annotation.correct for one in best.values()]) > 0.8 > 0.5 > chance
