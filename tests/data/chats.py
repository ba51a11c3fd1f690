"""Folders as models publish them, for the tests: a tiny tokenizer with a family's special tokens, and its template."""

import functools
import json
import pathlib
from typing import NamedTuple

import tokenizers

TEMPLATES = pathlib.Path(__file__).parent / 'templates'
TEXTS = ['The answer is 4.\n\n\nTwo and two are 4, said the user.\n\n', '</think>\n\nWhat is 2 + 2?\n\n'] * 5

# How Qwen, Llama 3 and Phi-4 split text: newlines go to the punctuation before them, and together otherwise.
WORDS = r"""[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""


class Family(NamedTuple):
  """special, added: tokens with one id, of which only the former are called special. end: generation_config's."""

  special: tuple[str, ...]
  added: tuple[str, ...] = ()
  named: dict[str, str] = {}
  end: tuple[str, ...] = ()
  stripped: tuple[str, ...] = ()  # tokens that swallow the spaces after them


CHATML = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
FAMILIES = {
    'qwen2_5': Family(
        CHATML, ('<tool_call>',), {'eos_token': '<|im_end|>', 'pad_token': '<|endoftext|>'},
        ('<|im_end|>', '<|endoftext|>'),
    ),
    'qwen3': Family(
        CHATML, ('<tool_call>', '</tool_call>', '<tool_response>', '</tool_response>', '<think>', '</think>'),
        {'eos_token': '<|im_end|>', 'pad_token': '<|endoftext|>'}, ('<|im_end|>', '<|endoftext|>'),
    ),
    'llama3': Family(
        ('<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eom_id|>',
         '<|eot_id|>'), (), {'bos_token': '<|begin_of_text|>', 'eos_token': '<|eot_id|>'},
        ('<|end_of_text|>', '<|eom_id|>', '<|eot_id|>'),
    ),
    'gemma3': Family(
        ('<pad>', '<eos>', '<bos>', '<start_of_turn>', '<end_of_turn>'), ('\n\n', '\n\n\n'),
        {'bos_token': '<bos>', 'eos_token': '<eos>', 'pad_token': '<pad>'}, ('<eos>', '<end_of_turn>'),
    ),
    'deepseek_r1': Family(
        ('<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>'), ('<｜User｜>', '<｜Assistant｜>', '<think>', '</think>'),
        {'bos_token': '<｜begin▁of▁sentence｜>', 'eos_token': '<｜end▁of▁sentence｜>'}, ('<｜end▁of▁sentence｜>',),
    ),
    'smollm2': Family(CHATML, (), {'bos_token': '<|im_start|>', 'eos_token': '<|im_end|>'}),
    'smollm3': Family(CHATML, ('<think>', '</think>'), {'eos_token': '<|im_end|>'}),
    'phi4_mini': Family(
        ('<|endoftext|>', '<|assistant|>', '<|end|>', '<|user|>', '<|system|>'), ('<|tool|>',),
        {'bos_token': '<|endoftext|>', 'eos_token': '<|endoftext|>'}, ('<|end|>', '<|endoftext|>'), ('<|end|>',),
    ),
}  # fmt: skip


@functools.cache
def trained():
  """Byte-level BPE in which newlines and some words merge, as JSON without added tokens."""
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
      tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), 'isolated'),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ])
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
  )
  model.train_from_iterator(TEXTS, trainer)
  return model.to_str()


def save(folder, family: Family, *, template=None, rename=str, generation_config=True):
  """Writes the files of a model folder.

  Args:
    folder: created.
    family: its tokens.
    template: text of chat_template.jinja; None for none.
    rename: applied to the file's text, to break it.
    generation_config: False leaves that file out.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  model = tokenizers.Tokenizer.from_str(trained())
  for token in family.special:
    stripped = token in family.stripped
    model.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False, rstrip=stripped)])
  model.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in family.added])
  (folder / 'tokenizer.json').write_text(rename(model.to_str()), encoding='utf-8')
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False, **family.named}
  (folder / 'tokenizer_config.json').write_text(json.dumps(config), encoding='utf-8')
  if family.end and generation_config:
    ids = [model.token_to_id(token) for token in family.end]
    (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': ids if len(ids) > 1 else ids[0]}))
  if template is not None:
    (folder / 'chat_template.jinja').write_text(template, encoding='utf-8')
  return folder


def save_family(folder, name):
  return save(folder, FAMILIES[name], template=(TEMPLATES / f'{name}.jinja').read_text(encoding='utf-8'))
