import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from srm_jax import types
from srm_jax.data import records


def annotation(number=0, sample=0, **changes):
  metadata = {'steps': 2, 'families': ['legs', None]}
  problem = types.Problem(f'p{number}', 'How many legs?\n“Two” \u2028 cows', '8', 'two cows\n2 * 4 = 8', metadata)
  base = records.Annotation(
      problem=problem,
      prompt='Q: ',
      completion=' 2 * 4 = 8\n#### 8',
      num_tokens=12,
      correct=True,
      finished=True,
      teacher=records.Teacher('teacher', 300, 'abc'),
      sampling=types.SamplingParams(temperature=0.8, samples=4, seed=3),
      sample=sample,
      config_hash='feed',
  )
  return dataclasses.replace(base, **changes)


@pytest.mark.parametrize('name', ['a.jsonl', 'deep/a.jsonl.gz'])
def test_round_trip(tmp_path, name):
  written = [annotation(0), annotation(0, 1, correct=None), annotation(1, correct=False, finished=False)]
  records.write(tmp_path / name, written)
  assert records.read(tmp_path / name) == written
  records.write(tmp_path / name, written[:1])
  assert records.read(tmp_path / name) == written[:1]
  assert len(list((tmp_path / name).parent.iterdir())) == 1


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz'])
def test_append_resumes(tmp_path, name):
  wanted = [annotation(number, sample) for number in range(4) for sample in range(2)]
  assert records.finished_ids(tmp_path / name) == set()
  records.append(tmp_path / name, wanted[:3])
  done = records.finished_ids(tmp_path / name)
  assert done == {'p0#0', 'p0#1', 'p1#0'}
  records.append(tmp_path / name, [record for record in wanted if record.id not in done])
  assert records.read(tmp_path / name) == wanted


def test_same_records_give_the_same_bytes(tmp_path):
  for name in ('a.jsonl.gz', 'b.jsonl.gz'):
    records.write(tmp_path / name, [annotation()])
  assert (tmp_path / 'a.jsonl.gz').read_bytes() == (tmp_path / 'b.jsonl.gz').read_bytes()


def test_a_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / 'a.jsonl'
  records.write(path, [annotation()])
  bad = types.Problem('p', 'q', 'a', None, {'grader': object()})
  with pytest.raises(TypeError, match='has no JSON form'):
    records.append(path, [annotation(1), annotation(2, problem=bad)])
  assert records.read(path) == [annotation()]


def test_append_after_a_missing_final_newline(tmp_path):
  path = tmp_path / 'a.jsonl'
  records.write(path, [annotation()])
  path.write_bytes(path.read_bytes().rstrip(b'\n'))
  records.append(path, [annotation(1)])
  assert records.read(path) == [annotation(), annotation(1)]


def test_numpy_metadata_becomes_plain(tmp_path):
  problem = types.Problem('p', 'q', 'a', None, {'steps': np.int64(3), 'values': np.array([1, 2])})
  records.write(tmp_path / 'a.jsonl', [annotation(problem=problem)])
  assert records.read(tmp_path / 'a.jsonl')[0].problem.metadata == {'steps': 3, 'values': [1, 2]}


def changed(**changes):
  value = dataclasses.asdict(annotation(7)) | changes
  return json.dumps({key: field for key, field in value.items() if field is not Ellipsis})


PROBLEM = {'id': 'a', 'question': 'q', 'answer': '2'}
TEACHER = {'name': 't', 'step': 1, 'content_hash': 'h'}


@pytest.mark.parametrize('line, message', [
    ('{"problem": ', 'not JSON'),
    ('[1]', r'the line must be a JSON object, found \[1\]'),
    (changed(prompt=...), 'missing key prompt; the keys are problem, prompt, completion'),
    (changed(colour='red'), 'unknown key colour; the keys are problem'),
    (changed(teacher=TEACHER | {'size': 1}), 'unknown key teacher.size; the keys are name, step, content_hash'),
    (changed(teacher={'name': 't', 'step': 1}), 'missing key teacher.content_hash'),
    (changed(teacher=TEACHER | {'step': '1'}), '"teacher.step" must be int, found str "1"'),
    (changed(teacher='me'), "'teacher' must be a JSON object, found me"),
    (changed(sample=True), '"sample" must be int, found bool true'),
    (changed(sample=1.0), '"sample" must be int, found float 1.0'),
    (changed(correct=1), '"correct" must be bool, found int 1'),
    (changed(finished=None), '"finished" must be bool, found NoneType null'),
    (changed(sampling={'temperature': 'hot'}), '"sampling.temperature" must be float, found str "hot"'),
    (changed(problem=PROBLEM | {'metadata': []}), '"problem.metadata" must be Mapping'),
    (json.dumps(dataclasses.asdict(annotation())), "id 'p0#0' was already used in line 1"),
])  # fmt: skip
def test_malformed_lines_are_named(tmp_path, line, message):
  path = tmp_path / 'a.jsonl'
  records.write(path, [annotation(0), annotation(1)])
  path.write_text(path.read_text(encoding='utf-8') + '\n' + line + '\n', encoding='utf-8')
  with pytest.raises(ValueError, match=r'a\.jsonl:4: .*' + message):
    records.read(path)


def test_a_torn_gz_names_the_file(tmp_path):
  path = tmp_path / 'a.jsonl.gz'
  records.write(path, [annotation(i) for i in range(20)])
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(ValueError, match=r'a\.jsonl\.gz: not readable'):
    records.read(path)


def test_problems_from_jsonl(tmp_path):
  path = tmp_path / 'problems.jsonl'
  first = '\ufeff{"id": "a", "question": "1 + 1?", "answer": "2"}\r\n\n'
  path.write_text(first + '{"id": "b", "question": "é", "answer": "x", "rationale": "why"}', encoding='utf-8')
  assert records.problems_from_jsonl(path) == [types.Problem('a', '1 + 1?', '2'), types.Problem('b', 'é', 'x', 'why')]


@pytest.mark.parametrize('content, message', [
    ('', 'problems.jsonl: no problem in it'),
    ('{"id": "a", "question": "q", "answer": 2}', ':1: "answer" must be str, found int 2'),
    ('{"id": "a", "question": "q"}', ':1: missing key answer'),
    (json.dumps(PROBLEM | {'Rationale': 'r'}), ':1: unknown key Rationale; the keys are id, question'),
    ('{"id": "a", "question": "q", "answer": "2"}\n' * 2, ":2: id 'a' was already used in line 1"),
])  # fmt: skip
def test_malformed_problems(tmp_path, content, message):
  path = tmp_path / 'problems.jsonl'
  path.write_text(content, encoding='utf-8')
  with pytest.raises(ValueError, match=message):
    records.problems_from_jsonl(path)


def test_content_hash_follows_content_alone():
  tree = {'b': np.arange(6).reshape(2, 3), 'a': [1, 'x', None, 2.5, True]}
  assert records.content_hash(tree) == records.content_hash({'a': (1, 'x', None, 2.5, True), 'b': tree['b'].copy()})
  assert records.content_hash(tree['b'].T) == records.content_hash(tree['b'].T.copy())
  different = [
      tree['b'], tree['b'].T, tree['b'].ravel(), tree['b'].astype(np.int32), np.zeros(()), np.zeros(1),
      np.zeros((0, 2)), np.ones(2, ml_dtypes.bfloat16), np.ones(2, np.int16), 1, True, 1.0, '1',
      ['ab', 'c'], ['a', 'bc'], [['a'], 'b'], ['a', ['b']], annotation(), annotation(1), {'a': 1}, {'a': 2},
  ]  # fmt: skip
  assert len({records.content_hash(item) for item in different}) == len(different)
  with pytest.raises(TypeError, match='no content hash'):
    records.content_hash(object())


def test_conversations(tmp_path):
  path = tmp_path / 'c.jsonl'
  path.write_text('{"id": "a", "messages": [{"role": "user", "content": "x"}]}\n')
  assert records.read_conversations(path) == [records.Conversation('a', [{'role': 'user', 'content': 'x'}])]
  path.write_text('{"id": "a", "messages": "x"}\n')
  with pytest.raises(ValueError, match='c.jsonl:1: "messages" must be list'):
    records.read_conversations(path)
  path.write_text('')
  with pytest.raises(ValueError, match='no conversation in it'):
    records.read_conversations(path)
