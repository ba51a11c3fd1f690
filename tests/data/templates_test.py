import datetime
import json

import pytest

from srm_jax.data import templates
from srm_jax.data.templates import ChatTemplate, load_template, render
from srm_jax.schema import ConfigError
from tests.data import chats

USER = {'role': 'user', 'content': '  What is 2 + 2?\n'}
ANSWER = {'role': 'assistant', 'content': '\n4 <b>é</b> '}
SYSTEM = {'role': 'system', 'content': 'Be brief. /no_think '}
TOOL = {'role': 'tool', 'content': '4'}
CONVERSATIONS = [
    [USER],
    [USER, ANSWER],
    [SYSTEM, USER],
    [SYSTEM, USER, ANSWER, {'role': 'user', 'content': 'Why?'}, ANSWER],
    [USER, ANSWER, TOOL, TOOL, ANSWER],
    [USER, {'role': 'assistant', 'content': '<think>\n2, 2\n</think>\n\n4'}, USER],
    [USER, {'role': 'assistant', 'content': '<think>\n2, 2\n</think>\n\n4'}],
    [USER, {'role': 'assistant', 'content': '4', 'reasoning_content': '2, 2'}],
]
ECHO = ChatTemplate('echo', "{{ bos_token }}{% for m in messages %}{{ m.role ~ ':' ~ m.content ~ ';' }}{% endfor %}")


@pytest.fixture(scope='module')
def transformers():
  return pytest.importorskip('transformers')


def outcome(function, *args, **options):
  """The text, or that it was refused."""
  try:
    return function(*args, **options)
  except Exception as error:  # transformers lets through whatever a template raises
    return 'refused' if 'alternate' in str(error) else str(error)


@pytest.mark.parametrize('family', chats.FAMILIES)
def test_the_same_text_as_transformers(family, tmp_path, transformers, monkeypatch):
  today = datetime.datetime(2025, 3, 9)
  clock = type('clock', (), {'now': staticmethod(lambda: today)})
  monkeypatch.setattr(transformers.utils.chat_template_utils, 'datetime', clock)
  folder = chats.save_family(tmp_path, family)
  theirs, ours = transformers.PreTrainedTokenizerFast.from_pretrained(folder), load_template(folder)
  seen = set()
  for messages in CONVERSATIONS:
    if 'reasoning_content' in messages[-1] and 'reasoning_content' not in ours.source:
      continue
    for options in [{}, {'add_generation_prompt': True}, {'add_generation_prompt': True, 'enable_thinking': False}]:
      expected = outcome(theirs.apply_chat_template, messages, tokenize=False, **options)
      assert outcome(render, ours, messages, date=today.date(), **options) == expected
      seen.add(expected)
  assert len(seen) > 10 and ('refused' in seen) == (family == 'gemma3')


def test_the_documented_formats(tmp_path):
  """The parts in which the families differ, by hand."""
  text = lambda name, messages, **options: render(load_template(tmp_path / name), messages, **options)
  for name in chats.FAMILIES:
    chats.save_family(tmp_path / name, name)
  hi, oh = {'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'oh'}
  be = {'role': 'system', 'content': 'be'}
  header = {'add_generation_prompt': True}
  assert text('qwen2_5', [hi], **header) == (
      '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n'
      '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n'
  )
  assert text('qwen3', [hi], **header, enable_thinking=False).endswith('assistant\n<think>\n\n</think>\n\n')
  assert text('qwen3', [hi, {**oh, 'reasoning_content': 'eh'}]).endswith('<think>\neh\n</think>\n\noh<|im_end|>\n')
  assert text('qwen3', [hi, {**oh, 'reasoning_content': 'eh'}, hi, oh]).count('eh') == 0
  assert text('llama3', [be, hi], **header, date=datetime.date(2025, 2, 1)) == (
      '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n'
      'Today Date: 01 Feb 2025\n\nbe<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>'
      '<|start_header_id|>assistant<|end_header_id|>\n\n'
  )
  assert text('gemma3', [be, hi, oh]) == (
      '<bos><start_of_turn>user\nbe\n\nhi<end_of_turn>\n<start_of_turn>model\noh<end_of_turn>\n'
  )
  assert text('deepseek_r1', [be, hi, {**oh, 'content': 'eh</think>oh'}, hi], **header) == (
      '<｜begin▁of▁sentence｜>be<｜User｜>hi<｜Assistant｜>oh<｜end▁of▁sentence｜><｜User｜>hi<｜Assistant｜><think>\n'
  )
  assert text('smollm2', [hi]).startswith('<|im_start|>system\nYou are a helpful AI assistant named SmolLM')
  assert 'Today Date: 26 July 2024\nReasoning Mode: /no_think\n' in text('smollm3', [hi], enable_thinking=False)
  assert text('phi4_mini', [hi, oh]) == '<|user|>hi<|end|><|assistant|>oh<|end|><|endoftext|>'


def test_where_templates_lie(tmp_path):
  config = tmp_path / 'tokenizer_config.json'
  with pytest.raises(ConfigError, match='has no chat template; fix: put chat_template.jinja there'):
    load_template(tmp_path)
  config.write_text(json.dumps({'chat_template': 'one', 'bos_token': {'content': '<s>'}, 'eos_token': None}))
  assert load_template(tmp_path) == ChatTemplate(str(tmp_path), 'one', {'bos_token': '<s>'})
  named = [{'name': 'default', 'template': 'two'}, {'name': 'tool_use', 'template': 'three'}]
  config.write_text(json.dumps({'chat_template': named}))
  assert load_template(tmp_path).source == 'two'
  assert load_template(tmp_path, name='tool_use').source == 'three'
  with pytest.raises(ConfigError, match=r"'tool_used' unknown \(did you mean 'tool_use'"):
    load_template(tmp_path, name='tool_used')
  (tmp_path / 'chat_template.jinja').write_text('four')
  assert load_template(tmp_path).source == 'four'
  (tmp_path / 'chat_template.jinja').write_text('a\n{% if %}')
  with pytest.raises(ConfigError, match='not valid Jinja: line 2'):
    load_template(tmp_path)
  config.write_text('{"chat_template": "on')
  with pytest.raises(ValueError, match='tokenizer_config.json: not readable as JSON'):
    load_template(tmp_path)


@pytest.mark.parametrize('messages, message', [
    ([], 'has no messages'),
    ([{'role': 'user'}], r'messages\[0\] \(user\): content is None \(NoneType\)'),
    ([USER, {'role': 'assistant', 'content': None}], r'messages\[1\] \(assistant\): content is None'),
    ([{'role': 'user', 'content': [{'type': 'text', 'text': 'hi'}]}], r'content is \[.* \(list\)'),
    ([{'role': 'human', 'content': 'hi'}], r"messages\[0\]: role 'human' unknown.*'user'"),
    ([{'content': 'hi'}], 'role None unknown'),
    (['hi'], "role 'hi' unknown"),
    ([{**USER, 'reasoning_content': 'hm'}], r"messages\[0\] \(user\) has the keys \['reasoning_content'\]"),
    ([{**USER, 'tool_calls': []}], r"has the keys \['tool_calls'\]; known are \['role', 'content'\]"),
    ([USER, {**ANSWER, 'reasoning_content': 'hm'}], r'messages\[1\].*echo never reads.*wrap_reasoning'),
])  # fmt: skip
def test_bad_messages(messages, message):
  with pytest.raises(ValueError, match=message):
    render(ECHO, messages)


def test_options_are_plain_data():
  with pytest.raises(ConfigError, match=r"options \['date_object'\] of the chat template are no JSON data"):
    render(ECHO, [USER], date_object=datetime.date(2024, 1, 1))
  echo = ChatTemplate('echo', '{{ bos_token }}{{ tools is none }}{{ x.y }}', {'bos_token': '<s>'})
  assert render(echo, [USER], x={'y': (1, 2)}) == '<s>True[1, 2]'
  assert render(echo, [USER], x={}, bos_token='') == 'True'


def test_reasoning_is_wrapped_on_request():
  messages = [USER, {'role': 'assistant', 'content': '4', 'reasoning_content': '2, 2'}]
  user, answer = templates.wrap_reasoning(messages)
  assert user is USER and answer == {'role': 'assistant', 'content': '<think>\n2, 2\n</think>\n\n4'}
  assert templates.wrap_reasoning(messages, markers=('<r>', '</r>'))[1]['content'] == '<r>\n2, 2\n</r>\n\n4'
  assert render(ECHO, [user, answer]).endswith('assistant:<think>\n2, 2\n</think>\n\n4;')
  empty = {'role': 'assistant', 'content': '4', 'reasoning_content': ''}
  assert templates.wrap_reasoning([empty]) == [empty] and render(ECHO, [empty]) == 'assistant:4;'
