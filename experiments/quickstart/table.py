"""The two tables, of steps and of strategies, as cells; and those cells on a terminal and in Markdown."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import rich.box
import rich.console
import rich.table

from experiments.quickstart.findings import STEPS, STRATEGIES, Compared, Findings, Row, Score, StrategyRow


class Column(NamedTuple):
  """title; cell(row) -> text; width: columns that a terminal must have to see it."""

  title: str
  cell: Callable[[Any], str]
  width: int = 0


NOTE = (
    'The control learns gold solutions of the very prompts that were annotated. Intervals are 95 % Wilson intervals '
    'over problems, p is the exact McNemar test on the same problems: neither says anything about another training '
    'run. FLOPs of a training are those of the whole line to that row (the student\'s start included, and the '
    'teacher\'s forward passes where it is distilled); "with teacher" adds training the teacher and sampling its '
    'annotations.'
)


def percent(value: float) -> str:
  """'63.1 %'; a dash where there is no number."""
  return '–' if value is None or math.isnan(value) else f'{100 * value:.1f} %'


def interval(score: Score | None) -> str:
  """'63.1 (60.1–66.0)', in percent."""
  if score is None:
    return '–'
  return f'{100 * score.accuracy:.1f} ({100 * score.low:.1f}–{100 * score.high:.1f})'


def points(value: float) -> str:
  """A signed difference of accuracies in percentage points."""
  return f'{100 * value:+.1f}'.replace('-', '−')


def probability(p: float) -> str:
  """'.032', never '.000'."""
  if p < 0.001:
    return '< .001'
  return (f'{p:.3f}' if p < 0.0995 else f'{p:.2f}').removeprefix('0')


def quantity(value: float) -> str:
  """'1.2e+13' as '1.2·10¹³'; small numbers as they are."""
  if not value:
    return '0'
  exponent = math.floor(math.log10(abs(value)))
  mantissa = round(value / 10**exponent, 1)
  if mantissa >= 10:
    mantissa, exponent = mantissa / 10, exponent + 1
  return f'{mantissa:.1f}·10{str(exponent).translate(str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))}'


def count(value: float) -> str:
  """'853k' for 853,000."""
  for limit, unit in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
    if value >= limit:
      return f'{value / limit:.3g}{unit}'
  return f'{value:.0f}'


def gain(compared: Compared | None) -> str:
  """'+3.2 over control'."""
  return '' if compared is None else f'{points(compared.test.difference)} over {SHORT[compared.against]}'


def _p(row) -> str:
  return '' if row.compared is None else probability(row.compared.test.p)


# How rows are called where they are compared with.
SHORT = {
    'teacher': 'teacher', 'base': 'start', 'sft_small': 'small gold', 'sft_gold': 'control',
    'sft_annotations': 'annotations', 'logits': 'logits', 'hidden': 'hidden', 'on_policy': 'on-policy', 'rl': 'RL',
    'sample': 'one sample', 'majority': 'majority',
}

GAIN = 'Points gained'
STEP_COLUMNS = (
    Column('Step', lambda row: row.title),
    Column('Accuracy, % (95 %)', lambda row: interval(row.score)),
    Column(GAIN, lambda row: gain(row.compared)),
    Column('p', _p),
    Column('Of teacher', lambda row: percent(row.retention), 112),
    Column('Harder, % (95 %)', lambda row: interval(row.hard), 100),
    Column('Tokens', lambda row: f'{row.tokens:.0f}', 160),
    Column('Params', lambda row: count(row.params), 160),
    Column('Training FLOPs', lambda row: quantity(row.flops), 160),
    Column('with teacher', lambda row: quantity(row.flops_with_teacher), 160),
    Column('FLOPs/answer', lambda row: quantity(row.answer_flops), 160),
)
STRATEGY_COLUMNS = (
    Column('Strategy', lambda row: row.title),
    Column('Accuracy, % (95 %)', lambda row: interval(row.score)),
    Column(GAIN, lambda row: gain(row.compared)),
    Column('p', _p),
    Column('Sampled tokens', lambda row: f'{row.sampled:.0f}', 100),
    Column('Scored tokens', lambda row: f'{row.scored:.0f}', 112),
    Column('FLOPs/answer', lambda row: quantity(row.flops), 126),
)


def step_rows(findings: Findings) -> list[Row]:
  """Rows in the order of the line."""
  return [findings.rows[name] for name in STEPS]


def strategy_rows(findings: Findings) -> list[StrategyRow]:
  """Strategies in order of their cost."""
  return [findings.strategies[name] for name in STRATEGIES]


def show(findings: Findings, console: rich.console.Console):
  """Prints both tables; a narrow terminal gets fewer columns, and is told."""
  for columns, rows in ((STEP_COLUMNS, step_rows(findings)), (STRATEGY_COLUMNS, strategy_rows(findings))):
    console.print(_rich([column for column in columns if column.width <= console.width], rows))
  console.print(NOTE, style='dim', highlight=False)
  if console.width < max(column.width for column in STEP_COLUMNS):
    console.print('The report has the columns for which this terminal is too narrow.', style='dim')


def _rich(columns: Sequence[Column], rows) -> rich.table.Table:
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
  for index, column in enumerate(columns):
    table.add_column(column.title, justify='left' if index == 0 else 'right', no_wrap=True)
  for row in rows:
    style = 'bold' if row.compared is not None and row.compared.test.p < 0.05 else None
    table.add_row(*(column.cell(row) for column in columns), style=style)
  return table


def markdown(findings: Findings) -> str:
  """Both tables with their note, for a README."""
  parts = [_markdown(STEP_COLUMNS, step_rows(findings)), _markdown(STRATEGY_COLUMNS, strategy_rows(findings)), NOTE]
  return '\n\n'.join(parts) + '\n'


def _markdown(columns: Sequence[Column], rows) -> str:
  lines = [
      '| ' + ' | '.join(column.title for column in columns) + ' |',
      '|' + '|'.join('---' if index == 0 else '---:' for index, _ in enumerate(columns)) + '|',
  ]
  lines += ['| ' + ' | '.join(column.cell(row) for column in columns) + ' |' for row in rows]
  return '\n'.join(lines)
