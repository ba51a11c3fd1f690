"""Annotations of the tiny task 'sums' with grades that are known beforehand."""

from srm_jax.data import records
from srm_jax.types import SamplingParams
from tests.tiny import SUMS


def annotation(problem, sample, completion, correct) -> records.Annotation:
  return records.Annotation(
      problem=problem, prompt=SUMS.prompt(problem), completion=completion, num_tokens=len(completion) + 1,
      correct=correct, finished=True, teacher=records.Teacher('t', 1, 'hash'), sampling=SamplingParams(samples=8),
      sample=sample, config_hash='config',
  )


def annotations(*counts: tuple[int, int]) -> list[records.Annotation]:
  """One problem for every (right, wrong): so many different completions of both kinds, of different lengths."""
  made = []
  for problem, (right, wrong) in zip(SUMS.problems('train', count=len(counts)), counts, strict=True):
    texts = [(f'{"a " * i}#### {problem.answer}', True) for i in range(right)]
    texts += [(f'{"b " * (i + 1)}#### {100 + i}', False) for i in range(wrong)]
    made += [annotation(problem, sample, *one) for sample, one in enumerate(texts)]
  return made
