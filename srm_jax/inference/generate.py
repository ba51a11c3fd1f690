"""Prompts to completions: encodes, checks, sorts by length, batches, and puts the results back in order."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax

from srm_jax.data.prompting import prompt_ids
from srm_jax.inference import decode
from srm_jax.inference import logits as sampler
from srm_jax.models.config import RopeScaling, TransformerConfig
from srm_jax.sharding import current_mesh
from srm_jax.types import Completion, Generate, Params, Prompt, SamplingParams, Spent


def make_generate(
    config: TransformerConfig, params: Params, tokenizer, *, batch_size: int = 64, steps: int = decode.STEPS,
    stop_at_eos: bool = True, streams: int | None = None, progress: Callable[[int], None] | None = None,
) -> Generate:
  """A sampler for one set of parameters.

  Programs are compiled per shape and kept for the process: a second sampler of the same config, with new parameters,
  compiles nothing. Make and call it under the same `jax.set_mesh`; rows are then split over the token axes. Results
  do not depend on how prompts fall into batches, up to the rounding of products of different shapes.

  Args:
    params: the model's parameters; a cast copy is taken, and they are not kept.
    tokenizer: a `data.tokenizer.Tokenizer` (encode, decode, eos_id, end_ids).
    batch_size: completions decoded at a time, over all streams.
    steps: decode steps between looks of the host at what is finished.
    stop_at_eos: False lets every completion run to max_new_tokens, for timing.
    streams: batches decoded side by side, in threads; None for `side_by_side()`.
    progress: called with the number of tokens sampled since the last call, from the threads of the streams.

  Returns:
    generate(prompts, sampling) -> one list of `sampling.samples` completions a prompt. It raises ValueError on an
    empty prompt, on one longer than config.max_length - max_new_tokens, on one whose completion would cross the
    border of LongRoPE, and on impossible sampling parameters.
  """
  prepared = decode.prepare(config, params)
  # A chat model may end a text in several ways; whatever encodes and decodes will do as a tokenizer, with eos_id alone.
  end_ids = tuple({tokenizer.eos_id, *getattr(tokenizer, 'end_ids', ())}) if stop_at_eos else (decode.NOT_EMITTED,)
  workers = side_by_side() if streams is None else streams
  size = -(-batch_size // workers)

  def generate(prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Completion]]:
    sampler.check(sampling)
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    _check_lengths(prompts, encoded, config.max_length - sampling.max_new_tokens)
    _check_rope(config.rope_scaling, prompts, encoded, sampling.max_new_tokens)
    by_length = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    rows = [(i, sample) for i in by_length for sample in range(sampling.samples)]
    results: list[list[Completion]] = [[] for _ in prompts]

    def complete(batch):
      distinct = list(dict.fromkeys(i for i, _ in batch))
      return decode.complete(
          config, prepared, [encoded[i] for i in distinct], [distinct.index(i) for i, _ in batch],
          sampler.row_keys(sampling.seed, ((prompts[i].id, sample) for i, sample in batch)), sampling, end_ids=end_ids,
          batch_size=size, steps=steps, progress=progress,
      )

    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    for batch, completed in zip(batches, _map(complete, batches, workers), strict=True):
      for (i, sample), row_tokens, row_logprobs in zip(batch, *completed, strict=True):
        results[i].append(Completion(
            prompt=prompts[i], sample=sample, text=tokenizer.decode(row_tokens), prompt_tokens=encoded[i],
            tokens=tuple(row_tokens), logprobs=tuple(row_logprobs), finished=row_tokens[-1] in end_ids,
            spent=Spent(prefilled=len(encoded[i]), sampled=len(row_tokens)),
        ))
    return results

  return generate


def side_by_side() -> int:
  """How many batches to decode at once: two on a CPU where this process may use several cores, else one.

  A decode step of a small model alternates between products, which use all cores, and attention and bookkeeping, which
  use one; a second batch fills the gaps (measured on two cores: 1.6 times the tokens per second). Programs of a mesh
  stay in one order, so that their collectives meet.
  """
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  return 1 if current_mesh() is not None or jax.default_backend() != 'cpu' or cores < 2 else 2


def _map(function, items, workers: int):
  """Results in order; an exception or an interrupt cancels what has not begun."""
  if workers == 1:
    return [function(item) for item in items]
  with ThreadPoolExecutor(workers) as pool:
    return list(pool.map(function, items))


def _check_lengths(prompts, encoded, longest):
  for prompt, tokens in zip(prompts, encoded, strict=True):
    if not tokens:
      raise ValueError(f'prompt {prompt.id!r} has no tokens; there is nothing to continue')
    if len(tokens) > longest:
      raise ValueError(
          f'prompt {prompt.id!r} has {len(tokens)} tokens, but config.max_length - max_new_tokens leaves room for '
          f'{longest}; shorten it, or change one of the two'
      )


def _check_rope(scaling: RopeScaling, prompts, encoded, new_tokens: int):
  """LongRoPE turns a text of more than original_length tokens by other angles from its first token on: keys that are in
  the cache when a completion crosses the border would be of the other kind.
  """
  if scaling.kind != 'longrope':
    return
  for prompt, tokens in zip(prompts, encoded, strict=True):
    if len(tokens) - 1 <= scaling.original_length < len(tokens) + new_tokens - 1:
      raise ValueError(
          f'prompt {prompt.id!r} has {len(tokens)} tokens; with max_new_tokens={new_tokens} its completion would cross '
          f'{scaling.original_length}, where LongRoPE changes all angles; shorten it, or prompt with more than that'
      )
