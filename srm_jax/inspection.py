"""One self-contained HTML page of what a run is about to learn from: the next batch, token by token, without
training.
"""

import html
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from srm_jax import checkpoints, schema, sharding
from srm_jax.data import tokenizer as tokenizers
from srm_jax.data.alignment import AlignedBatch
from srm_jax.data.tokenizer import Tokenizer
from srm_jax.models import heads, transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import RECIPES
from srm_jax.recipes.context import Context, forward
from srm_jax.train import TrainConfig
from srm_jax.types import Batch, Pairs, Params, Recipe, Rollouts

TOP = 5
CHUNK = 256  # positions whose logits are held at once


class Scores(NamedTuple):
  """What a model thinks of every target, at temperature 1: loss [B, T]; ids and probabilities of the top,
  [B, T, TOP].
  """

  loss: np.ndarray
  top_ids: np.ndarray
  top_probs: np.ndarray


class Inspection(NamedTuple):
  """The next batch on the host, cut to the rows shown, and what models think of it.

  origin: where the student's parameters come from. supervised, fill: of the whole batch. scores: {'student': ..., and
  every frozen model}. sequences: Rollouts, Pairs or Batch, `rows` of `total_rows`.
  """

  origin: str
  step: int
  resolved: Mapping[str, Any]
  supervised: int
  fill: float
  total_rows: int
  sequences: Batch | Rollouts | Pairs
  scores: Mapping[str, Scores]
  tokenizer: Tokenizer


def inspect(config: ml_collections.ConfigDict, workdir=None, *, rows: int = 4) -> Inspection:
  """The batch that `train(config, workdir)` would take next, and what student and frozen models think of its tokens.

  Args:
    config: of `train`.
    workdir: of the run, which need not exist; its newest checkpoint gives student and step.
    rows: how many rows of the batch to score and keep.

  Raises:
    ConfigError: as `train`.
  """
  parsed = schema.parse(TrainConfig, schema.resolve(config), 'config')
  with jax.set_mesh(sharding.make_mesh(parsed.mesh)):
    tokenizer = tokenizers.load(parsed.tokenizer)
    model = replace(parsed.model, vocab_size=parsed.model.vocab_size or tokenizer.vocab_size)
    build = schema.choose('recipe', parsed.recipe.get('name', ''), RECIPES)
    recipe = build(parsed.recipe, Context(model, tokenizer, parsed.seed, parsed.num_steps))
    trained, step, origin = _student(parsed, model, workdir)
    if recipe.extra_params is not None:
      trained = {**recipe.extra_params(jax.random.key(parsed.seed)), **trained}
    batch = recipe.source.next(trained, 0 if parsed.overfit_one_batch else step)
    return _score(recipe, model, trained['model'], tokenizer, batch, step, origin, rows)


def _student(config: TrainConfig, model: TransformerConfig, workdir) -> tuple[Params, int, str]:
  """({'model': parameters, what was trained beside it}, step, where they come from): newest checkpoint, else
  init_from, else fresh as `train` makes them.
  """
  if workdir is not None and any(path.name.isdigit() for path in pathlib.Path(workdir, 'checkpoints').glob('*')):
    found = checkpoints.load_model(workdir)
    return {**found.extra, 'model': found.params}, found.step, f'checkpoint {found.step} of {workdir}'
  if config.init_from:
    found = checkpoints.load_model(config.init_from, dtype=model.param_dtype)
    return {'model': found.params}, 0, f'init_from {config.init_from}'
  key = jax.random.split(jax.random.key(config.seed))[0]
  fresh = jax.jit(lambda key: transformer.init_params(model, key))(key)
  return {'model': fresh}, 0, f'fresh parameters of seed {config.seed}'


def _score(recipe: Recipe, model, params, tokenizer, batch, step, origin, rows) -> Inspection:
  whole: Batch = getattr(batch, 'batch', batch)
  total = len(whole.inputs)
  shown = jax.tree.map(lambda x: np.asarray(x)[:rows], batch)
  frozen = {} if isinstance(batch, AlignedBatch) else recipe.frozen  # whose ids mean other pieces
  models = {'student': (model, params), **frozen}
  scores = {name: score(config, weights, getattr(shown, 'batch', shown)) for name, (config, weights) in models.items()}
  return Inspection(
      origin, step, recipe.objective.resolved, int(np.count_nonzero(whole.loss_mask)),
      float(np.mean(np.asarray(whole.segment_ids) > 0)), total, shown, scores, tokenizer,
  )


def score(config: TransformerConfig, params: Params, batch: Batch) -> Scores:
  """Loss and most probable tokens at every position of a batch [B, T]; the logits are formed CHUNK positions at a
  time.
  """
  size = batch.inputs.size
  padding = -size % CHUNK
  hidden = jax.jit(lambda params, batch: forward(config, params, batch).hidden)(params, batch)
  flat = jnp.pad(hidden.reshape(size, -1), ((0, padding), (0, 0))).reshape(-1, CHUNK, hidden.shape[-1])
  targets = np.pad(batch.targets.reshape(-1), (0, padding)).reshape(-1, CHUNK)

  @jax.jit
  def one(params, hidden, targets):
    logprobs = jax.nn.log_softmax(heads.logits(config, params, hidden), axis=-1)
    top, ids = jax.lax.top_k(logprobs, min(TOP, logprobs.shape[-1]))
    return -jnp.take_along_axis(logprobs, targets[:, None], axis=-1)[:, 0], ids, jnp.exp(top)

  parts = [jax.device_get(one(params, part, wanted)) for part, wanted in zip(flat, targets)]
  joined = (np.concatenate(values)[:size] for values in zip(*parts))
  return Scores(*(values.reshape(*batch.inputs.shape, *values.shape[1:]) for values in joined))


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
  """What every token adds to the text, or its name where that is nothing; see `readable`."""
  texts = []
  for place, token in enumerate(map(int, ids)):
    before = tokenizer.decode([int(i) for i in ids[max(0, place - 1) : place]])
    both = tokenizer.decode([int(i) for i in ids[max(0, place - 1) : place + 1]])
    text = both[len(before) :] if both.startswith(before) else tokenizer.decode([token])
    texts.append(readable(tokenizer, token, text))
  return texts


def readable(tokenizer: Tokenizer, token: int, text: str) -> str:
  """The text of a token, or a name for one that has none by itself: end of text, padding, part of a character."""
  if text and '\ufffd' not in text:
    return text
  for spelling, number in tokenizer.special_tokens.items():
    if number == token:
      return spelling
  if token == tokenizer.eos_id:
    return '⟨end⟩'
  return '⟨pad⟩' if token == tokenizer.pad_id else f'⟨{token}⟩'


def _row_tokens(seen: Inspection, batch: Batch, row: int) -> list[dict[str, Any]]:
  """Tokens of a row in order, each with what was predicted for it (at the position before, within its segment)."""
  used = int(np.max(np.flatnonzero(batch.segment_ids[row]), initial=-1)) + 1
  ids = batch.inputs[row, :used]
  tokens = []
  for place, text in enumerate(token_texts(seen.tokenizer, ids)):
    token = {
        'id': int(ids[place]), 'text': text, 'position': int(batch.positions[row, place]),
        'segment': int(batch.segment_ids[row, place]),
    }
    token['supervised'] = bool(token['position'] and batch.loss_mask[row, place - 1])
    if token['position']:
      token |= {'loss': {}, 'top': {}}
      for name, scores in seen.scores.items():
        token['loss'][name] = round(float(scores.loss[row, place - 1]), 4)
        token['top'][name] = _top(seen.tokenizer, scores, row, place - 1)
      if isinstance(seen.sequences, Rollouts) and token['supervised']:
        token['sampler'] = round(float(seen.sequences.sampler_logprobs[row, place - 1]), 4)
    tokens.append(token)
  return tokens


def _top(tokenizer: Tokenizer, scores: Scores, row: int, place: int) -> list[tuple[str, float]]:
  pairs = zip(scores.top_ids[row, place], scores.top_probs[row, place])
  return [
      (readable(tokenizer, int(token), tokenizer.decode([int(token)])), round(float(prob), 5))
      for token, prob in pairs
  ]


def render(seen: Inspection, title: str) -> str:
  """The page: no file, script or font from elsewhere."""
  batch: Batch = getattr(seen.sequences, 'batch', seen.sequences)
  rows = [_row_tokens(seen, batch, row) for row in range(len(batch.inputs))]
  facts = {
      'student': seen.origin, 'step': seen.step, **seen.resolved,
      'supervised tokens': f'{seen.supervised} of the batch',
      'fill rate': f'{seen.fill:.1%} of {seen.total_rows} rows x {batch.inputs.shape[1]} positions',
      'rows shown': f'{len(rows)} of {seen.total_rows}', **_mean_losses(rows, seen.scores),
  }
  table = ''.join(
      f'<tr><th>{html.escape(str(key))}</th><td>{html.escape(str(value))}</td></tr>' for key, value in facts.items()
  )
  shown = ''.join(_row(seen.sequences, number, tokens) for number, tokens in enumerate(rows))
  data = json.dumps(rows, ensure_ascii=False).replace('<', '\\u003c').replace('>', '\\u003e').replace('&', '\\u0026')
  parts = {'TITLE': html.escape(title), 'FACTS': table, 'ROWS': shown, 'DATA': data}
  # One pass: a token may look like a slot.
  return re.sub('%(TITLE|FACTS|ROWS|DATA)%', lambda found: parts[found[1]], _PAGE)


def _mean_losses(rows, names) -> dict[str, str]:
  losses = {name: [token['loss'][name] for row in rows for token in row if token['supervised']] for name in names}
  return {
      f'{name} loss': f'{np.mean(values):.4f} per supervised token shown' for name, values in losses.items() if values
  }


def _row(sequences, number: int, tokens) -> str:
  supervised = sum(token['supervised'] for token in tokens)
  segments = max((token['segment'] for token in tokens), default=0)
  head = f'row {number}: {len(tokens)} tokens, {supervised} supervised, {segments} segments'
  if isinstance(sequences, Rollouts):
    head += _rollout_facts(sequences, number)
  if isinstance(sequences, Pairs):
    head += f' | {("chosen", "rejected")[number % 2]} of pair {number // 2}, weight {sequences.weights[number]:g}'
  longest = max((token['position'] for token in tokens), default=0) or 1
  spans = ''.join(_span(place, token, longest) for place, token in enumerate(tokens))
  return f'<section><h2>{html.escape(head)}</h2><p class="row" data-row="{number}">{spans}</p></section>'


def _rollout_facts(rollouts: Rollouts, row: int) -> str:
  facts = ''
  if rollouts.group is not None:
    facts += f' | group {int(rollouts.group[row])}'
  if rollouts.rewards is not None:
    scored = rollouts.valid is None or bool(rollouts.valid[row])
    facts += f' | reward {float(rollouts.rewards[row]):g}' if scored else ' | reward none (cannot be scored)'
  if rollouts.advantages is not None:
    values = rollouts.advantages[row][rollouts.batch.loss_mask[row] > 0]
    facts += f' | advantage {values[0]:+.4f}' if len(values) else ''
  return facts


def _span(place: int, token: Mapping[str, Any], longest: int) -> str:
  """A token; its classes carry mask and segment, its style position and loss as numbers from 0 to 1."""
  loss = token.get('loss', {}).get('student', 0.0)
  classes = f't {"on" if token["supervised"] else "off"} s{token["segment"] % 6}'
  style = f'--p:{token["position"] / longest:.3f};--l:{min(loss / 5, 1):.3f}'
  hover = f'position {token["position"]}, id {token["id"]}, segment {token["segment"]}'
  hover += f', loss {loss:.3f}' if 'loss' in token else ''
  text = html.escape(token['text']).replace('\n', '↵\n')
  return f'<span class="{classes}" style="{style}" title="{hover}" data-t="{place}">{text}</span>'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>%TITLE%</title><style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 78em; padding: 0 1em 16em; \
color: #1b1f24; background: #fff }
h1 { font-size: 1.3em } h2 { font-size: .95em; font-weight: 600; margin: 1.4em 0 .2em }
th { text-align: left; padding-right: 1.5em; font-weight: 600; vertical-align: top } label { margin-right: 1.2em }
.row { font-family: ui-monospace, monospace; white-space: pre-wrap; margin: 0; overflow-wrap: anywhere }
.t { border-radius: 2px; cursor: default; box-shadow: inset -1px 0 #fff8 } .t:hover { outline: 2px solid #1b1f24 }
#mask:checked ~ main .on { background: #b7e4c7 } #mask:checked ~ main .off { color: #8a939d }
#segment:checked ~ main .s0 { background: #ffd6a5 } #segment:checked ~ main .s1 { background: #caffbf }
#segment:checked ~ main .s2 { background: #9bf6ff } #segment:checked ~ main .s3 { background: #bdb2ff }
#segment:checked ~ main .s4 { background: #ffc6ff } #segment:checked ~ main .s5 { background: #fdffb6 }
#position:checked ~ main .t { background: hsl(calc(260 - 220 * var(--p)) 80% 82%) }
#loss:checked ~ main .t { background: rgb(230 57 70 / calc(.9 * var(--l))) }
#panel { position: fixed; bottom: 0; left: 0; right: 0; background: #f4f6f8; border-top: 1px solid #c8d0d8; \
padding: .6em 2em; min-height: 11em }
#panel div { display: inline-block; vertical-align: top; margin-right: 3em } \
#panel td { padding-right: 1em; font-family: ui-monospace, monospace }
</style></head><body><h1>%TITLE%</h1><table>%FACTS%</table><p>Colour by</p>
<input type="radio" name="by" id="mask" checked><label for="mask">loss mask</label>
<input type="radio" name="by" id="segment"><label for="segment">segment</label>
<input type="radio" name="by" id="position"><label for="position">position</label>
<input type="radio" name="by" id="loss"><label for="loss">student's loss</label>
<main>%ROWS%</main><div id="panel">\
Point at a token: the model's most probable tokens in its place, at temperature 1, are shown here.</div>
<script type="application/json" id="data">%DATA%</script><script>
const rows = JSON.parse(document.getElementById('data').textContent), panel = document.getElementById('panel');
const cell = (line, text) => { line.insertCell().textContent = text; };
document.querySelector('main').addEventListener('mouseover', event => {
  const span = event.target.closest('.t');
  if (!span) return;
  const token = rows[span.parentNode.dataset.row][span.dataset.t];
  panel.replaceChildren();
  const facts = panel.appendChild(document.createElement('div')).appendChild(document.createElement('table'));
  for (const key of ['text', 'id', 'position', 'segment', 'supervised', 'sampler']) if (key in token) {
    const line = facts.insertRow(); cell(line, key === 'sampler' ? 'sampler log-prob' : key); \
cell(line, JSON.stringify(token[key]));
  }
  for (const name in token.top || {}) {
    const table = panel.appendChild(document.createElement('div')).appendChild(document.createElement('table'));
    table.createCaption().textContent = name + ', loss ' + token.loss[name];
    for (const [text, prob] of token.top[name]) { \
const line = table.insertRow(); cell(line, JSON.stringify(text)); cell(line, (100 * prob).toFixed(2) + ' %'); }
  }
});
</script></body></html>
"""
