"""Chat templates: where they lie in a Hugging Face folder, and how they write a conversation."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from etils import epath

from srm_jax import schema
from srm_jax.data import sandbox
from srm_jax.data import tokenizer as tokenizers

Message = Mapping[str, str]  # {'role', 'content'}, and of an assistant optionally 'reasoning_content'
ROLES = ('system', 'user', 'assistant', 'tool')
MARKERS = ('<think>', '</think>')  # around reasoning
DATE = datetime.date(2024, 7, 26)  # "today", the same in every run; Llama 3's template falls back to this day


class ChatTemplate(NamedTuple):
  """name: where it was read, for errors. source: Jinja. tokens: {'bos_token': spelling, ...} for its variables."""

  name: str
  source: str
  tokens: Mapping[str, str] = tokenizers.NONE


def load_template(folder, *, name='default') -> ChatTemplate:
  """The chat template of a Hugging Face folder: chat_template.jinja, else tokenizer_config.json.

  Args:
    folder: holds the tokenizer's files.
    name: which of several named templates in tokenizer_config.json.

  Raises:
    ConfigError: there is no template, or none of that name, or it is no valid Jinja.
    ValueError: a JSON file is not readable.
  """
  folder = epath.Path(folder)
  source = tokenizers.read_json(folder / 'tokenizer_config.json').get('chat_template')
  if isinstance(source, list):
    source = schema.choose(f'chat template of {folder}', name, {entry['name']: entry['template'] for entry in source})
  if (folder / 'chat_template.jinja').is_file():
    source = (folder / 'chat_template.jinja').read_text(encoding='utf-8')
  if not isinstance(source, str):
    raise schema.ConfigError(
        f'{folder} has no chat template; fix: put chat_template.jinja there, or take the instruction-tuned model'
    )
  sandbox.check(str(folder), source)
  return ChatTemplate(str(folder), source, tokenizers.named_special_tokens(folder))


def render(
    template: ChatTemplate, messages: Sequence[Message], *, add_generation_prompt=False, date=DATE, **options
) -> str:
  """A conversation as text, the same as from transformers' apply_chat_template.

  Args:
    template: see `load_template`.
    messages: at least one.
    add_generation_prompt: ends with the header of an assistant's turn.
    date: what the template sees as today.
    options: further variables of the template (enable_thinking=False, tools=[...]): plain JSON data.

  Raises:
    ConfigError: the template reaches outside its sandbox, works without end, refuses the conversation or fails.
    ValueError: a message without role or content, or with reasoning that the template would lose.
  """
  try:
    options = json.loads(json.dumps(options))
  except TypeError as error:
    raise schema.ConfigError(f'options {sorted(options)} of the chat template are no JSON data: {error}') from error
  variables = {'tools': None, 'documents': None, **template.tokens, **options}
  variables |= {'messages': checked(template, messages), 'add_generation_prompt': add_generation_prompt}
  return sandbox.render(template.name, template.source, variables, date=date)


def wrap_reasoning(messages: Sequence[Message], *, markers=MARKERS) -> list[Message]:
  """Moves 'reasoning_content' into the content, between markers, for templates that do not know that key."""
  return [_wrapped(message, *markers) if message.get('reasoning_content') else message for message in messages]


def _wrapped(message, opening, closing):
  content = f'{opening}\n{message["reasoning_content"]}\n{closing}\n\n{message["content"]}'
  return {'role': message['role'], 'content': content}


def checked(template: ChatTemplate, messages: Sequence[Message]) -> list[dict[str, str]]:
  """The messages as plain dicts; raises ValueError as `render` does."""
  if not messages:
    raise ValueError('the conversation has no messages; fix: give at least one of a user')
  return [_checked_message(template, message, f'messages[{number}]') for number, message in enumerate(messages)]


def _checked_message(template, message, place):
  role = message.get('role') if isinstance(message, Mapping) else message
  if role not in ROLES:  # templates spell roles into tokens (Phi's '<|' + role + '|>'), so not any string will do
    raise schema.unknown(f'{place}: role', role, ROLES)
  keys = ('role', 'content', 'reasoning_content')[: 3 if role == 'assistant' else 2]
  if unknown := sorted(message.keys() - keys):
    raise ValueError(f'{place} ({role}) has the keys {unknown}; known are {list(keys)}')
  message = {key: message.get(key) for key in keys if key != 'reasoning_content' or message.get(key) is not None}
  for key, value in message.items():
    if not isinstance(value, str):
      raise ValueError(f'{place} ({role}): {key} is {str(value)[:60]} ({type(value).__name__}); fix: give text')
  if message.get('reasoning_content') and 'reasoning_content' not in template.source:
    raise ValueError(
        f'{place} has reasoning_content, which chat template {template.name} never reads: it would be lost; '
        'fix: wrap_reasoning(messages) moves it into the content'
    )
  return {key: str(value) for key, value in message.items()}
