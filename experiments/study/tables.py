"""A summary of a study as Markdown tables."""

from collections.abc import Mapping, Sequence
from typing import Any

Summary = Mapping[str, Any]
PERCENT = ('accuracy',)  # of what a claim may be about, what is shown in percentage points


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[str] = ()) -> str:
  """Numbers to the right; the first column, and those whose header is among `words`, to the left."""
  rule = ['---', *('---' if name in words else '---:' for name in header[1:])]
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in (header, rule, *rows)) + '\n'


def verdict_table(summary: Summary, claims: Sequence[Mapping[str, Any]]) -> str:
  """A row a claim: the difference on every task, and what it comes to."""
  tasks = list(summary['tasks'])
  rows = [
      [one['claim'], *(evidence(one['evidence'][task], claim['what']) for task in tasks), f'**{one["verdict"]}**',
       needed(one)]
      for one, claim in zip(summary['verdicts'], claims, strict=True)
  ]
  return markdown(['claim', *tasks, 'verdict', 'what would decide'], rows, ('verdict', 'what would decide'))


def evidence(one: Mapping[str, Any], what: str) -> str:
  """'+3.1 [1.2, 5.0], p < .001': points of accuracy, other quantities as they are; or 'not reached'."""
  if one['mean'] is None:
    return 'not reached'
  scale, digits = (100, 1) if what in PERCENT else (1, 3)
  text = interval(one, scale=scale, digits=digits, sign='+')
  return text if one['p'] is None else f'{text}, {p_value(one["p"])}'


def interval(one: Mapping[str, Any], *, scale: float = 1.0, digits: int = 1, sign: str = '') -> str:
  """'71.2 [68.0, 74.4]', or the mean alone where there is one seed."""
  shown = lambda key, sign='': f'{scale * one[key]:{sign}.{digits}f}'
  mean = shown('mean', sign)
  return mean if one['low'] is None else f'{mean} [{shown("low")}, {shown("high")}]'


def p_value(p: float) -> str:
  return 'p < .001' if p < 0.001 else f'p = {p:.3f}'.replace('0.', '.', 1)


def needed(verdict: Mapping[str, Any]) -> str:
  return '; '.join(f'{task}: {text}' for task, text in verdict['needed'].items())


def arm_table(summary: Summary, task: str) -> str:
  """A row a model of one task."""
  reference = summary['arms'][0]
  header = [
      'model', 'accuracy, %', 'retention, %', f'points over {reference}', 'entropy, nats', 'KL to the teacher, nats',
      'CKA by layer', 'GFLOPs', 'seconds',
  ]
  return markdown(header, [_arm(name, one) for name, one in summary['tasks'][task]['models'].items()])


def _arm(name: str, one: Mapping[str, Any]) -> list[str]:
  accuracy = interval(one['accuracy'], scale=100)
  gain = evidence(one['gain'], 'accuracy') if 'gain' in one else ''
  retention = one['retention']['mean']
  shares = [accuracy, '' if retention is None else f'{100 * retention:.0f}', gain]
  if 'entropy' not in one:
    return [name, *shares, *[''] * 5]
  layers = ', '.join(f'{layer["mean"]:.2f}' for layer in one['cka'])
  return [
      name, *shares, f'{one["entropy"]["mean"]:.3f}', f'{one["divergence"]["mean"]:.3f}', layers,
      f'{one["flops"]["mean"] / 1e9:.0f}', f'{one["seconds"]["mean"]:.1f}',
  ]


def seeds_line(summary: Summary) -> str:
  """'sums: seeds 1, 2, 3, a cell took 412 s; ...'"""
  said = [
      f'{task}: seeds {", ".join(map(str, one["seeds"]))}, a cell took {one["seconds"]:.0f} s'
      for task, one in summary['tasks'].items()
  ]
  return '; '.join(said)


def put(text: str, name: str, content: str) -> str:
  """The text with what stands between <!-- name --> and <!-- /name --> replaced.

  Raises:
    ValueError: the text does not have the two marks.
  """
  opening, closing = f'<!-- {name} -->', f'<!-- /{name} -->'
  before, found, rest = text.partition(opening)
  _, ended, after = rest.partition(closing)
  if not found or not ended:
    raise ValueError(f'no {opening} with a {closing} behind it; put both where the tables shall stand')
  return f'{before}{opening}\n{content.strip()}\n{closing}{after}'
