"""Problems as prompts and examples: a chat is asked and taught in the same tokens, and graded without its reasoning."""

import numpy as np
import pytest
import tokenizers

from configs import base
from srm_jax import schema
from srm_jax.data import chat, prompting
from srm_jax.data import tokenizer as tokenizer_files
from srm_jax.inference.strategies import STRATEGIES
from srm_jax.types import Completion, Problem, SamplingParams
from tests.data import chats
from tests.tiny import SUMS

PROBLEM = Problem('p', '3+4', '7')
OPENED = ('deepseek_r1',)  # templates that begin the reasoning in the prompt


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  return {name: chats.save_family(tmp_path_factory.mktemp(name), name) for name in chats.FAMILIES}


def opened(tokenizer, **options):
  section = schema.parse(prompting.PromptConfig, base.prompt(**options), 'prompt')
  return prompting.open_prompting(section, SUMS, tokenizer)


def spelled(folder, ids):
  whole = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  return whole.decode([int(i) for i in ids], skip_special_tokens=False)


@pytest.mark.parametrize('name', chats.FAMILIES)
def test_a_chat_is_taught_in_the_tokens_in_which_it_is_asked(folders, name):
  tokenizer = tokenizer_files.load(folders[name])
  asked = opened(tokenizer, format='chat', instruction=' Now.')
  prompt, example = asked.prompt(PROBLEM), asked.example('e', PROBLEM, '#### 7')
  assert '3+4 Now.' in prompt.text and prompt.id == 'p'
  assert spelled(folders[name], prompt.tokens).replace(' ', '') == prompt.text.replace(' ', '')
  assert prompting.prompt_ids(tokenizer, prompt) == prompt.tokens == tuple(example.tokens[: len(prompt.tokens)])
  np.testing.assert_array_equal(example.loss_mask, np.arange(len(example.tokens)) >= len(prompt.tokens))
  assert example.tokens[-1] in tokenizer.end_ids
  assert tokenizer.decode(example.tokens[example.loss_mask]) == '#### 7'
  cut = asked.example('e', PROBLEM, '#### 7', finished=False)
  np.testing.assert_array_equal(cut.tokens, example.tokens[:-1])


@pytest.mark.parametrize('name', chats.FAMILIES)
def test_reasoning_is_neither_graded_nor_when_asked_for_learnt(folders, name):
  tokenizer = tokenizer_files.load(folders[name])
  asked = opened(tokenizer, format='chat', supervised='answer')
  start = '' if name in OPENED else '<think>\n'
  right = f'{start}Is it #### 8? No.\n</think>\n\n#### 7'
  assert asked.task.grade(PROBLEM, right) == 1.0 and asked.task.extract(right) == '7'
  assert asked.task.grade(PROBLEM, right.replace('#### 7', '#### 8')) == 0.0
  assert asked.task.grade(PROBLEM, f'{start}#### 7') == 0.0  # it never came to an end
  example = asked.example('e', PROBLEM, right)
  learnt = tokenizer.decode(example.tokens[example.loss_mask])
  assert '8' not in learnt and learnt.strip() == '#### 7'
  assert opened(tokenizer, format='chat').example('e', PROBLEM, right).loss_mask.sum() > example.loss_mask.sum() + 10


@pytest.mark.parametrize('name', ['qwen2_5', 'deepseek_r1'])
def test_the_direct_answer_follows_the_header_of_the_turn(folders, name):
  tokenizer = tokenizer_files.load(folders[name])
  asked, seen = opened(tokenizer, format='chat'), []

  def generate(prompts, sampling):
    seen.extend(prompts)
    return [[Completion(prompts[0], 0, '7', prompting.prompt_ids(tokenizer, prompts[0]), (1,), (0.0,), True)]]

  direct = STRATEGIES['direct'](generate, cue=asked.task.answer_cue)
  (completion,), = direct([asked.prompt(PROBLEM)], SamplingParams())
  assert spelled(folders[name], completion.prompt_tokens).endswith(asked.task.answer_cue)
  assert completion.prompt_tokens[: len(asked.prompt(PROBLEM).tokens)] == asked.prompt(PROBLEM).tokens
  assert seen[0].text == asked.prompt(PROBLEM).text + asked.task.answer_cue
  assert asked.task.grade(PROBLEM, completion.text) == 1.0


@pytest.mark.parametrize('text, opened, answer', [
    ('a', False, 'a'), ('a', True, ''), ('<think>a', False, ''), ('<think>a</think>b', False, 'b'),
    ('a</think>b', True, 'b'), ('a</think>b</think>c', True, 'c'), ('a</think>b<think>c', False, ''),
    ('', False, ''), ('</think>', True, ''),
])
def test_answers_by_hand(text, opened, answer):
  assert prompting.answer_of(text, opened=opened) == answer


def test_options_and_a_system_message_reach_the_template(folders):
  tokenizer = tokenizer_files.load(folders['qwen3'])
  thinking = opened(tokenizer, format='chat', system='Be brief.').prompt(PROBLEM)
  silent = opened(tokenizer, format='chat', options={'enable_thinking': False}).prompt(PROBLEM)
  assert 'Be brief.' in thinking.text and '</think>' not in thinking.text
  assert silent.text.rstrip().endswith('</think>') and 'Be brief.' not in silent.text


def test_plain_texts_begin_as_the_models_own_tokenizer_has_them_begin(folders, tmp_path):
  bare = tokenizer_files.load(folders['llama3'])
  assert bare.prefix_ids == () and opened(bare).prompt(PROBLEM).tokens == ()
  path = folders['llama3'] / 'tokenizer.json'
  whole = tokenizers.Tokenizer.from_file(str(path))
  bos = whole.token_to_id('<|begin_of_text|>')
  whole.post_processor = tokenizers.processors.TemplateProcessing(
      single='<|begin_of_text|> $A', special_tokens=[('<|begin_of_text|>', bos)]
  )
  for name in ('tokenizer_config.json', 'generation_config.json', 'chat_template.jinja'):
    (tmp_path / name).write_bytes((folders['llama3'] / name).read_bytes())
  whole.save(str(tmp_path / 'tokenizer.json'))
  tokenizer = tokenizer_files.load(tmp_path)
  assert tokenizer.prefix_ids == (bos,) and bos not in tokenizer.encode('3+4')
  asked = opened(tokenizer)
  assert asked.prompt(PROBLEM).tokens == (bos, *tokenizer.encode('3+4\n'))
  assert asked.example('e', PROBLEM, '7').tokens.tolist() == [
      bos, *tokenizer.encode('3+4\n'), *tokenizer.encode('7'), tokenizer.eos_id
  ]
  assert opened(tokenizer, format='chat').prompt(PROBLEM).tokens.count(bos) == 1  # the template writes its own


def test_conversations_are_learnt_turn_by_turn(folders):
  tokenizer = tokenizer_files.load(folders['qwen2_5'])
  said = [{'role': role, 'content': text} for role, text in zip(['user', 'assistant'] * 2, ['a?', 'b.', 'c?', 'd.'])]
  learnt = lambda **options: tokenizer.decode((lambda e: e.tokens[e.loss_mask])(
      opened(tokenizer, format='chat', **options).conversation('c', said)
  ))
  assert learnt() == 'b.d.' and learnt(turns='last') == 'd.'
  np.testing.assert_array_equal(
      opened(tokenizer, format='chat').conversation('c', said).tokens,
      chat.encode(chat.load_template(folders['qwen2_5']), tokenizer, said).tokens,
  )


def test_what_does_not_fit_is_an_error_that_says_so(folders, tmp_path):
  tokenizer = tokenizer_files.load(folders['qwen2_5'])
  with pytest.raises(schema.ConfigError, match="prompt.format 'caht' unknown.*did you mean 'chat'"):
    opened(tokenizer, format='caht')
  with pytest.raises(schema.ConfigError, match="prompt.supervised 'none' unknown"):
    opened(tokenizer, format='chat', supervised='none')
  with pytest.raises(schema.ConfigError, match="conversation 'c': .*no assistant turn"):
    opened(tokenizer, format='chat').conversation('c', [{'role': 'user', 'content': 'a'}])
  with pytest.raises(schema.ConfigError, match='written by a chat template'):
    opened(tokenizer).conversation('c', [])
  with pytest.raises(schema.ConfigError, match='byte cannot encode chats'):
    opened(tokenizer_files.load('byte'), format='chat')
  chats.save(tmp_path, chats.FAMILIES['qwen2_5'])
  with pytest.raises(schema.ConfigError, match='has no chat template'):
    opened(tokenizer_files.load(tmp_path), format='chat')


def test_a_preface_stands_before_the_problem(folders):
  byte = tokenizer_files.load('byte')
  asked, plain = opened(byte, preface='[answer] '), opened(byte)
  assert asked.prompt(PROBLEM).text == f'[answer] {plain.prompt(PROBLEM).text}'
  example = asked.example('e', PROBLEM, '7')
  assert bytes(example.tokens[~example.loss_mask].tolist()).decode() == asked.prompt(PROBLEM).text
  chat_text = opened(tokenizer_files.load(folders['qwen2_5']), format='chat', preface='Q: ').prompt(PROBLEM).text
  assert 'Q: 3+4' in chat_text


def test_a_hint_stands_behind_the_problem():
  tokenizer = tokenizer_files.load('byte')
  plain = opened(tokenizer, hint=' ({answer})', preface='Q: ')
  assert plain.prompt(PROBLEM).text == 'Q: 3+4 (7)\n'
  assert bytes(plain.example('e', PROBLEM, '#### 7').tokens.tolist()[:10]) == b'Q: 3+4 (7)'
  assert opened(tokenizer).prompt(PROBLEM).text == '3+4\n'


def test_a_hint_stands_before_the_instruction_of_a_chat(folders):
  name = next(iter(chats.FAMILIES))
  asked = opened(tokenizer_files.load(folders[name]), format='chat', instruction=' Now.', hint=' ({answer})')
  assert '3+4 (7) Now.' in asked.prompt(PROBLEM).text


def test_hints_that_cannot_be():
  tokenizer = tokenizer_files.load('byte')
  with pytest.raises(schema.ConfigError, match=r"hint ' \(7\)' does not show the answer; fix: put {answer}"):
    opened(tokenizer, hint=' (7)')
  with pytest.raises(schema.ConfigError, match="problem p of task 'sums' has no answer to hint at; fix: hint=''"):
    opened(tokenizer, hint=' ({answer})').prompt(Problem('p', '3+4', ''))
