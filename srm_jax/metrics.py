"""Metrics from device to disk and terminal: JSONL, TensorBoard and a progress bar."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.progress

from srm_jax.train_step import combine
from srm_jax.types import Max, Mean


def values(metrics: Mapping[str, Mean | Max]) -> dict[str, float]:
  """Divides once: {name: total / count, or the maximum}; a mean over nothing is NaN."""
  host = jax.device_get(metrics)

  def one(metric):
    if isinstance(metric, Max):
      return float(metric.value)
    return float(metric.total) / float(metric.count) if metric.count else math.nan

  return {name: one(metric) for name, metric in host.items()}


def merge(collected: list[dict[str, Mean | Max]]) -> dict[str, Mean | Max]:
  """One set of metrics from several steps."""
  total, *rest = collected
  for metrics in rest:
    total = combine(total, metrics)
  return total


def read(workdir) -> list[dict]:
  """The rows of a run's metrics.jsonl, in order; none if there is no such file.

  A line that a kill cut short is left out.
  """
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  lines = path.read_text().splitlines(keepends=True) if path.exists() else []
  return [json.loads(line) for line in lines if line.endswith('\n')]


class Writer(NamedTuple):
  """Writes rows to metrics.jsonl and TensorBoard event files below a workdir; with path None to neither.

  A mean over nothing is NaN in a row, and no point on the board.
  """

  path: pathlib.Path | None
  board: Any  # a tensorboardX.SummaryWriter

  def write(self, step: int, row: Mapping[str, float]):
    if self.path is None:
      return
    with self.path.open('a') as file:
      file.write(json.dumps({'step': step, **row}) + '\n')
    for name, value in row.items():
      if not math.isnan(value):
        self.board.add_scalar(name, np.float32(value), step)

  def close(self):
    self.board.close()


def open_writer(workdir, *, step: int) -> Writer:
  """A writer that continues after `step`: rows beyond it belong to steps that are about to be run again. Of several
  hosts the first one writes.
  """
  writes = jax.process_index() == 0
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  rows = [row for row in read(workdir) if row['step'] <= step]
  if writes:
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  import tensorboardX  # here, since it imports torch where that is installed: four seconds of every process

  board = str(pathlib.Path(workdir) / 'tensorboard')
  return Writer(
      path if writes else None, tensorboardX.SummaryWriter(board, purge_step=step + 1, write_to_disk=writes)
  )


class Progress(NamedTuple):
  """A progress bar with the rate and the newest figures."""

  bar: rich.progress.Progress
  task: rich.progress.TaskID

  def __enter__(self):
    self.bar.start()
    return self

  def __exit__(self, *_):
    self.bar.stop()

  def advance(self, amount: float, **figures: float):
    """Moves on; the figures stay until others are given."""
    text = {'figures': '  '.join(f'{name} {value:.4g}' for name, value in figures.items())} if figures else {}
    self.bar.update(self.task, advance=amount, **text)


def progress(title: str, total: float, *, done: float = 0, disable: bool = False) -> Progress:
  """A bar for `total` units of work, of which `done` are behind us."""
  columns = (
      rich.progress.TextColumn('{task.description:<22}'), rich.progress.BarColumn(bar_width=24),
      rich.progress.MofNCompleteColumn(), rich.progress.TimeElapsedColumn(), rich.progress.TimeRemainingColumn(),
      rich.progress.TextColumn('{task.fields[figures]}'),
  )
  bar = rich.progress.Progress(*columns, disable=disable)
  return Progress(bar, bar.add_task(title, total=total, completed=done, figures=''))
