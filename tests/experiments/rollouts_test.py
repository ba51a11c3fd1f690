"""The page of rollouts: nothing in a text can break it, every completion is there, colours follow the numbers."""

import html.parser
import json
import re

import numpy as np
import pytest

from experiments.rollouts import __main__ as main
from experiments.rollouts import page
from srm_jax import alarms
from srm_jax.data import tokenizer
from srm_jax.rollout_view import Group, Sample, View
from srm_jax.train import train
from tests import browser, tiny
from tests.tiny import one_device, tiny_tasks  # noqa: F401

BYTES = tokenizer.load('byte')
NASTY = '<script>alert("1 & 2")</script>\x00\x1b</p>%'


def sample(text, *, advantage=0.0, reward=0.0, ratio=None, finished=True, **changes):
  """A completion without a model; every token has log-probability -1 and entropy 0.5."""
  ids = (*BYTES.encode(text), BYTES.eos_id) if finished else tuple(BYTES.encode(text))
  ones = np.ones(len(ids), np.float32)
  reference = None if ratio is None else (-1 - ratio) * ones
  made = Sample(ids, text, reward, reward, {}, finished, advantage * ones, -ones, 0.5 * ones, reference)
  return made._replace(**changes)


def view(*groups):
  return View('runs/<x>', 7, 1.0, {'surrogate': 'a < b'}, 'reference', list(groups), BYTES)


def group(*samples, prompt='1+1\n', answer='2'):
  return Group(prompt, answer, list(samples))


class Reader(html.parser.HTMLParser):
  """Elements as [tag, attributes, text], those without an end among them; fails where tags do not nest."""

  def __init__(self, text):
    super().__init__()
    self.elements, self.open = [], []
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.elements.append([tag, dict(attrs), ''])
    if tag not in ('meta', 'input'):
      self.open.append(self.elements[-1])

  def handle_endtag(self, tag):
    assert self.open.pop()[0] == tag

  def handle_data(self, data):
    for element in self.open:
      element[2] += data

  def tokens(self):
    return [(attrs, text) for _, attrs, text in self.elements if 't' in attrs.get('class', '').split()]


def test_text_cannot_break_the_page():
  text = page.render(view(group(sample(NASTY, reward=1.0), prompt=NASTY, answer='</b><i>')))
  read = Reader(text)
  assert [tag for tag, _, _ in read.elements].count('script') == 1 and 'alert' not in read.elements[-1][2]
  shown = NASTY.replace('\x00', '\u2400').replace('\x1b', '\u241b')
  assert ''.join(token for _, token in read.tokens()) == shown + '⟨end⟩'
  assert next(text for _, attrs, text in read.elements if attrs.get('class') == 'question') == shown
  assert next(text for tag, _, text in read.elements if tag == 'b') == '</b><i>'
  assert 'runs/&lt;x&gt;' in text and 'a &lt; b' in text and '\x00' not in text
  assert not re.search(r'(src|href)=|@import|url\(|https?:', text)


def test_every_completion_has_one_row_on_its_side():
  read = Reader(page.render(view(
      group(sample('2', reward=1.0), sample('3'), sample('4', reward=None, finished=False)), group(sample('5')),
  )))
  rows = [text for tag, _, text in read.elements if tag == 'article']
  assert len(rows) == 4
  sides = [text for _, attrs, text in read.elements if attrs.get('class') == 'side']
  assert [re.match(r'\w+: \d', side)[0] for side in sides] == ['right: 1', 'wrong: 2', 'right: 0', 'wrong: 1']
  assert 'reward 1' in rows[0] and '2 tokens' in rows[0] and 'finished' in rows[0]
  assert 'cannot be scored' in rows[2] and '1 tokens' in rows[2] and 'cut' in rows[2]
  heads = [text for tag, _, text in read.elements if tag in ('h1', 'h3')]
  assert heads == ['1 of 4 completions are right', '1. 1 of 3 right, answer 2', '2. 0 of 1 right, answer 2']


def test_a_reward_of_several_parts_is_shown_with_them():
  summed = sample('2', reward=1.25, grade=1.0, parts={'task': 1.0, '<format>': 0.25, 'length': None})
  text = page.render(view(group(summed)))
  assert '<span>reward 1.25 (task 1, &lt;format&gt; 0.25, length none)</span>' in text and 'right: 1' in text


def test_colours_follow_the_signs_and_sizes():
  samples = [sample('a', advantage=2.0, ratio=-0.1), sample('b', advantage=-0.5, ratio=0.2), sample('c', ratio=0.0)]
  text = page.render(view(group(*samples)))
  found = {shown: attrs for attrs, shown in Reader(text).tokens() if shown in 'abc'}
  assert [found[letter]['class'] for letter in 'abc'] == ['t less up', 't more down', 't']
  sizes = {letter: dict(part.split(':') for part in found[letter]['style'].split(';')) for letter in 'abc'}
  assert [sizes[letter]['--a'] for letter in 'abc'] == ['1.00', '0.25', '0.00']
  assert sizes['a']['--r'] == '0.50' and sizes['a']['--e'] == '1.00'
  assert found['b']['title'] == 'log-prob -1.000, entropy 0.500, log-ratio +0.200, advantage -0.500, id 98'
  assert re.findall(r'<input [^>]*id="(\w+)"( checked)?', text) == [
      ('advantage', ' checked'), ('ratio', ''), ('entropy', ''), ('plain', '')]


def test_what_is_not_there_is_not_offered():
  text = page.render(view(group(sample('a', advantages=None), sample('b', advantages=None))))
  assert re.findall(r'<input [^>]*id="(\w+)"( checked)?', text) == [('entropy', ' checked'), ('plain', '')]
  assert 'advantage' not in re.sub('<style>.*?</style>', '', text, flags=re.S)


def test_a_character_of_several_tokens_is_shown_once():
  made = sample('aé\n😀', finished=False, ratio=0.25)._replace(entropy=np.arange(8, dtype=np.float32))
  shown = page.tokens(BYTES, made)
  assert [(token.text, len(token.ids)) for token in shown] == [('a', 1), ('é', 2), ('\n', 1), ('😀', 4)]
  assert [token.logprob for token in shown] == [-1, -2, -1, -4] and [token.entropy for token in shown] == [0, 2, 3, 7]
  np.testing.assert_allclose([token.ratio for token in shown], [0.25, 0.5, 0.25, 1.0], rtol=1e-5)
  assert [text for _, text in Reader(page.render(view(group(made)))).tokens()] == ['a', 'é', '↵\n', '😀']
  half = made._replace(ids=(240, 159), logprobs=-np.ones(2), entropy=np.ones(2), reference=None, advantages=None)
  assert [(token.text, token.ids) for token in page.tokens(BYTES, half)] == [('\ufffd', (240, 159))]


def test_alarms_stand_above_the_completions():
  text = page.render(view(group(sample('a'))), [alarms.Alarm('entropy_collapse', 7, 'seen < 1', 'cause', 'fix')])
  assert '<p class="flag">alarm entropy_collapse at step 7: seen &lt; 1.' in text


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return train(tiny.grpo(num_steps=1), tmp_path_factory.mktemp('grpo')).workdir


def test_a_run_has_its_page(run, capsys):
  path = main.write(run, None, 2, 3, None)
  assert path == run / 'rollouts.html' and '2 prompts of step 1, 3 completions each' in capsys.readouterr().out
  read = Reader(path.read_text(encoding='utf-8'))
  assert [tag for tag, _, _ in read.elements].count('article') == 6
  prompts = [text for _, attrs, text in read.elements if attrs.get('class') == 'question']
  assert len(prompts) == 2 and all(re.fullmatch(r'\d\+\d', prompt) for prompt in prompts)
  assert len(read.tokens()) >= 6 and all('log-prob -' in attrs['title'] for attrs, _ in read.tokens())


@pytest.mark.parametrize('width', [500, 1280])
def test_page_does_not_overflow_in_a_browser_and_answers_a_tap(tmp_path, width):
  samples = [sample('x' * 300, reward=1.0, advantage=1.0), sample('word ' * 200, advantage=-1.0, ratio=None)]
  text = page.render(view(group(*samples, prompt='y' * 400)))
  script = (
      'document.querySelector(".t").click(); const root = document.documentElement; JSON.stringify([root.scrollWidth, '
      'innerWidth, getComputedStyle(document.querySelector(".up")).backgroundColor, '
      'document.getElementById("panel").textContent])'
  )
  wide, there, colour, panel = json.loads(browser.evaluate(text, script, tmp_path, width=width))
  assert wide <= there
  assert colour == 'rgba(31, 138, 91, 0.6)'  # .up at full strength, by the colouring that is chosen at first
  assert panel.startswith('"x" log-prob')
