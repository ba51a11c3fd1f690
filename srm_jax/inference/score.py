"""Log-probabilities of given completions under a model, by one teacher-forced forward pass."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from srm_jax.data.prompting import prompt_ids
from srm_jax.inference import decode
from srm_jax.losses import cross_entropy, lm_head
from srm_jax.models import heads, transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.sharding import constrain, current_mesh
from srm_jax.types import Completion, Params

# How the log-probabilities of a completion become one score. A completion without tokens scores -inf: nothing chose it.
REDUCTIONS: dict[str, Callable[[np.ndarray], float]] = {
    'mean': lambda logprobs: float(np.mean(logprobs)) if len(logprobs) else -np.inf,
    'min': lambda logprobs: float(np.min(logprobs)) if len(logprobs) else -np.inf,
    'sum': lambda logprobs: float(np.sum(logprobs)) if len(logprobs) else -np.inf,
}


def make_scorer(
    config: TransformerConfig, params: Params, tokenizer, *, batch_size: int = 64, temperature: float = 1.0
) -> Callable[[Sequence[Completion]], list[np.ndarray]]:
  """A scorer for one set of parameters: log p(token | prompt, tokens before), end-of-text included.

  Args:
    params: the scoring model's parameters; a copy in the compute dtype is taken.
    tokenizer: the scoring model's; completions must have been sampled with an equal one.
    batch_size: completions per forward pass.
    temperature: divides the logits.

  Returns:
    score(completions) -> one float32 array a completion, as long as its tokens. It raises ValueError, with the prompt
    id, on a completion of another tokenizer and on one longer than config.max_length.
  """
  cast = jax.jit(transformer.cast, static_argnums=1)(params, config.dtype)

  logprobs = lambda *arrays: _logprobs(config, cast, *arrays, temperature=temperature)
  return functools.partial(
      token_values, logprobs, tokenizer=tokenizer, max_length=config.max_length, batch_size=batch_size
  )


def token_values(
    compute: Callable[..., jax.Array], completions: Sequence[Completion], *, tokenizer, max_length: int,
    batch_size: int,
) -> list[np.ndarray]:
  """One float32 array a completion, as long as its tokens, in order; checks, sorts by length and batches.

  Args:
    compute: (prompts [B, W + 1] padded on the left, their lengths [B], completions [B, N] padded on the right) ->
      [B, N].
    tokenizer, max_length: of the model behind `compute`.

  Raises:
    ValueError: a completion of another tokenizer, or one that is too long with its prompt.
  """
  for completion in completions:
    _check(completion, tokenizer, max_length)
  order = sorted(range(len(completions)), key=lambda i: _length(completions[i]))
  values: list[np.ndarray] = [np.zeros(0, np.float32)] * len(completions)
  for start in range(0, len(order), batch_size):
    batch = order[start : start + batch_size]
    arrays = _arrays([completions[i] for i in batch], decode.batch_bucket(len(batch), batch_size))
    for i, row in zip(batch, np.asarray(compute(*arrays))):
      values[i] = row[: len(completions[i].tokens)]
  return values


def _length(completion):
  return len(completion.prompt_tokens) + len(completion.tokens)


def _check(completion, tokenizer, max_length):
  name = f'completion {completion.sample} of prompt {completion.prompt.id!r}'
  if prompt_ids(tokenizer, completion.prompt) != tuple(completion.prompt_tokens):
    raise ValueError(
        f'{name} was sampled with another tokenizer than the scorer has; score it with a model that shares it'
    )
  if _length(completion) > max_length:
    raise ValueError(f'{name} has {_length(completion)} tokens with its prompt; the scorer has max_length={max_length}')


def _arrays(completions, count):
  """What `compute` of `token_values` takes."""
  prompts, lengths = decode.pad_left([completion.prompt_tokens for completion in completions], count)
  width = decode.bucket(max(len(completion.tokens) for completion in completions))
  tokens = np.zeros((count, width), np.int32)
  for row, completion in zip(tokens, completions):
    row[: len(completion.tokens)] = completion.tokens
  return prompts, lengths, tokens


@functools.partial(jax.jit, static_argnames=('config', 'temperature'))
def _logprobs(config, params, prompts, lengths, tokens, *, temperature):
  """float32 [B, N]: the last prompt token and the N - 1 first completion tokens predict the N completion tokens."""
  hidden = hidden_states(config, params, prompts, lengths, tokens[:, :-1])[:, prompts.shape[1] - 1 :]
  fn = functools.partial(_token_logprobs, temperature=temperature)
  head = lm_head.Head(hidden, heads.unembedding(params))
  return constrain(lm_head.per_token(fn, head, tokens, mesh=current_mesh())['logprobs'], None, None)


def hidden_states(config, params, prompts, lengths, tokens):
  """[B, W + 1 + N, D] of prompts padded on the left and what follows them."""
  inputs = jnp.concatenate([prompts, tokens], axis=1)
  positions = jnp.arange(inputs.shape[1])[None] - (prompts.shape[1] - lengths)[:, None]
  segments = (positions >= 0).astype(jnp.int32)
  return transformer.Transformer(config).apply(
      transformer.variables(params), inputs, positions=jnp.maximum(positions, 0), segment_ids=segments, logits_at=()
  ).hidden


def _token_logprobs(logits, teacher_logits, targets, *, temperature, axis_name):
  del teacher_logits
  return {'logprobs': cross_entropy.token_logprobs(logits, targets, temperature=temperature, axis_name=axis_name)}
