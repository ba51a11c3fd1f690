"""Prompts to completions: encodes, checks, sorts by length, batches, and puts the results back in order."""

from collections.abc import Callable, Sequence

from srm_jax.inference import decode
from srm_jax.inference import logits as sampler
from srm_jax.models.config import TransformerConfig
from srm_jax.types import Completion, Generate, Params, Prompt, SamplingParams, Spent


def make_generate(
    config: TransformerConfig, params: Params, tokenizer, *, batch_size: int = 64, steps: int = decode.STEPS,
    stop_at_eos: bool = True, progress: Callable[[int], None] | None = None,
) -> Generate:
  """A sampler for one set of parameters.

  Programs are compiled per shape and kept for the process: a second sampler of the same config, with new parameters,
  compiles nothing. Make and call it under the same `jax.set_mesh`; rows are then split over the token axes. Results
  do not depend on how prompts fall into batches, up to the rounding of products of different shapes.

  Args:
    params: the model's parameters; a cast copy is taken, and they are not kept.
    tokenizer: a `data.tokenizer.Tokenizer` (encode, decode, eos_id).
    batch_size: completions decoded at a time.
    steps: decode steps between looks of the host at what is finished.
    stop_at_eos: False lets every completion run to max_new_tokens, for timing.
    progress: called with the number of tokens sampled since the last call.

  Returns:
    generate(prompts, sampling) -> one list of `sampling.samples` completions a prompt. It raises ValueError on an
    empty prompt, on one longer than config.max_length - max_new_tokens, and on impossible sampling parameters.
  """
  prepared = decode.prepare(config, params)
  eos_id = tokenizer.eos_id if stop_at_eos else decode.NOT_EMITTED

  def generate(prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Completion]]:
    sampler.check(sampling)
    encoded = [tuple(tokenizer.encode(prompt.text)) for prompt in prompts]
    _check_lengths(prompts, encoded, config.max_length - sampling.max_new_tokens)
    by_length = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    rows = [(i, sample) for i in by_length for sample in range(sampling.samples)]
    results: list[list[Completion]] = [[] for _ in prompts]
    for start in range(0, len(rows), batch_size):
      batch = rows[start : start + batch_size]
      distinct = list(dict.fromkeys(i for i, _ in batch))
      tokens, logprobs = decode.complete(
          config, prepared, [encoded[i] for i in distinct], [distinct.index(i) for i, _ in batch],
          sampler.row_keys(sampling.seed, ((prompts[i].id, sample) for i, sample in batch)), sampling, eos_id=eos_id,
          batch_size=batch_size, steps=steps, progress=progress,
      )
      for (i, sample), row_tokens, row_logprobs in zip(batch, tokens, logprobs, strict=True):
        results[i].append(Completion(
            prompt=prompts[i], sample=sample, text=tokenizer.decode(row_tokens), prompt_tokens=encoded[i],
            tokens=tuple(row_tokens), logprobs=tuple(row_logprobs), finished=row_tokens[-1] == eos_id,
            spent=Spent(prefilled=len(encoded[i]), sampled=len(row_tokens)),
        ))
    return results

  return generate


def _check_lengths(prompts, encoded, longest):
  for prompt, tokens in zip(prompts, encoded, strict=True):
    if not tokens:
      raise ValueError(f'prompt {prompt.id!r} has no tokens; there is nothing to continue')
    if len(tokens) > longest:
      raise ValueError(
          f'prompt {prompt.id!r} has {len(tokens)} tokens, but config.max_length - max_new_tokens leaves room for '
          f'{longest}; shorten it, or change one of the two'
      )
