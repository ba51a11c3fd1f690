"""The teacher cache over a vocabulary of 151 936: bytes a token, what a reconstruction loses, rates.

  python -m experiments.benchmarks.teacher_cache [--tokens=20000] [--ks=16,32,64,128] [--rows=32]

No model: logits are Zipf-like (no token stands out), peaked (one does) or two-peaked, with noise; tail is their mean
mass outside the k. Losses are means and maxima of KL(teacher || decoded) in nats, with the quantisation's part of it.
Rates are of one process, with the files in the page cache: examples one by one in random order, in batches of 32 as
`gather` reads them, and all in file order.
"""

import pathlib
import tempfile
import time

import numpy as np
from absl import app, flags
from scipy import special

from srm_jax.data import packing, teacher_cache, top_k_codec

TOKENS = flags.DEFINE_integer('tokens', 20_000, 'supervised tokens that are written and read', lower_bound=200)
KS = flags.DEFINE_list('ks', ['16', '32', '64', '128'], 'tokens kept of each distribution')
ROWS = flags.DEFINE_integer('rows', 32, 'dense distributions of each kind whose loss is measured', lower_bound=1)

VOCABULARY = 151_936
PROMPT, COMPLETION = 50, 200  # tokens of an example
BATCH = 32
ROUNDS = 3


def dense(kind: str, rows: int, generator: np.random.Generator):
  """float32 [rows, V] logits."""
  steepness = generator.uniform(*(1.0, 2.0) if kind == 'zipf' else (1.2, 1.8), (rows, 1))
  logits = -steepness * np.log(np.arange(1, VOCABULARY + 1)) + generator.normal(0, 0.3, (rows, VOCABULARY))
  if kind == 'peaked':
    logits[:, 0] += generator.uniform(5, 20, rows)
  elif kind == 'two-peaked':
    logits[:, :2] = logits.max(axis=1, keepdims=True) + generator.uniform(8, 10, (rows, 2))
  return generator.permuted(logits.astype(np.float32), axis=1)


def highest(logits, k: int):
  """ids and float32 log-probabilities [rows, k], likeliest first."""
  ids = np.argpartition(logits, -k, axis=1)[:, -k:]
  ids = np.take_along_axis(ids, np.argsort(-np.take_along_axis(logits, ids, axis=1), axis=1), axis=1)
  norm = special.logsumexp(logits.astype(np.float64), axis=1, keepdims=True)
  return ids, (np.take_along_axis(logits, ids, axis=1) - norm).astype(np.float32)


def losses(kind: str, logits, ids, logprobs) -> str:
  """A line on what is lost of these distributions."""
  codec = top_k_codec.Codec(VOCABULARY, ids.shape[1])
  tokens = codec.decode(codec.encode(ids, logprobs))
  total, quantisation = top_k_codec.reconstruction_kl(logits, tokens)
  return (
      f'  {kind:10} tail {tokens.tail.mean():7.1e}   KL mean {total.mean():7.1e} max {total.max():7.1e}   '
      f'of it quantisation {quantisation.mean():7.1e} max {quantisation.max():7.1e}')


def make_examples(generator: np.random.Generator) -> list[packing.Example]:
  tokens = generator.integers(0, VOCABULARY, (max(1, TOKENS.value // COMPLETION), PROMPT + COMPLETION), np.int32)
  return [packing.from_prompt_completion(f'e{n}', row[:PROMPT], row[PROMPT:], None) for n, row in enumerate(tokens)]


def predictions(examples, logprobs, generator: np.random.Generator):
  """[(ids, log-probabilities)]: of random tokens, with probabilities drawn from the rows of real softmaxes."""
  k = logprobs.shape[1]
  for _ in examples:
    ids = np.sort(generator.integers(0, VOCABULARY - k, (COMPLETION, k)), axis=1) + np.arange(k)
    yield generator.permuted(ids, axis=1), logprobs[generator.integers(0, len(logprobs), COMPLETION)]


def seconds(action, rounds=ROUNDS) -> float:
  """Of the fastest round."""
  found = []
  for _ in range(rounds):
    start = time.perf_counter()
    action()
    found.append(time.perf_counter() - start)
  return min(found)


def rates(folder: pathlib.Path, examples, given, k: int, generator: np.random.Generator) -> list[str]:
  """Writes, reads, verifies and damages a cache; lines on what each took."""
  identity = teacher_cache.Identity('teacher', 'tokenizer', teacher_cache.data_hash(examples), VOCABULARY, k, 1.0)

  def write():
    with teacher_cache.writer(folder, identity) as out:
      for example, top in zip(examples, given, strict=True):
        out.append(example, *top)

  writing = seconds(write, rounds=1)
  cache = teacher_cache.open_cache(folder, identity)
  order = [examples[i].id for i in generator.permutation(len(examples))]
  timed = {
      'write': writing,
      'random': seconds(lambda: [cache[example_id] for example_id in order]),
      'batches': seconds(lambda: [cache.read(order[i : i + BATCH]) for i in range(0, len(order), BATCH)]),
      'in order': seconds(lambda: list(cache.scan())),
      'verify': seconds(lambda: teacher_cache.verify(folder)),
  }
  contents = cache.contents
  codec = top_k_codec.Codec(VOCABULARY, k)
  return [
      f'k {k}: {codec.bytes_per_token} bytes a token, {contents.bytes / contents.tokens:.1f} with files and manifest',
      '  tokens/s: ' + ', '.join(f'{name} {contents.tokens / value:,.0f}' for name, value in timed.items()),
      f'  {detection(folder, identity, generator)}']


def detection(folder: pathlib.Path, identity, generator: np.random.Generator) -> str:
  """Flips one bit of the largest file, and says how soon and how well that is found."""
  path = max(folder.glob('shard-*'), key=lambda file: file.stat().st_size)
  raw = bytearray(path.read_bytes())
  raw[int(generator.integers(1000, len(raw) // 2))] ^= 1
  path.write_bytes(raw)
  start, found = time.perf_counter(), 'nothing'
  try:
    teacher_cache.verify(folder)
  except ValueError as error:
    found = str(error).split(';')[0].removeprefix(f'{folder}/')
  return f'a flipped bit found in {time.perf_counter() - start:.3f} s: {found}'


def main(argv):
  del argv
  generator = np.random.default_rng(0)
  ks = sorted(map(int, KS.value))
  kinds = {kind: dense(kind, ROWS.value, generator) for kind in ('zipf', 'peaked', 'two-peaked')}
  tops = {kind: highest(logits, ks[-1]) for kind, logits in kinds.items()}
  examples = make_examples(generator)
  for k in ks:
    kept = {kind: (ids[:, :k], logprobs[:, :k]) for kind, (ids, logprobs) in tops.items()}
    given = list(predictions(examples, np.concatenate([logprobs for _, logprobs in kept.values()]), generator))
    with tempfile.TemporaryDirectory() as folder:
      print('\n'.join(rates(pathlib.Path(folder), examples, given, k, generator)))
    for kind, logits in kinds.items():
      print(losses(kind, logits, *kept[kind]), flush=True)


if __name__ == '__main__':
  app.run(main)
