"""Mathematics written by people: GSM8K.

Records come from `$SRM_DATA_DIR/gsm8k/{train,test}.jsonl.gz` where that variable is set, else from tensorflow-datasets.
The calculator marks <<48/2=24>> of the public solutions are stripped: the student has no calculator, and the result
follows each mark anyway.

Reference: Cobbe et al., Training Verifiers to Solve Math Word Problems, arXiv 2110.14168.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import pathlib
import random
import re
from collections.abc import Iterable

from srm_jax.tasks import graders, task
from srm_jax.types import Problem

SPLITS = ('train', 'dev', 'test')
DEV_SHARE = 15  # one train problem in fifteen, by hash of the question: 7473 -> about 500
_MARK = re.compile(r'<<[^<>\n]*>>')
_INTEGER = re.compile(r'-?\d+')


def parse_gsm8k(lines: Iterable[str], *, source: str, split: str) -> list[Problem]:
  """Problems from JSON lines in the public format ('answer' ends in '#### 72') or with 'rationale' and 'answer' apart.

  Args:
    lines: JSON objects.
    source: named in errors, with the line number.
    split: 'train' or 'test', for the ids.

  Raises:
    ValueError: a malformed record, or no record; names source and line.
  """
  problems = []
  for number, line in enumerate(lines, start=1):
    try:
      problems.append(_parse_record(json.loads(line), f'gsm8k-{split}-{number - 1}'))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise ValueError(
          f'{source}, line {number}: malformed GSM8K record ({type(error).__name__}: {error}); expected an object with '
          f"'question' and an 'answer' that ends in '#### <integer>', got {line.strip()[:80]!r}") from error
  if not problems:
    raise ValueError(f'{source} holds no record; delete it and fetch it again')
  return problems


def _parse_record(record: dict, identifier: str) -> Problem:
  question, answer = record['question'].strip(), record['answer']
  if 'rationale' in record:
    rationale = record['rationale']
  else:
    rationale, mark, answer = answer.rpartition('####')
    if not mark:
      raise ValueError("no '####'")
  answer = graders.canonical_number(answer)
  if not question or not _INTEGER.fullmatch(answer):
    raise ValueError('empty question' if not question else f'answer {answer!r} is not an integer')
  lines = [line.strip() for line in _MARK.sub('', rationale).splitlines() if line.strip()]
  metadata = {'family': 'gsm8k', 'steps': len(lines)}
  return Problem(identifier, question, answer, '\n'.join(lines), metadata)


@functools.lru_cache(maxsize=4)
def _read(split: str, folder: str | None) -> tuple[Problem, ...]:
  """All problems of a public split, in file order."""
  if folder is None:
    from srm_jax.tasks import gsm8k_builder  # needs tensorflow-datasets only here

    return tuple(parse_gsm8k(gsm8k_builder.read_lines(split), source=f'tensorflow-datasets gsm8k {split}',
    split=split))
  path = pathlib.Path(folder) / 'gsm8k' / f'{split}.jsonl.gz'
  if not path.exists():
    raise FileNotFoundError(f'{path} not found; point SRM_DATA_DIR at a folder with it, or unset it to download GSM8K')
  try:
    with gzip.open(path, 'rt', encoding='utf-8') as lines:
      return tuple(parse_gsm8k(lines, source=str(path), split=split))
  except (OSError, EOFError, UnicodeDecodeError) as error:
    raise ValueError(f'{path} is not a readable gzip file of UTF-8 text ({error}); replace it') from error


def gsm8k_problems(split: str, *, count: int | None = None, seed: int = 0) -> list[Problem]:
  """Problems of a split: all in file order, or the first `count` of a permutation that `seed` chooses.

  dev is a fixed slice of the public train file, and train is the rest of it.

  Raises:
    ValueError: an unknown split, more problems than there are, or a malformed record.
    FileNotFoundError: $SRM_DATA_DIR is set and has no GSM8K.
  """
  task.check_split('gsm8k', split, SPLITS)
  problems = list(_read('test' if split == 'test' else 'train', os.environ.get('SRM_DATA_DIR') or None))
  if split != 'test':
    wanted = split == 'dev'
    problems = [problem for problem in problems if (task.stable_hash(problem.question) % DEV_SHARE == 0) == wanted]
  if count is None:
    return problems
  if count > len(problems):
    raise ValueError(f"task 'gsm8k', split {split!r} has {len(problems)} problems, not {count}; ask for fewer")
  random.Random(seed).shuffle(problems)
  return problems[:count]


def extract_gsm8k(text: str) -> str | None:
  """The number after '####' without commas and dollar signs; None where there is none."""
  answer = graders.extract_hash_answer(text)
  match = re.match(r'\$?-?\$?[\d.,]+', answer, re.ASCII) if answer else None
  return graders.canonical_number(match[0]) or None if match else None


def grade_gsm8k(problem: Problem, text: str) -> float:
  """Strict grading: 1.0 where the number after '####' is the gold."""
  return float(graders.number_equal(problem.answer, extract_gsm8k(text)))


def gsm8k_task() -> task.Task:
  """GSM8K: 7473 train problems (dev included), 1319 test problems; every answer is an integer."""
  return task.Task(
      name='gsm8k', domain='math', splits=SPLITS, problems=gsm8k_problems, prompt=task.question_prompt,
      solution=task.worked_solution, extract=extract_gsm8k, grade=grade_gsm8k, first_wrong_step=task.no_step_oracle,
      path=task.equations,
  )
