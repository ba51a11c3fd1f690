"""Rates of steps with a sampler that is known by heart, and files that a killed run leaves whole."""

import dataclasses
import json

import numpy as np
import pytest

from configs import base
from srm_jax import process_labels as module
from srm_jax import schema
from srm_jax.data import prompting as prompts
from srm_jax.data import records, steps, tokenizer
from srm_jax.models.config import TransformerConfig, forward_flops
from srm_jax.process_labels import label_process
from srm_jax.types import Completion, SamplingParams
from tests import tiny
from tests.data import chats
from tests.tiny import one_device, tiny_tasks  # noqa: F401

BYTES = tokenizer.load('byte')
MODEL = TransformerConfig(258, 1, 16, 2, 2, 8, 32, max_length=64)
PROBLEM = tiny.SUMS.problems('train', count=1)[0]
PROMPTING = prompts.plain(tiny.SUMS, BYTES)


def annotation(text, *, problem=PROBLEM, sample=0):
  return records.Annotation(
      problem, tiny.SUMS.prompt(problem), text, len(text), None, True, records.Teacher('t', 0, 'h'), SamplingParams(),
      sample, 'c',
  )


def steps_of(one, tokenizer=BYTES, prompting=PROMPTING):
  return module.steps_of(prompting, tokenizer, one, steps.lines)


def known(answers):
  """A sampler whose i-th continuation of a prompt ends with the i-th of answers[lines so far]."""
  asked = []

  def generate(given, sampling):
    asked.extend(given)
    return [[completed(prompt, i, answers[prompt.text.count('\n') - 1][i]) for i in range(sampling.samples)]
            for prompt in given]

  def completed(prompt, sample, answer):
    tokens = (*BYTES.encode(f'#### {answer}'), BYTES.eos_id)
    return Completion(prompt, sample, f'#### {answer}', prompt.tokens, tokens, (0.0,) * len(tokens), True)

  return generate, asked


def test_rates_are_shares_of_right_continuations_and_the_answer_is_graded_itself():
  right = PROBLEM.answer
  generate, asked = known({1: [right, 'x', right, right], 2: ['x', 'x', 'x', right]})
  chains = [annotation(f'a\n½\n#### {right}'), annotation('a\n½\n#### x\nmore', sample=1), annotation('', sample=2)]
  part = [(one, steps_of(one)) for one in chains]
  found = module.label(generate, PROMPTING, BYTES, part, SamplingParams(samples=4))
  assert [rates for rates, _ in found] == [[0.75, 0.25, 1.0], [0.75, 0.25, 0.0, 0.0], []]
  assert [prompt.id for prompt in asked] == [f'{PROBLEM.id}#{i}@{end}' for i in (0, 1) for end in (2, 4)]
  assert [tokens for _, tokens in found] == [8 * 7, 8 * 7, 0]
  for prompt in asked:
    assert bytes(prompt.tokens).decode() == prompt.text


def test_continuations_that_cannot_be_graded_do_not_count():
  grade = lambda problem, text: None if 'x' in text else tiny.SUMS.grade(problem, text)
  prompting = PROMPTING._replace(task=dataclasses.replace(tiny.SUMS, grade=grade))
  one = annotation('a\nb\n')
  generate, _ = known({1: [PROBLEM.answer, 'x', '99', 'x'], 2: ['x'] * 4})
  ((rates, _),) = module.label(generate, prompting, BYTES, [(one, steps_of(one))], SamplingParams(samples=4))
  assert rates == [0.5, None]


def test_prefixes_are_whole_tokens_of_the_text(tmp_path):
  loaded = tokenizer.load(chats.save_family(tmp_path, 'qwen2_5'))
  prompting = prompts.plain(tiny.SUMS, loaded)
  one = annotation('so 2 € + ½\n\n\nthen #\n#### 2')
  found = steps_of(one, loaded, prompting)
  asked = list(prompts.prompt_ids(loaded, prompting.prompt(PROBLEM)))
  for step in found:
    assert list(step.prompt.tokens) == [*asked, *step.written]
    assert loaded.decode(step.written).startswith(one.completion[: step.end])
    assert one.completion.startswith(loaded.decode(step.written))
  assert [step.end for step in found] == steps.lines(one.completion)


# On disk.


@pytest.fixture(scope='module')
def student(tmp_path_factory):
  return tiny.write_model(tmp_path_factory.mktemp('models') / 'student', MODEL)


@pytest.fixture(scope='module')
def annotated(tmp_path_factory):
  path = tmp_path_factory.mktemp('annotations') / 'annotations.jsonl'
  problems = tiny.PARITY.problems('train', count=5)
  records.write(path, [annotation(f'é\nb{i}\n#### 3', problem=one, sample=i) for one in problems for i in range(2)])
  return str(path)


def config(student, annotated, **options):
  data = tiny.data('parity', records=annotated, target='unfiltered_completion')
  made = base.process_labels(student, data, base.sampling(samples=3, max_new_tokens=8), batch_size=8, chunk=4)
  made.update(progress=False, **options)
  return made


@pytest.fixture(scope='module')
def whole(student, annotated, tmp_path_factory):
  return label_process(config(student, annotated), tmp_path_factory.mktemp('labels'))


def test_every_step_of_every_annotation_is_recorded(whole, annotated):
  found = records.read(whole.path, records.StepLabels)
  assert [one.annotation for one in found] == records.read(annotated)
  assert all(one.segmentation == 'lines' and one.ends == [2, 5, 11] and len(one.rates) == 3 for one in found)
  assert all(0 < one.num_tokens <= 2 * 3 * 8 and one.sampling.samples == 3 for one in found)
  for one in found:
    assert one.rates[2] == tiny.PARITY.grade(one.annotation.problem, one.annotation.completion)
    assert all(rate is None or rate * 6 == pytest.approx(round(rate * 6)) for rate in one.rates)  # of 3, 2 or 1
  rates = [rate for one in found for rate in one.rates if rate is not None]
  assert len(set(rates)) > 2
  tokens = sum(one.num_tokens for one in found)
  assert whole.summary == {
      'annotations': 10, 'steps': 30, 'mean_rate': pytest.approx(np.mean(rates)),
      'right': pytest.approx(np.mean(np.array(rates) > 0)), 'sampled_tokens': tokens,
      'flops': forward_flops(MODEL, tokens),
  }
  assert json.loads((whole.path.parent / 'summary.json').read_text()) == whole.summary


def test_a_killed_run_continues_with_what_is_left(whole, student, annotated, tmp_path, monkeypatch):
  append, appended = records.append, []

  def killed(path, labels):
    if appended:
      raise KeyboardInterrupt
    appended.append(path)
    append(path, labels)

  with monkeypatch.context() as patch:
    patch.setattr(module.records, 'append', killed)
    with pytest.raises(KeyboardInterrupt):
      label_process(config(student, annotated), tmp_path)
  assert len(records.read(tmp_path / module.RECORDS, records.StepLabels)) == 4
  assert label_process(config(student, annotated), tmp_path).path.read_bytes() == whole.path.read_bytes()
  with monkeypatch.context() as patch:
    patch.setattr(module, 'label', lambda *_: pytest.fail('finished steps were sampled again'))
    assert label_process(config(student, annotated), tmp_path).summary == whole.summary


def test_annotations_without_steps_are_recorded_as_such(student, tmp_path):
  records.write(tmp_path / 'annotations.jsonl', [annotation('', problem=tiny.PARITY.problems('train', count=1)[0])])
  found = label_process(config(student, str(tmp_path / 'annotations.jsonl')), tmp_path / 'labels')
  assert [one.rates for one in records.read(found.path, records.StepLabels)] == [[]]
  assert found.summary['mean_rate'] is None and found.summary['sampled_tokens'] == 0


def test_errors(whole, student, annotated, tmp_path):
  with pytest.raises(schema.ConfigError, match="segmentation 'words' unknown"):
    label_process(config(student, annotated, segmentation='words'), tmp_path / 'a')
  with pytest.raises(schema.ConfigError, match='does not exist; run the annotation first'):
    label_process(config(student, str(tmp_path / 'none')), tmp_path / 'b')
  long = config(student, annotated)
  long.sampling.max_new_tokens = 50
  with pytest.raises(schema.ConfigError, match='stands after 16 tokens; .* leaves room for 14; fix: fewer new tokens'):
    label_process(long, tmp_path / 'c')
  with pytest.raises(schema.ConfigError, match=r'begun with another config: config\.chunk was 4, is 5'):
    label_process(config(student, annotated, chunk=5), whole.path.parent)
