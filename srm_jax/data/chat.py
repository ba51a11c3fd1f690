"""Conversations as tokens: chat templates rendered in a sandbox, and masks of what the assistant must produce.

Masks come from rendering prefixes. Of assistant turn i, the header is render(messages[:i], add_generation_prompt=True)
and the turn is what render(messages[:i + 1]) adds to it, up to its first end-of-text token: exactly what a sampler is
given and what it must sample until it stops. A template that rewrites earlier turns has no such prefixes: an error.
Stock templates lack `{% generation %}` tags, so these are accepted and ignored.

Text is cut where a sampler starts and stops, and the parts are tokenised apart, so that no token straddles the border:
what comes before a supervised turn is `encode_prompt`, token by token. Within a turn nothing is cut, and reasoning is
found by character offsets, since a sampled token may well hold the end of '</think>' and the newlines after it.

Messages cannot forge a turn: in them, spellings of special tokens, and of tokens that the template itself writes, are
marked before rendering and encoded as plain text.
"""

import functools
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from srm_jax import schema
from srm_jax.data import templates
from srm_jax.data.templates import DATE, MARKERS, ROLES, ChatTemplate, Message, load_template, render, wrap_reasoning
from srm_jax.data.tokenizer import Tokenizer

TURNS = ('all', 'last')
MARK, UNMARK = '\ufdd0', '\ufdd1'  # around spellings of tokens in messages; noncharacters, which no text has


class Encoded(NamedTuple):
  """tokens: int32 [n]. loss_mask: bool [n], set where the assistant must produce the token: contents and end of turn.

  reasoning_mask: bool [n], the part of loss_mask that is reasoning, its markers included.
  """

  tokens: np.ndarray
  loss_mask: np.ndarray
  reasoning_mask: np.ndarray


class NestingError(ValueError):
  """A template that renders the beginning of a conversation otherwise than the whole one."""


def encode(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    turns='all',
    markers=MARKERS,
    date=DATE,
    **options,
) -> Encoded:
  """A conversation to learn from.

  Args:
    template: from the tokenizer's own folder.
    tokenizer: of a tokenizer.json.
    messages: with at least one assistant's turn, not the first.
    turns: 'all' supervises every assistant's turn, 'last' only the last one. A template that strips the reasoning of
      earlier turns (Qwen3) nests at the last one alone: make one example of each turn, with 'last'.
    markers: where reasoning begins and ends.
    date, options: see `render`; the same as in `encode_prompt`.

  Returns:
    Encoded. What comes before a supervised turn equals encode_prompt(messages[:turn]).

  Raises:
    NestingError: at a supervised turn; says which, and what to do.
    ConfigError, ValueError: as `render`; also where no turn is supervised, a turn does not end with an end-of-text id,
      or the tokenizer cannot encode chats.
  """
  if turns not in TURNS:
    raise schema.unknown('turns', turns, TURNS)
  conversation = _Conversation(template, tokenizer, messages, markers, date, options)
  assistant = [i for i, message in enumerate(messages) if message['role'] == 'assistant']
  if not assistant:
    raise ValueError(f'{len(messages)} messages have no assistant turn to learn from; fix: add one, or encode_prompt')
  return _encode(conversation, conversation.text(len(messages)), assistant if turns == 'all' else assistant[-1:])


def encode_prompt(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], *, markers=MARKERS, date=DATE, **options
) -> list[int]:
  """Ids after which the assistant's next turn is sampled. Arguments and errors as `encode`."""
  conversation = _Conversation(template, tokenizer, messages, markers, date, options)
  return _encode(conversation, conversation.text(len(messages), header=True), []).tokens.tolist()


def encode_completion(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    completion: str,
    *,
    finished=True,
    markers=MARKERS,
    date=DATE,
    **options,
) -> Encoded:
  """What a model sampled, or should have, after `encode_prompt`; asks nothing of how the template renders that turn.

  Serves templates that never nest: DeepSeek-R1's prompt ends with '<think>\\n', and its rendering drops the reasoning.

  Args:
    completion: everything after the prompt, reasoning and markers included, without the end of turn.
    finished: False where the completion was cut and must not learn to end.
    template, tokenizer, messages, markers, date, options: see `encode`.

  Returns:
    Encoded, with loss on the completion and on the end of turn that the template writes.
  """
  conversation = _Conversation(template, tokenizer, messages, markers, date, options)
  header = conversation.text(len(messages), header=True)
  end = [_end_of_turn(conversation, header)] if finished else []
  prompt = _encode(conversation, header, [])
  text = conversation.mark(completion, 'assistant')
  sampled = _encode_turn(tokenizer, text, _reasoning(text, opens_reasoning(header, markers), markers))
  closing = Encoded(np.array(end, np.int32), np.ones(len(end), bool), np.zeros(len(end), bool))
  return _joined([prompt, sampled, closing])


def require_chats(tokenizer: Tokenizer):
  """Raises ConfigError where a tokenizer cannot encode what templates write."""
  if tokenizer.encode_rendered is None:
    raise schema.ConfigError(
        f'tokenizer {tokenizer.name} cannot encode chats: it recognises no special tokens in a text, or puts a space '
        "before every text; fix: use the model's tokenizer.json"
    )


# --- turns and masks


class _Conversation:
  """Renders prefixes of marked messages."""

  def __init__(self, template, tokenizer, messages, markers, date, options):
    require_chats(tokenizer)
    self.template, self.tokenizer, self.markers = template, tokenizer, markers
    self.render = functools.partial(templates.render, template, date=date, **options)
    # An assistant's words may hold added tokens (reasoning markers, tool calls), as it samples them. Those of others
    # hold none that the template writes: some turn markers are not called special by their files (DeepSeek-R1).
    written = _written(template.source, tuple(tokenizer.added_tokens))
    special = tokenizer.special_tokens.keys()
    self.control = {role: special - set(markers) if role == 'assistant' else special | written for role in ROLES}
    self.messages = [
        {key: value if key == 'role' else self.mark(value, message['role']) for key, value in message.items()}
        for message in templates.checked(template, messages)
    ]

  def mark(self, text, role):
    return _mark(text, self.control[role])

  def text(self, count, *, header=False):
    return self.render(self.messages[:count], add_generation_prompt=header)


class _Turn(NamedTuple):
  """Characters of a rendering: [start, end) is what the assistant writes, [end, stop) its end-of-text token."""

  start: int
  end: int
  stop: int


def _encode(conversation, text, supervised) -> Encoded:
  turns, cut = {}, 0
  for number, message in enumerate(conversation.messages):
    if message['role'] == 'assistant':
      try:
        turn = _find_turn(conversation, text, number, cut)
      except NestingError:
        if number in supervised:
          raise
      else:
        turns[number], cut = turn, turn.stop
  return _joined(_segments(conversation, text, turns, supervised))


def _segments(conversation, text, turns, supervised):
  tokenizer, markers = conversation.tokenizer, conversation.markers
  cut = 0
  for number, turn in turns.items():
    yield _encode_given(tokenizer, text[cut : turn.start])
    written = text[turn.start : turn.stop]
    if number in supervised:
      reasoning = _reasoning(text[turn.start : turn.end], opens_reasoning(text[: turn.start], markers), markers)
      yield _encode_turn(tokenizer, written, reasoning)
    else:
      yield _encode_given(tokenizer, written)
    cut = turn.stop
  yield _encode_given(tokenizer, text[cut:])


def _find_turn(conversation, text, number, cut) -> _Turn:
  place = f'chat template {conversation.template.name} at messages[{number}] (assistant)'
  header, through = conversation.text(number, header=True) if number else '', conversation.text(number + 1)
  if not header:
    raise NestingError(f'{place}: nothing comes before the turn, to sample it after; fix: start with a user message')
  if not through.startswith(header):
    raise NestingError(
        f'{place} does not nest: after the generation prompt, {_difference(header, through)} in the turn itself; '
        'fix: use encode_completion, which takes the text that follows the prompt as it is'
    )
  ids, spans = _tokenise(conversation.tokenizer, through[len(header) :])
  last = next((k for k, i in enumerate(ids) if i in conversation.tokenizer.end_ids), None)
  if last is None:
    raise ValueError(
        f'{place}: the turn ends with {through[-30:]!r}, which has none of the end-of-text ids '
        f"{list(conversation.tokenizer.end_ids)}, so sampling would not stop there; fix: load the tokenizer with "
        'eos_token=, or put the generation_config.json with the eos_token_id of the model beside it'
    )
  if rest := conversation.tokenizer.decode(ids[last + 1 :]).strip():
    raise ValueError(f'{place}: the turn goes on with {rest[:60]!r} after an end-of-text token, where sampling stops')
  turn = _Turn(len(header), *(len(header) + edge for edge in spans[last]))
  if not text.startswith(through[: turn.stop]) or turn.start < cut:
    raise NestingError(
        f'{place} does not nest: {_difference(through[: turn.stop], text)} once further messages follow; '
        "fix: turns='last', with one example per turn that you want to learn from"
    )
  return turn


def _difference(beginning, whole):
  common = len(os.path.commonprefix([beginning, whole]))
  first, second = (_unmarked(text[max(0, common - 20) : common + 30]) for text in (beginning, whole))
  return f'{first!r} becomes {second!r}'


def _end_of_turn(conversation, header):
  """The first end-of-text id that the template writes after an answer."""
  answered = conversation.messages + [{'role': 'assistant', 'content': 'x'}]
  through = conversation.render(answered)
  ids, _ = _tokenise(conversation.tokenizer, through[len(os.path.commonprefix([header, through])) :])
  found = [i for i in ids if i in conversation.tokenizer.end_ids]
  if not found:
    raise ValueError(
        f'chat template {conversation.template.name} ends a turn with {through[-30:]!r}, which has none of the '
        f'end-of-text ids {list(conversation.tokenizer.end_ids)}; fix: load the tokenizer with eos_token='
    )
  return found[0]


def opens_reasoning(header: str, markers=MARKERS) -> bool:
  """Whether the header of a turn begins its reasoning (DeepSeek-R1, QwQ)."""
  return header.rstrip().endswith(markers[0])


def _reasoning(text, opened, markers) -> list[tuple[int, int]]:
  """Characters of the reasoning in what an assistant wrote; reasoning that is not closed lasts to the end."""
  found, position = [], 0
  while opened or markers[0] in text[position:]:
    start = position if opened else text.index(markers[0], position)
    close = text.find(markers[1], start)
    position = len(text) if close < 0 else close + len(markers[1])
    found.append((start, position))
    opened = False
  return found


def _encode_given(tokenizer, text) -> Encoded:
  ids, _ = _tokenise(tokenizer, text)
  return Encoded(np.array(ids, np.int32), np.zeros(len(ids), bool), np.zeros(len(ids), bool))


def _encode_turn(tokenizer, text, reasoning) -> Encoded:
  ids, spans = _tokenise(tokenizer, text)
  inside, before = np.zeros(len(ids), bool), 0
  for k, (start, stop) in enumerate(spans):
    start, before = min(start, before), stop  # offsets may leave out spaces: a token covers all since its neighbour
    inside[k] = any(start < last and first < stop for first, last in reasoning)
  return Encoded(np.array(ids, np.int32), np.ones(len(ids), bool), inside)


def _joined(parts) -> Encoded:
  return Encoded(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


# --- spellings of tokens in messages


@functools.lru_cache(maxsize=32)
def _written(source, added):
  """Added tokens that a template writes; not Gemma's runs of spaces and newlines, which are ordinary text."""
  return frozenset(token for token in added if token in source and not token.isspace())


def _mark(text, control):
  if MARK in text or UNMARK in text:
    raise ValueError(f'a message holds U+FDD0 or U+FDD1, which are no characters: {text[:60]!r}; fix: drop them')
  present = sorted((spelling for spelling in control if spelling in text), key=len, reverse=True)
  return re.sub('|'.join(map(re.escape, present)), rf'{MARK}\g<0>{UNMARK}', text) if present else text


def _unmarked(text):
  return text.replace(MARK, '').replace(UNMARK, '')


def _tokenise(tokenizer, text):
  """(ids, spans) of rendered text, marked spellings as plain text; spans are characters of the marked text."""
  ids, spans, position = [], [], 0
  for part in re.split(f'({MARK}[^{MARK}{UNMARK}]*{UNMARK})', text):
    if part.startswith(MARK) and part.endswith(UNMARK):
      found = _encode_spelling(tokenizer, part[1:-1])
      offsets = [(0, len(part))] * len(found)
    elif MARK in part or UNMARK in part:
      raise ValueError(f'the template cuts the spelling of a token in a message in two: {part[:60]!r}; fix: drop it')
    else:
      found, offsets = tokenizer.encode_rendered(part) if part else ([], [])
    ids += found
    spans += [(position + start, position + stop) for start, stop in offsets]
    position += len(part)
  return ids, spans


def _encode_spelling(tokenizer, spelling):
  """A token's spelling as plain text."""
  known = {*tokenizer.special_tokens.values(), *tokenizer.added_tokens.values()}
  ids = tokenizer.encode(spelling)
  if not known.isdisjoint(ids):  # an added token that is not special is recognised in any text, but not in halves
    ids = tokenizer.encode(spelling[:1]) + tokenizer.encode(spelling[1:])
  if not known.isdisjoint(ids):
    raise ValueError(f'{tokenizer.name} has no plain-text form of {spelling!r}; fix: take it out of the messages')
  return ids
