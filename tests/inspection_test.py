import json
import re

import jax
import numpy as np
import pytest

from configs import base
from srm_jax import checkpoints, inspection
from srm_jax.data import tokenizer as tokenizers
from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.types import Batch, Rollouts, TrainState
from tests import tiny
from tests.data import chats
from tests.tiny import one_device, tiny_tasks  # noqa: F401  (fixtures)

BYTES = tokenizers.load('byte')


def _data(page):
  return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def _check_scores(tokens, names):
  """Probabilities of the top are sorted and sum to at most 1; the loss of a token among them is its -log p."""
  scored = [token for token in tokens if token['position']]
  assert scored
  for token in scored:
    assert set(token['top']) == set(names)
    for name in names:
      probs = [prob for _, prob in token['top'][name]]
      assert len(probs) == inspection.TOP and probs == sorted(probs, reverse=True) and 0 < sum(probs) <= 1 + 1e-4
      found = [prob for text, prob in token['top'][name] if text == token['text']]
      if token['text'].isascii() and found:
        np.testing.assert_allclose(token['loss'][name], -np.log(found[0]), atol=2e-3)


def _seen(text, **changes):
  """An inspection without a model: one row of bytes, the last half supervised, every loss 0."""
  ids = np.array([BYTES.encode(text) + [BYTES.eos_id, 0]], np.int32)
  length = ids.shape[1]
  inside = np.arange(length)[None] < length - 1
  mask = (inside & (np.arange(length) >= length // 2)).astype(np.float32)
  batch = Batch(ids, np.roll(ids, -1, 1), mask, np.arange(length)[None] * inside, inside * 1)
  scores = inspection.Scores(
      np.zeros(ids.shape), np.zeros((*ids.shape, 2), np.int32) + 60, np.full((*ids.shape, 2), 0.25),
  )
  return inspection.Inspection(**dict(
      origin='nothing', step=3, resolved={'loss': 'a < b & c'}, supervised=int(batch.loss_mask.sum()), fill=0.9,
      total_rows=8, sequences=batch, scores={'student': scores}, tokenizer=BYTES,
  ) | changes)


def test_text_cannot_break_the_page():
  text = '<b>&"\n%DATA%</script>'
  page = inspection.render(_seen(text), 'x < y & z')
  assert '<b>' not in page and page.count('</script>') == 2
  assert '&lt;</span>' in page and '&amp;</span>' in page and '↵\n</span>' in page
  assert 'a &lt; b &amp; c' in page and '<h1>x &lt; y &amp; z</h1>' in page
  row, = _data(page)
  assert ''.join(token['text'] for token in row[:-1]) == text
  assert not re.search(r'(src|href)=|@import|url\(', page)


def test_padding_is_left_out_and_the_mask_is_that_of_the_token_itself():
  page = inspection.render(_seen('abcdef'), 'title')
  row, = _data(page)
  assert [token['text'] for token in row] == [*'abcdef', '⟨end⟩']
  assert [token['supervised'] for token in row] == [False] * 5 + [True] * 2
  assert page.count('class="t on s1"') == 2 and page.count('class="t off s1"') == 5
  assert 'title="position 2, id 99, segment 1' in page and 'top' not in row[0]
  assert '1 of 8' in page and '90.0% of 8 rows x 8 positions' in page


def test_rollouts_show_what_each_row_earned():
  plain = _seen('abcdef')
  mask = plain.sequences.loss_mask
  rollouts = Rollouts(
      plain.sequences, -2.5 * mask, advantages=-0.75 * mask, rewards=np.array([1.0]), valid=np.array([0.0]),
      group=np.array([4]),
  )
  page = inspection.render(_seen('abcdef', sequences=rollouts), 'title')
  assert 'group 4 | reward none (cannot be scored) | advantage -0.7500' in page
  assert [token.get('sampler') for token in _data(page)[0]] == [None] * 5 + [-2.5] * 2
  scored = inspection.render(_seen('abcdef', sequences=rollouts._replace(valid=np.array([1.0]))), 'title')
  assert '| reward 1 |' in scored


def test_pieces_that_join_keep_their_spaces():
  pieces = {1: '▁a', 2: '▁b', 3: 'c'}
  # Drops a leading space, as libraries do.
  decode = lambda ids: ''.join(pieces[i] for i in ids).replace('▁', ' ').lstrip(' ')
  tokenizer = BYTES._replace(decode=decode)
  assert inspection.token_texts(tokenizer, [1, 2, 3, 1]) == ['a', ' b', 'c', ' a']


def test_bytes_of_one_character_are_named():
  assert inspection.token_texts(BYTES, [*BYTES.encode('aé'), BYTES.pad_id]) == ['a', '⟨195⟩', '⟨169⟩', '⟨pad⟩']


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
  """The workdir of an untrained teacher of two layers."""
  folder = tmp_path_factory.mktemp('teacher')
  config = TransformerConfig(**base.model(**{**tiny.MODEL, 'num_layers': 2, 'vocab_size': BYTES.vocab_size}))
  params = jax.jit(lambda key: transformer.init_params(config, key))(jax.random.key(5))
  checkpoints.describe_model(folder, config, 'byte')
  saved = checkpoints.open_checkpoints(folder)
  saved.save(TrainState(np.int32(7), {'model': params}, {}), {'source': {}, 'frozen': {}, 'flops': 0.0})
  saved.close()
  return folder


def test_distillation_shows_student_and_teacher(teacher):
  recipe = base.distill(str(teacher), tiny.data(), tiny.batch(), base.distillation('forward_kl'))
  seen = inspection.inspect(tiny.train(recipe), rows=2)
  page = inspection.render(seen, 'distill')
  rows = _data(page)
  assert len(rows) == 2 and seen.total_rows == 4 and seen.step == 0
  for row in rows:
    _check_scores(row, ('student', 'teacher'))
  text = ''.join(token['text'] for token in rows[0])
  assert re.match(r'\d\+\d\n#### \d+⟨end⟩\d', text)  # two problems packed into one row
  assert {token['segment'] for token in rows[0]} == {1, 2}
  assert ' on s1"' in page and ' off s2"' in page and 'forward_kl' in page
  supervised = [token['text'] for token in rows[0] if token['segment'] == 1 and token['supervised']]
  assert ''.join(supervised).startswith('#### ') and supervised[-1] == '⟨end⟩'


def test_reinforcement_learning_shows_rollouts_of_the_newest_checkpoint(teacher):
  config = tiny.grpo(model=dict(num_layers=2))
  seen = inspection.inspect(config, teacher, rows=3)
  page = inspection.render(seen, 'grpo')
  assert seen.step == 7 and 'checkpoint 7 of' in page and 'group_relative' in page
  rows = _data(page)
  assert len(rows) == 3 and page.count('| advantage ') == 3
  for row in rows:
    _check_scores(row, ('student',))
    for token in row:
      if token['supervised']:
        np.testing.assert_allclose(token['loss']['student'], -token['sampler'], atol=1e-3)


CHAT = {'qwen2_5': {}, 'qwen3': {'enable_thinking': False}, 'llama3': {}}  # templates and their options


def _chat_data(template, task='sums', **options):
  """A data section that is put as a chat."""
  return tiny.data(task, prompting=base.prompt('chat', options=CHAT[template], instruction=''), **options)


@pytest.mark.parametrize('name', CHAT)
def test_a_chat_shows_its_turns_with_loss_on_the_assistants(name, tmp_path):
  folder = str(chats.save_family(tmp_path, name))
  recipe = base.sft(_chat_data(name), tiny.batch(2, 160, packing='one_per_row'))
  page = inspection.render(inspection.inspect(tiny.train(recipe, tokenizer=folder, model=dict(max_length=160))), 'sft')
  for row in _data(page):
    _check_scores(row, ('student',))
    learnt = ''.join(token['text'] for token in row if token['supervised'])
    assert re.fullmatch(r'#### \d+<\|(im_end|eot_id)\|>', learnt), learnt
    asked = ''.join(token['text'] for token in row if not token['supervised'])
    assert re.search(r'user.*\d\+\d.*assistant', asked, re.S)


def test_a_conversation_shows_every_turn(tmp_path):
  folder = str(chats.save_family(tmp_path, 'qwen2_5'))
  said = [{'role': role, 'content': text} for role, text in zip(['user', 'assistant'] * 2, ['a?', 'b.', 'c?', 'd.'])]
  path = tmp_path / 'conversations.jsonl'
  path.write_text(''.join(json.dumps({'id': f'c{i}', 'messages': said}) + '\n' for i in range(3)))
  recipe = base.sft(_chat_data('qwen2_5', records=str(path), target='conversation'), tiny.batch(2, 160))
  row = _data(inspection.render(inspection.inspect(tiny.train(recipe, tokenizer=folder)), 'sft'))[0]
  assert ''.join(t['text'] for t in row if t['supervised'] and t['segment'] == 1) == 'b.<|im_end|>d.<|im_end|>'


def test_a_chat_is_rolled_out(tmp_path):
  folder = str(chats.save_family(tmp_path, 'qwen2_5'))
  recipe = base.grpo(_chat_data('qwen2_5', 'parity'), tiny.rollouts(length=160), kl=0.0)
  seen = inspection.inspect(tiny.train(recipe, tokenizer=folder, model=dict(max_length=160)))
  for row in _data(inspection.render(seen, 'grpo')):
    asked = ''.join(token['text'] for token in row if not token['supervised'])
    assert asked.startswith('<|im_start|>') and asked.count('assistant\n') == 1
    for token in row:
      if token['supervised']:
        np.testing.assert_allclose(token['loss']['student'], -token['sampler'], atol=1e-3)
