"""A teacher's samples go to disk once each, with grades and provenance, whatever interrupts the run."""

import dataclasses
import json

import pytest

from configs import base
from srm_jax import annotate as module
from srm_jax import checkpoints, schema
from srm_jax.annotate import annotate
from srm_jax.data import records
from srm_jax.data import tokenizer as tokenizers
from srm_jax.models.config import TransformerConfig, forward_flops
from srm_jax.recipes import context
from srm_jax.tasks import TASKS, task
from tests import tiny
from tests.data import chats, graded
from tests.tiny import one_device, tiny_tasks  # noqa: F401

MODEL = TransformerConfig(258, 1, 16, 2, 2, 8, 32, max_length=64)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
  return tiny.write_model(tmp_path_factory.mktemp('models') / 'teacher', MODEL)


def config(teacher, **options):
  sampling = base.sampling(samples=4, max_new_tokens=8, seed=3)
  made = base.annotate(teacher, tiny.data('parity', count=5), sampling, batch_size=8, chunk=2)
  made.update(progress=False, **options)
  return made


@pytest.fixture(scope='module')
def whole(teacher, tmp_path_factory):
  return annotate(config(teacher), tmp_path_factory.mktemp('annotations'))


def test_every_sample_of_every_problem_is_recorded_with_its_grade(whole, teacher):
  found = records.read(whole.path)
  problems = tiny.PARITY.problems('train', count=5, seed=1)
  assert [one.id for one in found] == [f'{problem.id}#{i}' for problem in problems for i in range(4)]
  for one in found:
    reward = tiny.PARITY.grade(one.problem, one.completion)
    assert one.correct == (None if reward is None else reward == 1.0)
    assert one.prompt == tiny.PARITY.prompt(one.problem) and 1 <= one.num_tokens <= 8
    assert one.finished or one.num_tokens == 8
  assert {one.correct for one in found} == {True, False, None}
  model = checkpoints.load_model(teacher)
  assert {one.teacher for one in found} == {records.Teacher('teacher', 7, model.fingerprint)}
  assert {one.sampling.seed for one in found} == {3}


def test_summary(whole):
  found = records.read(whole.path)
  right = [one for one in found if one.correct]
  tokens = sum(one.num_tokens for one in found)
  assert whole.summary == {
      'problems': 5, 'samples': 20, 'correct': len(right),
      'distinct_correct': len({(one.problem.id, one.completion) for one in right}),
      'solved': len({one.problem.id for one in right}), 'sampled_tokens': tokens, 'flops': forward_flops(MODEL, tokens),
  }
  assert json.loads((whole.path.parent / 'summary.json').read_text()) == whole.summary


def test_a_killed_run_continues_with_what_is_left(whole, teacher, tmp_path, monkeypatch):
  appended = []

  def killed(path, annotations):
    if appended:
      raise KeyboardInterrupt
    appended.append(path)
    append(path, annotations)

  append = records.append
  with monkeypatch.context() as patch:
    patch.setattr(module.records, 'append', killed)
    with pytest.raises(KeyboardInterrupt):
      annotate(config(teacher), tmp_path)
  assert len(records.read(tmp_path / module.RECORDS)) == 8
  assert annotate(config(teacher), tmp_path).path.read_bytes() == whole.path.read_bytes()
  with monkeypatch.context() as patch:
    patch.setattr(module, 'rollout', lambda *_: pytest.fail('finished problems were sampled again'))
    assert annotate(config(teacher), tmp_path).summary == whole.summary


def test_a_damaged_record_is_named(whole, teacher, tmp_path):
  path = tmp_path / module.RECORDS
  path.write_bytes(whole.path.read_bytes()[:-30])
  with pytest.raises(ValueError, match=rf'{module.RECORDS}:20: not JSON'):
    annotate(config(teacher), tmp_path)


def test_errors(whole, teacher, tmp_path):
  with pytest.raises(schema.ConfigError, match='holds no model'):
    annotate(config('/nowhere'), tmp_path / 'a')
  with pytest.raises(schema.ConfigError, match=r'begun with another config: config\.batch_size was 8, is 16'):
    annotate(config(teacher, batch_size=16), whole.path.parent)
  long = config(teacher)
  long.sampling.max_new_tokens = 61
  with pytest.raises(ValueError, match='has 4 tokens, but config.max_length - max_new_tokens leaves room for 3'):
    annotate(long, tmp_path / 'b')


def test_a_chat_teacher_annotates_and_the_student_learns_the_same_tokens(tmp_path):
  folder = str(chats.save_family(tmp_path / 'published', 'qwen2_5'))
  model = dataclasses.replace(MODEL, vocab_size=512, max_length=160)
  made = config(tiny.write_model(tmp_path / 'teacher', model, tokenizer=folder))
  made.data = tiny.data('parity', count=5, prompting=base.prompt('chat'))
  found = annotate(made, tmp_path / 'annotations')
  texts = {one.prompt for one in records.read(found.path)}
  assert len(texts) == 5 and all(text.endswith('<|im_end|>\n<|im_start|>assistant\n') for text in texts)
  section = dict(made.data, records=str(found.path), target='unfiltered_completion')
  learnt = context.examples_of(schema.parse(context.DataConfig, section, 'data'), tokenizers.load(folder))
  spell = tokenizers.tokenizers.Tokenizer.from_file(f'{folder}/tokenizer.json').decode
  prompts = {spell(one.tokens[~one.loss_mask].tolist(), skip_special_tokens=False) for one in learnt}
  assert prompts <= texts and len(prompts) >= 4


TEXTS = ('3+4=7\n#### 7', '3 + 4 = 7\n#### 7', '4+3=7\n#### 7', '3+4=8\n#### 8')


def annotated(*rows):
  """An annotation for every (problem, text, right)."""
  problems = tiny.SUMS.problems('train', count=2)
  return [graded.annotation(problems[at], sample, text, right) for sample, (at, text, right) in enumerate(rows)]


def test_one_annotation_of_each_path_by_hand():
  first, spaced, other, wrong = TEXTS
  found = annotated(
      (0, wrong, False), (0, first, True), (0, spaced, True), (0, other, True), (0, other, None), (1, spaced, True),
  )
  kept, counts = module.distinct_paths(found, task.equations, most=2)
  assert [one.sample for one in kept] == [1, 3, 5]
  assert counts == {'kept': 3, 'distinct': 3, 'duplicates': 1, 'wrong': 2}
  kept, counts = module.distinct_paths(found, task.normalised_text, most=1)
  assert [one.sample for one in kept] == [1, 5]
  assert counts == {'kept': 2, 'distinct': 4, 'duplicates': 0, 'wrong': 2}


def test_what_is_kept_is_learnt(teacher, tmp_path):
  made = annotate(config(teacher, paths=1), tmp_path)
  kept, found = records.read(tmp_path / module.KEPT), records.read(made.path)
  first = {one.problem.id: one for one in reversed(found) if one.correct}
  assert kept and {one.id for one in kept} == {one.id for one in first.values()}
  counts, right = made.summary['paths'], made.summary['correct']
  assert counts['kept'] == made.summary['solved'] and counts['wrong'] == 20 - right
  assert counts['distinct'] == made.summary['distinct_correct'] == right - counts['duplicates']
  section = dict(tiny.data('parity'), records=str(tmp_path / module.KEPT), target='completion')
  learnt = context.worked_examples(schema.parse(context.DataConfig, section, 'data'))
  assert [(item.problem, item.completion) for item in learnt] == [(one.problem, one.completion) for one in kept]


HINT = ' ({answer})'


@pytest.fixture
def stubborn(monkeypatch):
  """The task with two problems that no sample solves unless its prompt shows the answer; the prompts it was asked."""
  asked, unsolved = [], {problem.id for problem in tiny.PARITY.problems('train', count=5, seed=1)[1:3]}
  sample = module.rollout

  def rollout(generate, prompting, problems, sampling):
    prompts = [prompting.prompt(problem) for problem in problems]
    asked.extend(prompts)
    groups = sample(generate, prompting, problems, sampling)
    right = lambda prompt, one: float('(' in prompt.text or prompt.id not in unsolved) if one.sample % 2 else 0.0
    return [[one._replace(reward=right(prompt, one.completion)) for one in group]
            for prompt, group in zip(prompts, groups, strict=True)]

  monkeypatch.setattr(module, 'rollout', rollout)
  return asked, unsolved


def test_unsolved_problems_are_asked_again_with_their_answer(teacher, tmp_path, stubborn):
  asked, unsolved = stubborn
  made = annotate(config(teacher, hint=HINT, paths=4), tmp_path)
  found = records.read(made.path)
  hinted = [one for one in found if one.hint]
  assert {one.problem.id for one in hinted} == unsolved and {one.hint for one in hinted} == {HINT}
  assert [one.sample for one in hinted] == [4, 5, 6, 7] * 2
  assert [one.text for one in asked if '(' in one.text] == [
      f'{one.problem.question} ({one.problem.answer})\n' for one in hinted[::4]
  ]
  assert all(one.prompt == tiny.PARITY.prompt(one.problem) for one in found)  # the hint is not learnt
  assert made.summary['hinted'] == {'samples': 8, 'correct': 4}
  kept = records.read(tmp_path / module.KEPT)
  assert {one.problem.id for one in kept} == {one.problem.id for one in found}
  plain = {one.problem.id: one.completion for one in found if one.sample == 0}
  assert any(plain[one.problem.id] != one.completion for one in hinted[::4])  # drawn anew


def test_a_killed_run_with_hints_continues(teacher, tmp_path, stubborn, monkeypatch):
  whole = annotate(config(teacher, hint=HINT, paths=4), tmp_path / 'whole')
  append, calls = records.append, []

  def killed(path, annotations):
    calls.append(path)
    if len(calls) == 2:
      raise KeyboardInterrupt
    append(path, annotations)

  with monkeypatch.context() as patch:
    patch.setattr(module.records, 'append', killed)
    with pytest.raises(KeyboardInterrupt):
      annotate(config(teacher, hint=HINT, paths=4), tmp_path / 'cut')
  again = annotate(config(teacher, hint=HINT, paths=4), tmp_path / 'cut')
  assert again.summary == whole.summary and again.path.read_bytes() == whole.path.read_bytes()
  assert (tmp_path / 'cut' / module.KEPT).read_bytes() == (tmp_path / 'whole' / module.KEPT).read_bytes()


def test_no_hint_without_an_answer(teacher, tmp_path, monkeypatch):
  blank = dataclasses.replace(tiny.PARITY, problems=lambda split, count=None, seed=0: [
      dataclasses.replace(one, answer='') for one in tiny.PARITY.problems(split, count=count, seed=seed)
  ])
  monkeypatch.setitem(TASKS, 'parity', blank)
  with pytest.raises(schema.ConfigError, match="of task 'parity' has no answer to hint at; fix: hint=''"):
    annotate(config(teacher, hint=HINT), tmp_path / 'a')
  assert not (tmp_path / 'a' / module.RECORDS).exists()
  with pytest.raises(schema.ConfigError, match="does not show the answer; fix: put {answer}"):
    annotate(config(teacher, hint=' (7)'), tmp_path / 'b')
