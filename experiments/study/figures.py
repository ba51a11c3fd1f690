"""A summary of a study as figures: accuracies of the grid, accuracy over steps, likeness of layers."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

Summary = Mapping[str, Any]
_STYLE = {
    'font.size': 10, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True, 'grid.alpha': 0.25,
    'axes.axisbelow': True, 'legend.frameon': False, 'axes.titlesize': 11, 'axes.titleweight': 'bold',
    'axes.titlelocation': 'left', 'figure.dpi': 110,
}
# The two ways of learning one loss share its colour: filled marks and full lines are on-policy.
ON = '_on'
_GREY = '#555555'
_COLORS = [one for place, one in enumerate(matplotlib.colormaps['tab10'].colors) if place != 7]  # 7 is grey


def color(name: str, arms: Sequence[str]):
  """Of an arm; grey for the first, to which the others are compared."""
  families = list(dict.fromkeys(family(arm) for arm in arms[1:]))
  return _GREY if name not in arms[1:] else _COLORS[families.index(family(name)) % len(_COLORS)]


def family(arm: str) -> str:
  """The arm's loss: its name without where the texts come from."""
  return arm.removesuffix(ON).removesuffix('_off')


def save(draw: Callable[[Figure], None], path, *, width: float, height: float):
  """A PNG of what `draw` puts on a figure of this size in inches; the same numbers give the same bytes."""
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(width, height), layout='constrained')
    draw(figure)
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={'Software': None})


def grid(summaries: Mapping[str, Summary], path):
  """Accuracy of every arm with its interval over seeds, dots for seeds; a column of panels a study, a row a task."""
  widths = [len(one['arms']) + 1 for one in summaries.values()]
  draw = lambda figure: _panels(figure, summaries, _accuracies, width_ratios=widths)
  save(draw, path, width=1.6 + 0.36 * sum(widths), height=3.1 * _rows(summaries) + 0.8)


def _rows(summaries: Mapping[str, Summary]) -> int:
  return max(len(one['tasks']) for one in summaries.values())


def _panels(figure, summaries: Mapping[str, Summary], panel: Callable, **options) -> np.ndarray:
  """panel(ax, summary, task) a study (columns) and task (rows), with a title each; the axes."""
  axes = figure.subplots(_rows(summaries), len(summaries), squeeze=False, **options)
  for column, (name, summary) in zip(axes.T, summaries.items()):
    for ax, task in zip(column, summary['tasks']):
      panel(ax, summary, task)
      ax.set_title(f'{name}: {task}')
  return axes


def _accuracies(ax, summary: Summary, task: str):
  models, arms = summary['tasks'][task]['models'], summary['arms']
  for place, arm in enumerate(arms):
    one = models[arm]['accuracy']
    filled = arm.endswith(ON) or not arm.endswith('_off')
    ax.errorbar(
        place, one['mean'], yerr=_arms(one), fmt='o', color=color(arm, arms), capsize=3, markersize=6,
        markerfacecolor=color(arm, arms) if filled else 'white',
    )
    ax.scatter([place] * len(one['by_seed']), one['by_seed'], s=5, color=color(arm, arms), alpha=0.5)
  for name, style in (('teacher', '--'), ('base', ':')):
    ax.axhline(models[name]['accuracy']['mean'], color='#999999', linestyle=style, linewidth=1, label=name)
  ax.set_xticks(range(len(arms)), arms, rotation=60, ha='right', rotation_mode='anchor')
  ax.legend(fontsize=8, loc='upper right', bbox_to_anchor=(1, 0.85))
  ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
  ax.set_ylim(-0.02, 1.02)


def _arms(one: Mapping[str, Any]) -> np.ndarray:
  """Lengths of an error bar, [2, 1]; none with one seed."""
  if one['low'] is None:
    return np.zeros((2, 1))
  return np.array([[one['mean'] - one['low']], [one['high'] - one['mean']]])


def steps(summaries: Mapping[str, Summary], path):
  """Mean dev accuracy over steps, from the start that all arms share."""

  def draw(figure):
    for column in _panels(figure, summaries, _curves).T:
      column[-1].set_xlabel('step')
      column[-1].legend(fontsize=7.5, ncols=3, loc='upper center', bbox_to_anchor=(0.5, -0.2))

  save(draw, path, width=5.6 * len(summaries), height=3.2 * _rows(summaries) + 1.2)


def _curves(ax, summary: Summary, task: str):
  models, arms = summary['tasks'][task]['models'], summary['arms']
  start = list(models['base']['curve'].values())[-1]
  for arm in arms:
    curve = models[arm]['curve']
    off = arm.endswith('_off')
    ax.plot(
        [0, *map(int, curve)], [start, *curve.values()], color=color(arm, arms), linestyle='--' if off else '-',
        marker='o', markersize=3, linewidth=1.4, label=arm,
    )
  ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
  ax.set_ylim(bottom=-0.01)


def layers(summaries: Mapping[str, Summary], path):
  """Linear CKA of every layer of every model to the teacher's layer at its relative depth."""
  widths = [len(one['arms']) + 1 for one in summaries.values()]
  draw = lambda figure: _panels(figure, summaries, _likeness, width_ratios=widths)
  save(draw, path, width=1.5 + 0.36 * sum(widths), height=2.3 * _rows(summaries) + 0.6)


def _likeness(ax, summary: Summary, task: str):
  models = {name: one for name, one in summary['tasks'][task]['models'].items() if 'cka' in one}
  values = np.array([[layer['mean'] for layer in one['cka']] for one in models.values()]).T
  ax.imshow(values, vmin=0, vmax=1, aspect='auto', cmap='viridis')
  for (layer, place), value in np.ndenumerate(values):
    ink = 'white' if value < 0.6 else 'black'
    ax.text(place, layer, f'{value:.2f}', ha='center', va='center', fontsize=7, rotation=90, color=ink)
  ax.set_xticks(range(len(models)), models, rotation=60, ha='right', rotation_mode='anchor', fontsize=8)
  ax.set_yticks(range(len(values)), [f'layer {layer + 1}' for layer in range(len(values))])
  ax.grid(visible=False)
