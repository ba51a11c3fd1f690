"""Processes that tests start as users start them, with one device, and kill."""

import os
import pathlib
import signal
import subprocess
import sys
import time

from experiments import runtime
from srm_jax import metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]


def one_device():
  """The environment of a process as users start it, without the eight devices of the tests."""
  flags = f'--xla_force_host_platform_device_count=1 {runtime.HASTY}'
  return os.environ | {'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT)}


def start(command, workdir):
  """Python with these arguments, in which {workdir} stands for the folder."""
  arguments = [part.replace('{workdir}', str(workdir)) for part in command]
  return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=one_device(), stderr=subprocess.PIPE, text=True)


def finish(process):
  _, errors = process.communicate(timeout=600)
  assert process.returncode == 0, errors
  return errors


def kill_at(process, workdir, step, *, later=0.0):
  """SIGKILL as soon as a row of `step` is on disk, or so many seconds later."""
  until = time.monotonic() + 600
  while not any(row['step'] >= step for row in metrics.read(workdir)):
    assert process.poll() is None and time.monotonic() < until, process.stderr.read()
    time.sleep(0.005)
  time.sleep(later)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL
