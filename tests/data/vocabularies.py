"""Small tokenizers of the kinds that published models have, and texts that are hard on them."""

import json
import random

import tokenizers

WORDS = ['zebra', 'panther', 'antelope', 'heron', 'rather tired ant']
TEXTS = [f'What is {i} + {3 * i}?\n There are {i} {WORDS[i % 5]}s,  café déjà vu 😀.' for i in range(200)]
HARD = [
    '', ' ', '   ', '\n\n \n', ' a', 'a ', 'a  b', '\ta\r\n', '123 4567', 'é', 'e\u0301', 'Å', '\u212b', '각',
    '\u1100\u1161', '😀', '👩\u200d👧\u200d👦', '🏳\ufe0f\u200d🌈', '中文。', 'a\u0300\u0316b', '\x00\x7f',
    '\ufeff\ufb01', '\u2581', 'x\u2581y', '\u2581 \u2581\u2581', ' \u2581', '</s>', '<pad><unk><0x0A>',
    '<0xE2>', '\u0120\u010a', '\u3000\u00a0\u2028',
]  # fmt: skip


def random_texts(count=200):
  """Unicode of every plane, and what tokenizers like to lose: spaces, lower bars, combining marks."""
  generator = random.Random(0)

  def pick():
    anywhere = generator.choice([generator.randrange(0xD800), generator.randrange(0xE000, 0x110000)])
    return generator.choice([chr(anywhere), ' ', '\n', generator.choice('019aeQ\t\u2581\u0301\u0120é')])

  return [''.join(pick() for _ in range(generator.randrange(14))) for _ in range(count)]


def save(folder, model, *, special=('</s>',), config=None):
  model.add_special_tokens(list(special))
  folder.mkdir(parents=True, exist_ok=True)
  model.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(json.dumps({'eos_token': special[0], **(config or {})}))
  return folder


def byte_level(vocab_size):
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=vocab_size, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
  )
  model.train_from_iterator(TEXTS, trainer)
  return model


def byte_fallback(*, decoder=(), normalizer=()):
  """Spelled as Gemma's and Llama 2's files are: U+2581 for a space, bytes for rare characters."""
  letters = sorted({letter for text in TEXTS[:10] for letter in text if letter.isascii() and letter != ' '})
  # Spelled with a space of its own, a piece is never made; published vocabularies have some of these, too.
  pieces = ['<unk>', *(f'<0x{byte:02X}>' for byte in range(256)), *letters, '\u2581', ' ', ' a', '\u2581a', 'is']
  vocabulary = {piece: i for i, piece in enumerate(pieces)}
  merges = [('\u2581', 'a'), ('i', 's')]
  model = tokenizers.Tokenizer(
      tokenizers.models.BPE(vocabulary, merges, unk_token='<unk>', byte_fallback=True, fuse_unk=True)
  )
  model.normalizer = tokenizers.normalizers.Sequence([*normalizer, tokenizers.normalizers.Replace(' ', '\u2581')])
  decoders = tokenizers.decoders
  steps = [decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse()]
  model.decoder = decoders.Sequence([*steps, *decoder])
  return model
