"""report.html: one finished line as a page that needs nothing beside itself."""

import pathlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from experiments.quickstart import cases, flow, plots, sentences, table
from experiments.quickstart.findings import STEPS, Findings, learns_from_wrong
from experiments.quickstart.record import Settings
from experiments.quickstart.reference import Reference, differences


class Report(NamedTuple):
  """What the page is made of: a run, its numbers, two problems, the reference (or None) and the chance line."""

  settings: Settings
  stages: Mapping[str, Any]
  findings: Findings
  cases: Sequence[cases.Case]
  reference: Reference | None
  chance: float


def render(report: Report) -> str:
  """The page as HTML."""
  css = pathlib.Path(__file__).with_name('page.css').read_text(encoding='utf-8')
  picture = f'<div class="picture">{flow.picture(report.findings)}</div>'
  body = '\n'.join([
      _head(report), _section('The line', picture), _tables(report.findings), _plots(report), _cases(report.cases),
      _limits(report.settings), _settings(report),
  ])
  return (
      '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
      '<meta name="viewport" content="width=device-width, initial-scale=1">'
      f'<title>srm_jax quickstart: {escape(report.settings.task)}</title><style>{css}</style></head>\n'
      f'<body><main>{body}</main></body></html>\n'
  )


def _section(title: str, content: str) -> str:
  return f'<section><h2>{escape(title)}</h2>{content}</section>'


def _paragraphs(style: str, texts: Sequence[str]) -> str:
  return ''.join(f'<p class="{style}">{escape(text)}</p>' for text in texts if text)


def _head(report: Report) -> str:
  settings, findings = report.settings, report.findings
  outside, bands = sentences.against_reference(findings, report.reference, settings)
  warnings = (
      sentences.SMOKE if settings.size == 'smoke' else '',
      sentences.human_written(findings, report.chance) if settings.task == 'gsm8k' else '',
      sentences.UNFILTERED if learns_from_wrong(report.stages) else '',
      sentences.shortened(settings),
  )
  return (
      f'<p class="eyebrow">srm_jax quickstart · {escape(settings.task)} · seed {settings.seed}</p>'
      f'<h1>{escape(sentences.headline(findings))}</h1>{_paragraphs("flag", warnings)}'
      f'{_paragraphs("lead", sentences.verdicts(findings))}{_paragraphs("flag" if outside else "note", [bands])}'
  )


def _tables(findings: Findings) -> str:
  steps = _table(table.STEP_COLUMNS, table.step_rows(findings))
  strategies = _table(table.STRATEGY_COLUMNS, table.strategy_rows(findings))
  return (
      _section('What each step was worth', steps + _paragraphs('note', [table.NOTE]))
      + _section('What more computation for an answer was worth', strategies + _paragraphs('note', [sentences.SAMPLES]))
  )


def _table(columns: Sequence[table.Column], rows) -> str:
  head = ''.join(f'<th>{escape(column.title)}</th>' for column in columns)
  lines = ''.join(f'<tr>{"".join(_cell(column, row) for column in columns)}</tr>' for row in rows)
  return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _cell(column: table.Column, row) -> str:
  text, style = escape(column.cell(row)), ''
  if column.title == table.GAIN and row.compared is not None:
    test = row.compared.test
    style = f' title="95 % interval over problems: {table.points(test.low)} to {table.points(test.high)} points"'
    if test.p < sentences.SURE:
      style += f' class="sure {"up" if test.difference > 0 else "down"}"'
  if column is table.STEP_COLUMNS[0]:
    text = f'<i style="background:{plots.COLORS[row.name]}"></i>{text}'
  return f'<td{style}>{text}</td>'


def _plots(report: Report) -> str:
  findings, stages = report.findings, report.stages
  outside, note = sentences.against_reference(findings, report.reference, report.settings)
  comparable = report.reference is not None and not differences(report.reference, report.settings)
  bands = report.reference.bands if comparable else {}
  figures = (
      ('Accuracy of every step', plots.accuracy(findings, bands, report.chance, outside),
       f'Greedy accuracy with 95 % intervals over problems. {note}'),
      ('While training', plots.curves(stages, plots.divergences(stages), findings.best), sentences.CURVES),
      ('By number of reasoning steps', plots.by_steps(findings, report.chance),
       'Steps are those of the worked solution; 95 % intervals over problems.'),
      ('What an answer costs', plots.strategies(findings, report.chance),
       'Strategies on the last model of the line, and the teacher\'s greedy answer; 95 % intervals over problems.'),
  )
  content = ''.join(
      f'<figure><h3>{escape(title)}</h3>{svg}<figcaption>{escape(caption)}</figcaption></figure>'
      for title, svg, caption in figures
  )
  return _section('Plots', content)


def _cases(found: Sequence[cases.Case]) -> str:
  return _section('Two problems', f'<div class="cases">{"".join(map(_case, found))}</div>')


def _case(case: cases.Case) -> str:
  title = f'<h3>{escape(case.what)}</h3>'
  if not case.prompt:
    nothing = f'None of the {case.n:,} test problems is of this kind.'
    return f'<div class="case">{title}{_paragraphs("note", [nothing])}</div>'
  which = f'The first of {case.matching:,} such problems among {case.n:,}, in the order of the test set.'
  gold = _try('Worked solution', '', case.solution.splitlines(), None)
  tries = (_try(one.title, 'right' if one.right else 'wrong', one.lines, one.wrong) for one in case.tries)
  return (
      f'<div class="case">{title}{_paragraphs("note", [which])}<p class="question">{escape(case.prompt.strip())}</p>'
      f'<div class="tries">{gold}{"".join(tries)}</div></div>'
  )


def _try(title: str, verdict: str, lines: Sequence[str], wrong: int | None) -> str:
  word = f'<span class="{verdict}">{verdict}</span>' if verdict else ''
  items = ''.join(_line(index, text, wrong) for index, text in enumerate(lines))
  if wrong is not None and wrong >= len(lines):
    items += '<li class="first"><small>stops before the answer</small></li>'
  return f'<div class="try"><header><span>{escape(title)}</span>{word}</header><ol>{items}</ol></div>'


def _line(index: int, text: str, wrong: int | None) -> str:
  if index == wrong:
    return f'<li class="first">{escape(text)}<small>first wrong step</small></li>'
  return f'<li{" class=after" if wrong is not None and index > wrong else ""}>{escape(text)}</li>'


def _limits(settings: Settings) -> str:
  items = ''.join(f'<li>{escape(text)}</li>' for text in sentences.limits(settings))
  return f'<section class="box"><h2>What this does not show</h2><ul>{items}</ul></section>'


def _settings(report: Report) -> str:
  settings = report.settings
  run = {
      'task': settings.task, 'size': settings.size, 'seed': settings.seed, 'factor on steps': f'{settings.steps:g}',
      'compute dtype': settings.dtype, 'RL starts from': STEPS[report.findings.best].title, **settings.machine,
  }
  seconds = _seconds(report)
  smoke = ' --smoke' if settings.size == 'smoke' else ''
  again = f'bash experiments/quickstart.sh --task={settings.task}{smoke} --seed={settings.seed} --workdir=runs/again'
  return _section('Settings', (
      f'<p class="note">The same seed again: <code>{escape(again)}</code>. Sizes and step counts stand in '
      f'<code>configs/quickstart_sizes.py</code>.</p><div class="settings">{_pairs(run)}{_pairs(seconds)}</div>'
  ))


def _seconds(report: Report) -> dict[str, str]:
  """What every stage took, beside what was expected of it before the run."""
  stages, expected = report.stages, report.settings.estimates
  took = {
      name: f'{stage.seconds:.0f} s' + (f' (estimate {expected[name]:.0f} s)' if name in expected else '')
      for name, stage in stages.items() if stage.seconds >= 0.5
  }
  total = sum(stage.seconds for stage in stages.values())
  return took | {'all stages': f'{total / 60:.1f} minutes (estimate {sum(expected.values()) / 60:.1f})'}


def _pairs(values: Mapping[str, Any]) -> str:
  lines = ''.join(f'<tr><td>{escape(str(key))}</td><td>{escape(str(value))}</td></tr>' for key, value in values.items())
  return f'<div class="scroll"><table><tbody>{lines}</tbody></table></div>'
