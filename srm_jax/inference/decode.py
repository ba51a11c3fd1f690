"""Prefill and decode under jit: one batch of prompts becomes tokens and log-probabilities.

Prompts are padded on the left, so that all rows write the same cache slot. Prefill covers all but the last prompt
token; every decode step feeds one token and samples the next, so the first sampled token is like any other. A call
decodes up to STEPS tokens in a `while_loop` that ends when every row is done; between calls the host grows the cache
and drops finished rows. Shapes come from short series of buckets and every jitted function takes the parameters as
an argument: new parameters, prompts and temperatures reuse the compiled programs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from srm_jax.inference import logits as sampler
from srm_jax.models import adapters, transformer
from srm_jax.models import cache as kv
from srm_jax.models.config import TransformerConfig
from srm_jax.sharding import constrain
from srm_jax.types import Params, SamplingParams

STEPS = 32  # decode steps per jitted call
NOT_EMITTED = -1


class Decoding(NamedTuple):
  """Rows in flight. token [B]: next input; position [B]: where it stands; keys uint32 [B, 2]; done bool [B]."""

  cache: kv.Cache
  token: jax.Array
  position: jax.Array
  keys: jax.Array
  done: jax.Array


def bucket(length: int, *, smallest: int = 16) -> int:
  """The smallest of 16, 24, 32, 48, 64, 96, ... that is >= length: few shapes, at most half again as much work."""
  size = smallest
  while size < length:
    if size + size // 2 >= length:
      return size + size // 2
    size *= 2
  return size


def batch_bucket(rows: int, largest: int) -> int:
  """`largest` halved (at most twice) while `rows` still fit: full batches, and smaller ones for what is left."""
  for parts in (4, 2):
    if largest % parts == 0 and rows <= largest // parts:
      return largest // parts
  return largest


def prepare(config: TransformerConfig, params: Params) -> Params:
  """A copy to decode with: compute dtype, layers unstacked, gathered over 'fsdp' and split over 'tensor' alone.

  Decoding reads every weight at every step; gathering them once here keeps collectives out of the loop. The copy
  shares nothing with `params`, which a train step may donate afterwards.

  Adapters are merged into the copy, and quantised matrices made whole: a step then costs what it costs without, for
  one more stack of layers while the copy is made, the memory of dense weights, and a rounding to the compute dtype
  that the trainer does not have (below it, a bfloat16 sampler does not see a small change of a large weight).
  """
  merged = dict(merge(config, params))
  stacked = merged.pop('layers')
  # A layer at a time: gathered as one stack and then split, all weights would be there twice.
  layers = tuple(gather_layer(config, stacked, np.int32(layer)) for layer in range(config.num_layers))
  return {**_gather_rest(config, merged), 'layers': layers}


def copy_names(config: TransformerConfig):
  """Logical axis names of the copy, in its structure: what 'fsdp' splits is whole."""
  whole = lambda names: PartitionSpec(*(None if name == 'embed' else name for name in names))
  names = jax.tree.map(whole, transformer.param_names(config))
  layer = jax.tree.map(lambda stacked: PartitionSpec(*stacked[1:]), names['layers'])
  return {**names, 'layers': (layer,) * config.num_layers}


@functools.partial(jax.jit, static_argnames='config')
def merge(config: TransformerConfig, params: Params) -> Params:
  """Dense weights in the compute dtype, stacked, where the parameters are."""
  return transformer.cast(adapters.merge(config, params, dtype=config.dtype), config.dtype)


@functools.partial(jax.jit, static_argnames='config')
def gather_layer(config: TransformerConfig, stacked, layer):
  """One layer of the stack, gathered over 'fsdp'."""
  own = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), stacked)
  return _constrained(own, copy_names(config)['layers'][0])


@functools.partial(jax.jit, static_argnames='config')
def _gather_rest(config, params):
  names = copy_names(config)
  return {name: _constrained(tree, names[name]) for name, tree in params.items()}


def _constrained(tree, names):
  return jax.tree.map(lambda leaf, axes: constrain(leaf, *axes, *(None,) * (leaf.ndim - len(axes))), tree, names)


@functools.partial(jax.jit, static_argnames=('config', 'size'))
def prefill(config: TransformerConfig, params: Params, prompts, lengths, rows, keys, *, size: int) -> Decoding:
  """Runs all but the last token of each prompt, once per distinct prompt.

  Args:
    prompts: int [U, W + 1], padded on the left; lengths: int [U], 0 for a dummy.
    rows: int [B], which prompt each row continues; keys: uint32 [B, 2].
    size: slots of the cache, >= W.

  Returns:
    Decoding of B rows; rows of a dummy prompt are done.
  """
  width = prompts.shape[1] - 1
  positions = jnp.arange(width)[None] - (width + 1 - lengths)[:, None]
  segments = (positions >= 0).astype(jnp.int32)
  cache = kv.init_cache(config, prompts.shape[0], width)
  model = transformer.Transformer(config)
  cache = model.apply(
      {'params': params}, prompts[:, :-1], positions=jnp.maximum(positions, 0), segment_ids=segments, cache=cache,
      logits_at=(),
  ).cache
  lengths = lengths[rows]
  return _constrain(Decoding(
      kv.grow(_take(cache, rows), size), prompts[rows, -1], lengths - 1, keys, lengths == 0,
  ))


def _take(cache, rows):
  return cache._replace(**{
      name: jax.tree.map(lambda leaf: leaf[rows], getattr(cache, name)) for name in ('keys', 'values', 'segment_ids')
  })


def _constrain(state: Decoding) -> Decoding:
  def rows(leaf):
    names = ('batch', 'act_heads') if leaf.ndim == 4 else ('batch',) * min(leaf.ndim, 1)
    return constrain(leaf, *names, *(None,) * (leaf.ndim - len(names)))

  return jax.tree.map(rows, state)


@functools.partial(jax.jit, static_argnames='size')
def grow(state: Decoding, *, size: int) -> Decoding:
  """The same rows with room for `size` slots."""
  return _constrain(state._replace(cache=kv.grow(state.cache, size)))


@jax.jit
def _compact(state: Decoding, rows, vacant) -> Decoding:
  """Rows in a new order and number; vacant bool [B'] marks those that only fill the batch."""
  token, position, keys, done = (leaf[rows] for leaf in state[1:])
  return _constrain(Decoding(_take(state.cache, rows), token, position, keys, done | vacant))


@functools.partial(jax.jit, static_argnames=('config', 'top_k', 'top_p', 'steps'), donate_argnames='state')
def decode(config: TransformerConfig, params: Params, state: Decoding, temperature, end_ids, limit, *, top_k: int,
           top_p: float, steps: int):
  """Up to min(limit, steps) tokens for every row that is not done; the cache must have room for them.

  Args:
    temperature, limit: traced scalars.
    end_ids: int32 [n]; a row is done once it has emitted one of them (-1: never).
    top_k, top_p: as in `logits.sample`.
    steps: width of the output.

  Returns:
    state, tokens int32 [B, steps] (NOT_EMITTED where a row emitted nothing), logprobs float32 [B, steps],
    done bool [B]; the three last replicated, so that every host reads all of them.
  """
  model = transformer.Transformer(config)
  rows = state.token.shape[0]
  last = jnp.zeros((rows, 1), jnp.int32)

  def step(carry):
    i, state, tokens, logprobs = carry
    out = model.apply(
        {'params': params}, state.token[:, None], positions=state.position[:, None],
        segment_ids=jnp.ones((rows, 1), jnp.int32), cache=state.cache, logits_at=last,
    )
    position = state.position + 1
    token, logprob = sampler.sample(
        constrain(out.logits[:, 0], 'batch', None), sampler.uniforms(state.keys, position),
        temperature=temperature, top_k=top_k, top_p=top_p,
    )
    emitted = jnp.where(state.done, NOT_EMITTED, token)
    tokens = jax.lax.dynamic_update_slice(tokens, emitted[:, None], (0, i))
    logprobs = jax.lax.dynamic_update_slice(logprobs, jnp.where(state.done, 0.0, logprob)[:, None], (0, i))
    done = state.done | jnp.any(token[:, None] == end_ids[None], axis=1)
    state = Decoding(out.cache, token, position, state.keys, done)
    return i + 1, state, tokens, logprobs

  def unfinished(carry):
    return (carry[0] < jnp.minimum(limit, steps)) & ~jnp.all(carry[1].done)

  empty = jnp.full((rows, steps), NOT_EMITTED, jnp.int32), jnp.zeros((rows, steps), jnp.float32)
  _, state, tokens, logprobs = jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), state, *empty))
  return _constrain(state), *(constrain(x, *(None,) * x.ndim) for x in (tokens, logprobs, state.done))


def pad_left(prompts: Sequence[Sequence[int]], count: int) -> tuple[np.ndarray, np.ndarray]:
  """Prompts as int32 [count, W + 1], W a bucket, with their lengths [count]; rows past the prompts are dummies."""
  width = bucket(max(len(prompt) for prompt in prompts) - 1) + 1
  tokens, lengths = np.zeros((count, width), np.int32), np.zeros(count, np.int32)
  for i, prompt in enumerate(prompts):
    tokens[i, width - len(prompt) :], lengths[i] = prompt, len(prompt)
  return tokens, lengths


def complete(
    config: TransformerConfig, params: Params, prompts: Sequence[Sequence[int]], rows: np.ndarray, keys: np.ndarray,
    sampling: SamplingParams, *, end_ids: Sequence[int], batch_size: int, steps: int = STEPS,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[list[int]], list[list[float]]]:
  """Continues prompts until end-of-text or `max_new_tokens`.

  Args:
    params: from `prepare`.
    prompts: U distinct prompts, none of them empty.
    rows: int [R], which prompt each row continues, R <= batch_size; keys: uint32 [R, 2] from `logits.row_keys`.
    sampling: `samples` and `seed` are already in rows and keys.
    end_ids: each ends a row; (-1,) lets all rows run to the limit.
    progress: called with the number of new tokens after every `steps` steps.

  Returns:
    Tokens and log-probabilities of each row; an end-of-text token that was sampled is its last.
  """
  state, owner, used = _start(config, params, prompts, rows, keys, batch_size, min(steps, sampling.max_new_tokens))
  temperature, top_k, top_p = sampler.greedy_or_given(sampling)
  tokens, logprobs = [[] for _ in rows], [[] for _ in rows]
  remaining = sampling.max_new_tokens
  while remaining and (owner >= 0).any():
    count = min(steps, remaining)
    if used + count > state.cache.segment_ids.shape[1]:
      state = grow(state, size=bucket(used + count))
    state, *new = decode(
        config, params, state, np.float32(temperature), np.asarray(end_ids, np.int32), np.int32(count), top_k=top_k,
        top_p=top_p, steps=steps,
    )
    new_tokens, new_logprobs, done = map(np.asarray, new)
    emitted = new_tokens != NOT_EMITTED
    for slot in np.flatnonzero(owner >= 0):
      tokens[owner[slot]] += new_tokens[slot, emitted[slot]].tolist()
      logprobs[owner[slot]] += new_logprobs[slot, emitted[slot]].tolist()
    if progress is not None:
      progress(int(emitted.sum()))
    used, remaining, owner = used + count, remaining - count, np.where(done, -1, owner)
    state, owner = _drop_finished(state, owner, batch_size)
  return tokens, logprobs


def _start(config, params, prompts, rows, keys, batch_size, room):
  """(state after prefill with room for so many steps, which row each slot decodes or -1, cache slots in use)."""
  size = batch_bucket(len(rows), batch_size)
  vacant = size - len(rows)
  tokens, lengths = pad_left(prompts, batch_bucket(len(prompts) + (vacant > 0), batch_size))
  used = tokens.shape[1] - 1
  # Vacant slots continue a dummy prompt, whose length 0 makes them done from the start.
  slots = np.pad(np.asarray(rows, np.int32), (0, vacant), constant_values=len(lengths) - 1)
  keys = np.pad(keys, ((0, vacant), (0, 0)))
  state = prefill(config, params, tokens, lengths, slots, keys, size=bucket(used + room))
  return state, np.pad(np.arange(len(rows)), (0, vacant), constant_values=-1), used


def _drop_finished(state, owner, batch_size):
  """Continues in a smaller batch where the rows in flight fit into one."""
  alive = np.flatnonzero(owner >= 0)
  size = batch_bucket(len(alive), batch_size)
  if len(alive) == 0 or size == len(owner):
    return state, owner
  vacant = size - len(alive)
  state = _compact(state, np.pad(alive, (0, vacant)), np.arange(size) >= len(alive))
  return state, np.pad(owner[alive], (0, vacant), constant_values=-1)
