import math
import subprocess

import pytest

from experiments.benchmarks import tunix
from srm_jax import plan

GIB = 2**30
CASE = dict(topology='v5e:4x4', rows=64, length=4096, fsdp=16, tensor=1, microbatches=1, splash=True)


def test_the_memory_of_a_step_counts_the_teacher_and_what_is_not_donated():
  said = dict(chip='TPU v5 lite', teacher=GIB, argument=4 * GIB, temp=8 * GIB, output=3 * GIB, alias=2 * GIB)
  found = tunix.read_tunix({**said, 'generated_code': GIB // 2})
  assert found == plan.Memory(5 * GIB, 8 * GIB, GIB, 14.5 * GIB, True)
  assert not tunix.read_tunix({**said, 'generated_code': 2 * GIB}).fits  # alone 15 GiB of 15.75, with the teacher 16
  text = tunix.line('tunix', CASE, found, 61.0)
  assert text.split() == '64 x 4096 16 x 1 1 tunix 5.00 8.00 14.50 (61 s)'.split()


def test_a_step_that_does_not_fit_is_said_to_want_at_least_what_was_counted():
  message = 'Used 29.80G of 15.75G hbm. \n program 20.00G \n arguments 9.80G'
  found = tunix.read_tunix(dict(chip='TPU v5 lite', teacher=GIB, error=message))
  assert not found.fits and math.isclose(found.total, 30.8 * GIB)
  assert '>= 30.80, does not fit' in tunix.line('tunix', CASE, found, 1.0)
  alone = 'required for HLO temporaries (24.58G) exceeds available HBM'
  found = tunix.read_tunix(dict(chip='TPU v5 lite', teacher=GIB, error=alone))
  assert '?' in tunix.line('tunix', CASE, found, 1.0) and 'nan' not in tunix.line('tunix', CASE, found, 1.0)
  with pytest.raises(RuntimeError, match='something else'):
    tunix.read_tunix(dict(chip='TPU v5 lite', teacher=GIB, error='something else'))


def test_a_side_that_fails_says_its_last_line(monkeypatch):
  monkeypatch.setattr(
      tunix.subprocess, 'run', lambda words, **_: subprocess.CompletedProcess(words, 1, '', 'Traceback\nKeyError: 8\n')
  )
  assert tunix.compiled('ours', CASE) == 'failed: KeyError: 8'
  assert tunix.line('ours', CASE, 'failed: KeyError: 8', 1.0).endswith('failed: KeyError: 8')
