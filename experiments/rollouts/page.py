"""rollouts.html: groups of completions, right beside wrong, as a page that needs nothing beside itself."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from srm_jax import alarms, inspection
from srm_jax.data.token_bytes import whole_characters
from srm_jax.data.tokenizer import Tokenizer
from srm_jax.rollout_view import Group, Sample, View

STYLES = (pathlib.Path(__file__).parents[1] / 'quickstart' / 'page.css', pathlib.Path(__file__).with_name('page.css'))
# What a text may hold and a page may not, or what nobody would see: control characters become their pictures.
PICTURES = {number: 0x2400 + number for number in range(32) if chr(number) not in '\t\n'} | {0x7F: 0x2421}
COLOURS = {
    'advantage': 'advantage: green is made likelier, red less likely; strongest at {0:.3g}',
    'ratio': 'log-ratio to the {reference}: red is likelier now, blue less likely; strongest from {0:.3g} on',
    'entropy': 'entropy before the token: the policy was of two minds; strongest from {0:.3g} nats on',
    'plain': '',
}
# Touch screens have no hover: a tap shows the same text.
_SCRIPT = """
document.addEventListener('click', event => {
  const token = event.target.closest('.t'), panel = document.getElementById('panel');
  document.querySelectorAll('.shown').forEach(one => one.classList.remove('shown'));
  if (token) token.classList.add('shown');
  panel.textContent = token ? JSON.stringify(token.textContent) + ' ' + token.title : '';
});
"""


class Token(NamedTuple):
  """What is coloured as one: tokens that hold whole characters. ratio is to the reference; None where there is none."""

  ids: tuple[int, ...]
  text: str
  logprob: float
  entropy: float
  advantage: float | None
  ratio: float | None


def tokens(tokenizer: Tokenizer, sample: Sample) -> list[Token]:
  """Log-probabilities of the tokens of one character add up; its entropy is that of the widest choice."""
  found, start = [], 0
  for text, count in whole_characters(tokenizer, sample.ids):
    span, ids = slice(start, start + count), sample.ids[start : start + count]
    logprob, start = float(sample.logprobs[span].sum()), start + count
    found.append(Token(
        ids, text or inspection.readable(tokenizer, ids[0], ''), logprob, float(sample.entropy[span].max()),
        None if sample.advantages is None else float(sample.advantages[span].mean()),
        None if sample.reference is None else logprob - float(sample.reference[span].sum()),
    ))
  return found


def render(view: View, rung: Sequence[alarms.Alarm] = ()) -> str:
  """The page as HTML; rung: alarms of the run, which stand above the completions."""
  groups = [[tokens(view.tokenizer, sample) for sample in group.samples] for group in view.groups]
  scales = _scales(token for group in groups for sample in group for token in sample)
  sections = ''.join(map(_group, range(1, len(groups) + 1), view.groups, groups, [scales] * len(groups)))
  css = '\n'.join(path.read_text(encoding='utf-8') for path in STYLES)
  return (
      '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
      '<meta name="viewport" content="width=device-width, initial-scale=1">'
      f'<title>srm_jax rollouts: {escape(view.workdir)}, step {view.step}</title><style>{css}</style></head>\n'
      f'<body>{_selector(scales, view.reference)}<main>{_head(view, rung)}<div class="cases">{sections}</div></main>'
      f'<div id="panel"></div><script>{_SCRIPT}</script></body></html>\n'
  )


def _scales(found: Iterable[Token]) -> dict[str, float]:
  """{colouring: the size at which it is strongest}, of those that tell anything apart.

  Outliers among tokens do not pale the rest; advantages differ by completion and are all shown.
  """
  found = list(found)
  columns = {
      'advantage': ([token.advantage for token in found], 100), 'ratio': ([token.ratio for token in found], 98),
      'entropy': ([token.entropy for token in found], 98),
  }
  known = {name: (column, share) for name, (column, share) in columns.items() if None not in column}
  scales = {name: float(np.percentile(np.abs(column), share)) for name, (column, share) in known.items()}
  return {name: scale for name, scale in scales.items() if scale > 0}


def _selector(scales: Mapping[str, float], reference: str) -> str:
  names = [*scales, 'plain']
  inputs = ''.join(
      f'<input type="radio" name="by" id="{name}"{" checked" if name == names[0] else ""}>' for name in names
  )
  labels = ''.join(f'<label for="{name}">{"log-ratio" if name == "ratio" else name}</label>' for name in names)
  legends = ''.join(
      f'<small data-by="{name}">{escape(COLOURS[name].format(scale, reference=reference))}</small>'
      for name, scale in scales.items()
  )
  return f'{inputs}<nav>{labels} {legends}</nav>'


def _head(view: View, rung: Sequence[alarms.Alarm]) -> str:
  samples = [sample for group in view.groups for sample in group.samples]
  right, cut = sum(_right(sample) for sample in samples), sum(not sample.finished for sample in samples)
  lost = sum(sample.reward is None for sample in samples)
  facts = (
      f'{len(view.groups)} prompts, sampled at temperature {view.temperature:g}. {cut} cut at the length limit, {lost} '
      f'that cannot be scored, {np.mean([len(sample.ids) for sample in samples]):.0f} tokens on average.'
  )
  flags = ''.join(f'<p class="flag">{escape(alarms.message(alarm))}</p>' for alarm in rung)
  resolved = '; '.join(f'{key}: {value}' for key, value in view.resolved.items())
  return (
      f'<p class="eyebrow">srm_jax rollouts · {escape(view.workdir)} · step {view.step}</p>'
      f'<h1>{right} of {len(samples)} completions are right</h1>{flags}<p class="lead">{escape(facts)}</p>'
      f'<p class="note">{escape(resolved)}</p>'
  )


def _right(sample: Sample) -> bool:
  return sample.grade is not None and sample.grade > 0.5


def _group(number: int, group: Group, rows: Sequence[Sequence[Token]], scales: Mapping[str, float]) -> str:
  pairs = list(zip(group.samples, rows, strict=True))
  right = [pair for pair in pairs if _right(pair[0])]
  wrong = [pair for pair in pairs if not _right(pair[0])]
  answer = f', answer <b>{_text(group.answer)}</b>' if group.answer else ''
  rate = len(right) / len(pairs)
  return (
      f'<section class="case"><h3>{number}. {len(right)} of {len(pairs)} right{answer}</h3>'
      f'<div class="rate"><i style="width:{rate:.1%}"></i></div><p class="question">{_text(group.prompt.strip())}</p>'
      f'<div class="sides">{_side("right", right, scales)}{_side("wrong", wrong, scales)}</div></section>'
  )


def _side(verdict: str, pairs, scales: Mapping[str, float]) -> str:
  tries = ''.join(_try(sample, row, scales) for sample, row in pairs)
  return f'<div class="side"><h4 class="{verdict}">{verdict}: {len(pairs)}</h4>{tries}</div>'


def _try(sample: Sample, row: Sequence[Token], scales: Mapping[str, float]) -> str:
  number = lambda value: 'none' if value is None else f'{value:.3g}'
  parts = ', '.join(f'{name} {number(value)}' for name, value in sample.parts.items())
  reward = 'cannot be scored' if sample.reward is None else f'reward {sample.reward:.3g}'
  facts = [f'{reward} ({parts})' if parts else reward, f'{len(sample.ids)} tokens']
  facts.append('finished' if sample.finished else 'cut')
  if sample.advantages is not None:
    facts.insert(1, f'advantage {np.mean(sample.advantages):+.3g}')
  header = ''.join(f'<span>{escape(fact)}</span>' for fact in facts)
  spans = ''.join(_span(token, scales) for token in row)
  return f'<article class="try"><header>{header}</header><p class="tokens">{spans}</p></article>'


def _span(token: Token, scales: Mapping[str, float]) -> str:
  """A token; its classes carry the signs, its style the sizes from 0 to 1, its title the numbers."""
  strength = lambda name, value: f'{min(abs(value) / scales.get(name, np.inf), 1):.2f}'
  classes, style = ['t'], [f'--e:{strength("entropy", token.entropy)}']
  title = f'log-prob {token.logprob:.3f}, entropy {token.entropy:.3f}'
  if token.ratio is not None:
    classes += ['more' if token.ratio > 0 else 'less'] if token.ratio else []
    style.append(f'--r:{strength("ratio", token.ratio)}')
    title += f', log-ratio {token.ratio:+.3f}'
  if token.advantage is not None:
    classes += ['up' if token.advantage > 0 else 'down'] if token.advantage else []
    style.append(f'--a:{strength("advantage", token.advantage)}')
    title += f', advantage {token.advantage:+.3f}'
  title += f', id {" ".join(map(str, token.ids))}'
  text = _text(token.text, newline='↵')
  return f'<span class="{" ".join(classes)}" style="{";".join(style)}" title="{title}">{text}</span>'


def _text(text: str, newline: str = '') -> str:
  return escape(text.translate(PICTURES)).replace('\n', f'{newline}\n')
