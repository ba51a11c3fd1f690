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
_COLORS = matplotlib.colormaps['tab10'].colors


def color(name: str, arms: Sequence[str]):
  """Of an arm; grey for the first, to which the others are compared."""
  families = list(dict.fromkeys(family(arm) for arm in arms[1:]))
  return '#555555' if name not in arms[1:] else _COLORS[families.index(family(name)) % len(_COLORS)]


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


def grid(summaries: Sequence[Summary], path):
  """Accuracy of every arm with its interval over seeds, a row of panels a task, a panel a study."""
  tasks = list(summaries[0]['tasks'])

  def draw(figure):
    axes = figure.subplots(
        len(tasks), len(summaries), squeeze=False, width_ratios=[len(one['arms']) for one in summaries],
    )
    for row, task in zip(axes, tasks):
      for ax, summary in zip(row, summaries):
        _accuracies(ax, summary, task)
      row[0].set_ylabel('accuracy')

  save(draw, path, width=1.6 + 0.36 * sum(len(one['arms']) + 1 for one in summaries), height=3.1 * len(tasks) + 0.8)


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
  ax.set_title(f'{task}')
  ax.legend(fontsize=8, loc='lower left')
  _percent(ax)


def _arms(one: Mapping[str, Any]) -> np.ndarray:
  """Lengths of an error bar, [2, 1]; none with one seed."""
  if one['low'] is None:
    return np.zeros((2, 1))
  return np.array([[one['mean'] - one['low']], [one['high'] - one['mean']]])


def _percent(ax):
  ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
  ax.set_ylim(0, 1.02)


def steps(summaries: Sequence[Summary], path):
  """Mean dev accuracy over steps, from the start that all arms share."""
  tasks = list(summaries[0]['tasks'])

  def draw(figure):
    axes = figure.subplots(len(tasks), len(summaries), squeeze=False)
    for row, task in zip(axes, tasks):
      for ax, summary in zip(row, summaries):
        _curves(ax, summary, task)
    for ax in axes[-1]:
      ax.set_xlabel('step')
    for ax, summary in zip(axes[0], summaries):
      ax.legend(fontsize=7, ncols=2)

  save(draw, path, width=5.6 * len(summaries), height=3.4 * len(tasks))


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
  ax.set_title(task)
  _percent(ax)


def layers(summaries: Sequence[Summary], path):
  """Linear CKA of every layer of every model to the teacher's layer at its relative depth."""
  tasks = list(summaries[0]['tasks'])

  def draw(figure):
    axes = figure.subplots(len(tasks), len(summaries), squeeze=False)
    for row, task in zip(axes, tasks):
      for ax, summary in zip(row, summaries):
        models = {name: one for name, one in summary['tasks'][task]['models'].items() if 'cka' in one}
        values = np.array([[layer['mean'] for layer in one['cka']] for one in models.values()]).T
        image = ax.imshow(values, vmin=0, vmax=1, aspect='auto', cmap='viridis')
        for (layer, place), value in np.ndenumerate(values):
          ax.text(place, layer, f'{value:.2f}', ha='center', va='center', fontsize=6.5, rotation=90,
                  color='white' if value < 0.6 else 'black')
        ax.set_xticks(range(len(models)), models, rotation=60, ha='right', rotation_mode='anchor', fontsize=8)
        ax.set_yticks(range(len(values)), [f'layer {layer + 1}' for layer in range(len(values))])
        ax.set_title(task)
        ax.grid(visible=False)
      figure.colorbar(image, ax=row[-1], label='linear CKA')

  save(draw, path, width=1.5 + 0.36 * sum(len(one['arms']) + 2 for one in summaries), height=2.3 * len(tasks) + 0.6)
