"""Plots of a finished line as SVG text that takes its colours of text and grid from the page around it."""

import io
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.quickstart.findings import CONTROL, DISTILLED, STEPS, Findings, Score
from experiments.quickstart.reference import Band
from experiments.quickstart.table import SHORT
from srm_jax import metrics, statistics

INK = '#0b0c0d'  # stands for currentColor, which matplotlib does not know
COLORS = {
    'teacher': '#7d8590', 'base': '#a58b6f', 'sft_small': '#c9a227', 'sft_gold': '#d9822b',
    'sft_annotations': '#2a9d8f', 'logits': '#2f7fd1', 'hidden': '#6f6fe0', 'on_policy': '#a45cc9', 'rl': '#d6456b',
}
STRATEGY_COLOR = COLORS['rl']
_STYLE = {
    'svg.fonttype': 'none', 'font.family': 'sans-serif', 'font.size': 11, 'text.color': INK, 'axes.labelcolor': INK,
    'xtick.color': INK, 'ytick.color': INK, 'axes.edgecolor': INK, 'axes.spines.top': False, 'axes.spines.right': False,
    'grid.color': INK, 'grid.alpha': 0.12, 'axes.grid': True, 'axes.axisbelow': True, 'legend.frameon': False,
    'axes.titlesize': 11.5, 'axes.titleweight': 'bold', 'axes.titlelocation': 'left', 'lines.linewidth': 1.8,
}


def svg(draw: Callable[[Figure], None], label: str, *, width: float, height: float) -> str:
  """An <svg> element with what `draw` puts on a figure of this size in inches."""
  with matplotlib.rc_context(_STYLE | {'svg.hashsalt': label}):
    figure = Figure(figsize=(width, height), layout='constrained')
    draw(figure)
    file = io.StringIO()
    figure.savefig(file, format='svg', transparent=True, metadata={'Date': None, 'Creator': None})
  text = re.sub(r'^.*?<svg ', '<svg ', file.getvalue(), flags=re.DOTALL)
  text = re.sub(r'<metadata>.*?</metadata>', '', text, flags=re.DOTALL)
  text = re.sub(r' (width|height)="[\d.]+pt"', '', text, count=2)
  # Programs draw ids from a hash: those of two plots must not meet on one page.
  salt = re.sub(r'\W+', '', label)[:24]
  text = re.sub(r'(id="|url\(#|href="#)', rf'\g<1>{salt}-', text)
  text = re.sub(r"font(-family)?: ([^;\"]*?)'?DejaVu Sans'?[^;\"]*", lambda match: _font(match[0]), text)
  return text.replace(INK, 'currentColor').replace('<svg ', f'<svg role="img" aria-label="{label}" ', 1)


def _font(rule: str) -> str:
  size = re.search(r'[\d.]+px', rule)
  weight = 'bold ' if 'bold' in rule or '700' in rule else ''
  return f'font: {weight}{size[0]} var(--sans, sans-serif)' if size else 'font-family: var(--sans, sans-serif)'


def _percent_axis(axis, *, up: bool = True):
  axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
  axis.axes.set_ylim(0, 1.02) if up else axis.axes.set_xlim(0, 1.02)


def accuracy(findings: Findings, bands: Mapping[str, Band], chance: float, outside: Sequence[str]) -> str:
  """Accuracy of every row with its interval, over the reference band, with the chance line."""

  def draw(figure):
    ax = figure.subplots()
    for place, row in enumerate(findings.rows.values()):
      if row.name in bands:
        band = bands[row.name]
        ax.barh(place, band.high - band.low, left=band.low, height=0.72, color=COLORS[row.name], alpha=0.2, linewidth=0)
        ax.plot([band.mean, band.mean], [place - 0.36, place + 0.36], color=COLORS[row.name], alpha=0.7, linewidth=1.2)
      ax.errorbar(
          row.score.accuracy, place, xerr=_arms(row.score), fmt='o', color=COLORS[row.name], capsize=3, markersize=7,
          elinewidth=2,
      )
      flag = ' outside its band' if row.name in outside else ''
      right = row.score.high < 0.86
      ax.annotate(
          f'{100 * row.score.accuracy:.1f} %{flag}', (row.score.high if right else row.score.low, place),
          xytext=(8 if right else -8, 0), textcoords='offset points', va='center', ha='left' if right else 'right',
          fontsize=10,
      )
    _chance(ax, chance, vertical=True)
    ax.set_yticks(range(len(findings.rows)), [row.title for row in findings.rows.values()])
    ax.invert_yaxis()
    ax.grid(axis='y', visible=False)
    _percent_axis(ax.xaxis, up=False)

  return svg(draw, 'Accuracy of every step', width=8.6, height=4.3)


def _arms(score: Score) -> np.ndarray:
  """Lengths of the error bar, [2, 1]; at 0 and 100 % rounding must not make one of them negative."""
  return np.maximum([[score.accuracy - score.low], [score.high - score.accuracy]], 0.0)


def _chance(ax: Axes, chance: float, *, vertical: bool):
  line = ax.axvline if vertical else ax.axhline
  line(chance, color=INK, linestyle=(0, (2, 3)), linewidth=1, alpha=0.7)
  place = dict(xy=(chance, 1), xycoords=('data', 'axes fraction'), xytext=(3, 3)) if vertical else dict(
      xy=(1, chance), xycoords=('axes fraction', 'data'), xytext=(-2, 3))
  side = 'left' if vertical else 'right'
  ax.annotate(f'chance {100 * chance:.1f} %', **place, textcoords='offset points', fontsize=9, ha=side)


# Metrics that mean the same in every run that has one of them, newest name first.
_TARGETS = ('loss/cross_entropy', 'cross_entropy')


def _series(rows, names) -> tuple[np.ndarray, np.ndarray]:
  points = [(row['step'], row[name]) for row in rows for name in names if name in row]
  return (np.array(points, float).T if points else np.zeros((2, 0)))


def curves(stages: Mapping[str, Any], divergences: Mapping[str, str], best: str) -> str:
  """Four panels over steps: the two starts, the arms on their targets, divergence to the teacher, and rewards.

  Args:
    stages: finished stages.
    divergences: {distilled arm: name of its divergence}.
    best: the arm that RL started from.
  """
  rows = {name: metrics.read(stages[name].target) for name in STEPS}
  fixed = [name for name in STEPS if name not in ('teacher', 'base', 'on_policy', 'rl')]
  panels = (
      ('Token accuracy from scratch', ('teacher', 'base'), lambda name: ('token_accuracy',)),
      ('Arms: cross-entropy on their targets', fixed, lambda name: _TARGETS),
      ('Divergence to the teacher', tuple(divergences), lambda name: (divergences[name],)),
      ('Share of own samples that are right', ('on_policy', 'rl'), lambda name: ('reward',)),
  )

  def draw(figure):
    for ax, (title, names, wanted) in zip(figure.subplots(2, 2).flat, panels):
      for name in names:
        steps, values = _series(rows[name], wanted(name))
        if len(steps):
          marker = 'o' if len(steps) < 3 else ''
          ax.plot(steps, values, color=COLORS[name], label=SHORT[name], marker=marker, markersize=4)
      ax.set_title(title)
      ax.set_xlabel('step')
      if title.startswith(('Token', 'Share')):
        _percent_axis(ax.yaxis)
      if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=9.5, handlelength=1.4)

  return svg(draw, f'Training curves; RL starts from {SHORT[best]}', width=8.6, height=5.6)


def by_steps(findings: Findings, chance: float) -> str:
  """Accuracy by number of reasoning steps: teacher, control, the arm that RL started from, RL."""
  names = list(dict.fromkeys(('teacher', CONTROL, findings.best_distilled, findings.best, 'rl')))

  def draw(figure):
    ax = figure.subplots()
    for shift, name in zip(np.linspace(-0.12, 0.12, len(names)), names):
      tallies = [(steps, *tally) for steps, tally in findings.rows[name].by_steps.items()]
      scores = [Score(right / n, *statistics.wilson_interval(right, n), n) for _, right, n in tallies]
      ax.errorbar(
          [steps + shift for steps, _, _ in tallies], [score.accuracy for score in scores],
          yerr=np.concatenate([_arms(score) for score in scores], axis=1), color=COLORS[name], label=STEPS[name].title,
          marker='o', markersize=4.5, capsize=2, elinewidth=1.1,
      )
    _chance(ax, chance, vertical=False)
    counts = {steps: tally[1] for steps, tally in findings.rows['teacher'].by_steps.items()}
    ax.set_xticks(list(counts), [f'{steps}\nn={n}' for steps, n in counts.items()])
    ax.set_xlabel('reasoning steps of the worked solution')
    ax.legend(fontsize=9.5)
    _percent_axis(ax.yaxis)

  return svg(draw, 'Accuracy by number of reasoning steps', width=8.6, height=3.9)


def strategies(findings: Findings, chance: float) -> str:
  """Accuracy against FLOPs an answer, with the teacher's greedy answer beside the strategies."""

  def draw(figure):
    ax = figure.subplots()
    points = [(row.flops, row.score, row.title, STRATEGY_COLOR) for row in findings.strategies.values()]
    teacher = findings.rows['teacher']
    points.append((teacher.answer_flops, teacher.score, 'Teacher, greedy', COLORS['teacher']))
    for flops, score, title, color, text_y in _spread(points):
      ax.errorbar(
          flops, score.accuracy, yerr=_arms(score), fmt='o', color=color, markersize=8, capsize=3, elinewidth=1.5,
      )
      ax.annotate(title, (flops, text_y), xytext=(11, 0), textcoords='offset points', va='center', fontsize=9.5)
    _chance(ax, chance, vertical=False)
    ax.set_xscale('log')
    costs = [point[0] for point in points]
    ax.set_xlim(min(costs) / 1.6, max(costs) * 6)  # room for words on the right
    ax.set_xlabel('FLOPs an answer (sampling and scoring)')
    _percent_axis(ax.yaxis)
    ax.set_ylim(0, 1.12)
    ax.set_yticks(np.arange(0, 1.01, 0.2))

  return svg(draw, 'Accuracy against FLOPs an answer', width=8.6, height=3.9)


def _spread(points, gap: float = 0.075):
  """The points with the height of their label, so that labels of points of like cost do not meet."""
  placed: list[tuple] = []
  for flops, score, title, color in sorted(points, key=lambda point: point[1].accuracy):
    near = [text_y for other, *_, text_y in placed if 0.4 < flops / other < 2.5]
    placed.append((flops, score, title, color, max([score.accuracy, *(text_y + gap for text_y in near)])))
  return placed


def divergences(stages: Mapping[str, Any]) -> dict[str, str]:
  """{distilled arm: the term that is its divergence}, from the configs of the finished runs."""
  found = {}
  for name in DISTILLED:
    recipe = json.loads((pathlib.Path(stages[name].target) / 'config.json').read_text())['recipe']
    terms = recipe['loss']['terms'].items() if 'loss' in recipe else ()
    found |= {name: term for term, section in terms if section['kind'] == 'divergence'}
  return found
