"""The picture of the line: who teaches whom, and how often each is right."""

from html import escape

from experiments.quickstart.findings import CONTROL, DISTILLED, STEPS, Findings
from experiments.quickstart.plots import COLORS
from experiments.quickstart.table import percent

ARMS = (*DISTILLED, CONTROL, 'sft_small')  # the taught ones beside their teacher
WIDTH, HEIGHT, BOX, TOP, PITCH = 960, 372, 46, 18, 58
TEACHER_Y, BASE_Y, RL_Y = 105, 279, 164
ARM_X, ARM_WIDTH, FAN_X = 424, 196, 352


def picture(findings: Findings) -> str:
  """An <svg> of the line with the accuracy of every model."""
  y = {name: TOP + PITCH * place for place, name in enumerate(ARMS)}
  best = y[findings.best]
  parts = [_arrow((150, TEACHER_Y + 23), (196, TEACHER_Y + 23), COLORS['teacher'])]
  parts += [_arrow((FAN_X, TEACHER_Y + 23), (ARM_X, y[name] + 15), COLORS['teacher']) for name in DISTILLED]
  parts.append(f'<path d="M150 {BASE_Y + 23} H{FAN_X}" stroke="{COLORS["base"]}" stroke-width="1.5" opacity=".6"/>')
  parts += [_arrow((FAN_X, BASE_Y + 23), (ARM_X, y[name] + 31), COLORS['base']) for name in ARMS]
  parts.append(_arrow((ARM_X + ARM_WIDTH, best + 23), (676, RL_Y + 23), COLORS['rl']))
  parts.append(_arrow((806, RL_Y + 23), (836, RL_Y + 23), COLORS['rl']))
  parts += [_model('teacher', findings, 8, TEACHER_Y, 142), _model('base', findings, 8, BASE_Y, 142)]
  parts.append(_box(196, TEACHER_Y, FAN_X - 196, COLORS['teacher'], *_annotations(findings)))
  parts += [_model(name, findings, ARM_X, y[name], ARM_WIDTH, chosen=name == findings.best) for name in ARMS]
  parts.append(_model('rl', findings, 676, RL_Y, 130))
  votes = findings.strategies['majority'].score.accuracy
  parts.append(_box(836, RL_Y, 116, COLORS['rl'], 'Majority vote', percent(votes)))
  origin = escape(f'from the best on dev: {STEPS[findings.best].title}')
  parts.append(f'<text x="952" y="{RL_Y + 64}" class="small" text-anchor="end">{origin}</text>')
  label = 'The line from teacher to strategies, with the accuracy of every model'
  return f'<svg class="flow" role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg>'


def _annotations(findings: Findings) -> tuple[str, str]:
  found = findings.annotation
  return f'{found["samples"]:,} annotations', f'{found["correct"] / found["samples"]:.0%} right'


def _model(name: str, findings: Findings, x: float, y: float, width: float, *, chosen: bool = False) -> str:
  row = findings.rows[name]
  return _box(x, y, width, COLORS[name], STEPS[name].title, percent(row.score.accuracy), chosen=chosen)


def _box(x: float, y: float, width: float, color: str, title: str, value: str, *, chosen: bool = False) -> str:
  border = 3 if chosen else 1.4
  return (
      f'<rect x="{x}" y="{y}" width="{width}" height="{BOX}" rx="8" class="card" stroke="{color}" '
      f'stroke-width="{border}"/>'
      f'<rect x="{x}" y="{y + 9}" width="4" height="{BOX - 18}" fill="{color}"/>'
      f'<text x="{x + 14}" y="{y + 19}" class="name">{escape(title)}</text>'
      f'<text x="{x + 14}" y="{y + 37}" class="value">{escape(value)}</text>'
  )


def _arrow(start: tuple[float, float], end: tuple[float, float], color: str) -> str:
  (x, y), (to_x, to_y) = start, (end[0] - 7, end[1])
  middle = (x + to_x) / 2
  head = f'M{to_x} {to_y - 4} L{to_x + 7} {to_y} L{to_x} {to_y + 4} Z'
  return (
      f'<path d="M{x} {y} C{middle} {y} {middle} {to_y} {to_x} {to_y}" fill="none" stroke="{color}" '
      'stroke-width="1.5" opacity=".6"/>'
      f'<path d="{head}" fill="{color}"/>'
  )
