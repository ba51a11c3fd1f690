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
from tests import tiny
from tests.data import chats
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
