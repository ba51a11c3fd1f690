"""How a problem is put to a model: as the task's own text, or as a user's message that a chat template writes.

One `Prompting` serves training, annotation and evaluation, so that a model is asked as it was taught. It also grades:
what a reasoning model writes up to '</think>' is no part of its answer.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from srm_jax import schema
from srm_jax.data import chat, packing
from srm_jax.data.templates import MARKERS, Message
from srm_jax.data.tokenizer import Tokenizer
from srm_jax.tasks.task import Task
from srm_jax.types import Problem, Prompt

SUPERVISED = ('all', 'answer')


@dataclasses.dataclass(frozen=True)
class PromptConfig:
  """How problems are put.

  format: 'plain' is the task's own text, 'chat' a message in the chat template beside the tokenizer. preface: stands
  before the problem: worked examples for a base model, or a word that says which of several things is asked. hint:
  stands behind the problem, with {answer} for its answer: a model shall then write the chain that leads there, which
  rejection sampling learns without the hint; '' for none. Of chats:
  system: the system message, '' for none. instruction: what follows the problem in the user's message. options:
  variables of the template ({'enable_thinking': False}). supervised: 'all' that the assistant writes, or the 'answer'
  without the reasoning before it. turns: which turns of a conversation are learnt, 'all' or the 'last'.
  """

  format: str
  preface: str
  hint: str
  system: str
  instruction: str
  options: Mapping[str, Any]
  supervised: str
  turns: str


class Prompting(NamedTuple):
  """How the problems of one task are put to models of one tokenizer.

  task: grades and extracts from the answer alone. prompt(problem) -> Prompt. example(id, problem, completion, *,
  finished=True) -> packing.Example with loss on the completion. conversation(id, messages) -> packing.Example with loss
  on assistants' turns.
  """

  task: Task
  prompt: Callable[[Problem], Prompt]
  example: Callable[..., packing.Example]
  conversation: Callable[[str, Sequence[Message]], packing.Example]


def open_prompting(config: PromptConfig, task: Task, tokenizer: Tokenizer) -> Prompting:
  """The Prompting of a config.

  Raises:
    ConfigError: an unknown name, a hint without '{answer}', or a chat for a tokenizer that has no template or cannot
      encode one. Prompts raise it for a hint at a problem that has no answer.
  """
  asked = hinted(task, config.hint) if config.hint else task
  return schema.choose('prompt.format', config.format, FORMATS)(config, asked, tokenizer)


def hinted(task: Task, hint: str) -> Task:
  """The task whose prompts end in a hint, before their last line breaks.

  Reference: Zelikman et al., STaR: Bootstrapping Reasoning With Reasoning, arXiv:2203.14465.
  """
  if '{answer}' not in hint:
    raise schema.ConfigError(f"hint {hint!r} does not show the answer; fix: put {{answer}} where it shall stand")

  def prompt(problem):
    if not problem.answer:
      raise schema.ConfigError(f"problem {problem.id} of task {task.name!r} has no answer to hint at; fix: hint=''")
    text = task.prompt(problem)
    asked = text.rstrip('\n')
    return asked + hint.replace('{answer}', problem.answer) + text[len(asked) :]

  return dataclasses.replace(task, prompt=prompt)


def prompt_ids(tokenizer, prompt: Prompt) -> tuple[int, ...]:
  """The ids that a completion of this prompt continues."""
  if prompt.tokens:
    return (*prompt.tokens, *(tokenizer.encode(prompt.opening) if prompt.opening else ()))
  return tuple(tokenizer.encode(prompt.text))


def answer_of(text: str, *, opened: bool) -> str:
  """What follows the reasoning in a completion; '' where the reasoning is not closed.

  Args:
    text: a completion.
    opened: whether the prompt began the reasoning, as DeepSeek-R1's does.
  """
  _, closed, answer = text.rpartition(MARKERS[1])
  return '' if MARKERS[0] in answer or (opened and not closed) else answer


def plain(task: Task, tokenizer: Tokenizer, *, preface='') -> Prompting:
  """The preface and the task's own text, after what the model's own tokenizer puts before every text."""
  prefix = tuple(tokenizer.prefix_ids)

  def prompt(problem):
    text = preface + task.prompt(problem)
    return Prompt(problem.id, text, (*prefix, *tokenizer.encode(text)) if prefix else ())

  def example(identifier, problem, completion, *, finished=True):
    end = tokenizer.eos_id if finished else None
    return packing.from_prompt_completion(
        identifier, prompt_ids(tokenizer, prompt(problem)), tokenizer.encode(completion), end
    )

  def conversation(identifier, messages):
    raise schema.ConfigError("conversations are written by a chat template; fix: data.prompt.format='chat'")

  return Prompting(task, prompt, example, conversation)


def _chat(config, task, tokenizer) -> Prompting:
  schema.choose('prompt.supervised', config.supervised, dict.fromkeys(SUPERVISED))
  chat.require_chats(tokenizer)
  template = chat.load_template(epath.Path(tokenizer.name).parent)
  options = dict(config.options)

  def messages(problem):
    asked = {'role': 'user', 'content': config.preface + task.prompt(problem).strip() + config.instruction}
    return [*([{'role': 'system', 'content': config.system}] if config.system else []), asked]

  def prompt(problem):
    said = messages(problem)
    text = chat.render(template, said, add_generation_prompt=True, **options)
    return Prompt(problem.id, text, tuple(chat.encode_prompt(template, tokenizer, said, **options)))

  def example(identifier, problem, completion, *, finished=True):
    encoded = chat.encode_completion(
        template, tokenizer, messages(problem), completion, finished=finished, **options
    )
    return _example(config, identifier, encoded)

  def conversation(identifier, said):
    try:
      return _example(config, identifier, chat.encode(template, tokenizer, said, turns=config.turns, **options))
    except ValueError as error:
      raise schema.ConfigError(f'conversation {identifier!r}: {error}') from error

  header = chat.render(template, [{'role': 'user', 'content': 'x'}], add_generation_prompt=True, **options)
  return Prompting(_reasoning_task(task, chat.opens_reasoning(header)), prompt, example, conversation)


def _example(config, identifier, encoded: chat.Encoded) -> packing.Example:
  learnt = encoded.loss_mask & ~encoded.reasoning_mask if config.supervised == 'answer' else encoded.loss_mask
  return packing.Example(identifier, encoded.tokens, learnt)


def _reasoning_task(task: Task, opened: bool) -> Task:
  answer = functools.partial(answer_of, opened=opened)
  return dataclasses.replace(
      task, extract=lambda text: task.extract(answer(text)),
      grade=lambda problem, text: task.grade(problem, answer(text)),
      answer_cue=f'\n{MARKERS[1]}\n\n{task.answer_cue}' if opened else task.answer_cue,
  )


def _plain(config, task, tokenizer) -> Prompting:
  return plain(task, tokenizer, preface=config.preface)


FORMATS = {'plain': _plain, 'chat': _chat}
