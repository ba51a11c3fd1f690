"""Records that cross module borders. Plain containers: no behaviour, no jax import.

Dimension letters: B batch, T time, P prompts, G group size, V vocabulary.
A record of arrays is a pytree (NamedTuple); a record of the host is a frozen dataclass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Array = Any  # numpy.ndarray on the host, jax.Array on the device.
Params = Mapping[str, Any]


class Mean(NamedTuple):
  """A mean not yet divided: totals and counts add over microbatches, devices and hosts."""

  total: Array
  count: Array


class Max(NamedTuple):
  """A metric whose parts combine by maximum."""

  value: Array


class Batch(NamedTuple):
  """Packed next-token examples; every field is [B, T].

  inputs/targets are already shifted (only `data.packing` shifts). loss_mask is 1 where the target is supervised.
  positions restart at 0 in every segment. segment_ids count from 1 within a row; 0 is padding. sources: which data set
  of a mix a token is from, counted from 0; None where there is one data set.
  """

  inputs: Array
  targets: Array
  loss_mask: Array
  positions: Array
  segment_ids: Array
  sources: Array | None = None


class Outcomes(NamedTuple):
  """What came of completions, for metrics alone; fields are [B].

  lengths: sampled tokens. finished: 0 where the length limit cut it. right, wrong: by the task's grade, both 0 where
  there is none. parts: {name: (value, 1 where it is known)} of a weighted reward. drawn: {name: its share of a total
  over all that was sampled for the step}, kept or dropped.
  """

  lengths: Array
  finished: Array
  right: Array
  wrong: Array
  parts: Mapping[str, tuple[Array, Array]]
  drawn: Mapping[str, Array]


class Rollouts(NamedTuple):
  """Completions of the student, one a row, as a batch with what on-policy objectives need.

  batch: fields [B, T]; loss_mask is 1 on tokens that the model sampled.
  sampler_logprobs, old_logprobs, advantages, reference_logprobs: [B, T]. rewards, valid, group: [B].
  valid is 0 where a completion cannot be scored; group numbers the prompts. sampled: [B], 0 on rows that a data set
  put beside what the student wrote; None where it wrote all of them. outcomes: for metrics. Unused fields are None.
  """

  batch: Batch
  sampler_logprobs: Array
  advantages: Array | None = None
  rewards: Array | None = None
  valid: Array | None = None
  group: Array | None = None
  old_logprobs: Array | None = None
  reference_logprobs: Array | None = None
  values: Array | None = None
  returns: Array | None = None
  sampled: Array | None = None
  outcomes: Outcomes | None = None


class Pairs(NamedTuple):
  """Completions in pairs, one a row: rows 2i and 2i + 1 are the chosen and the rejected one of pair i.

  batch: fields [B, T]; loss_mask is 1 on tokens of completions. weights: [B], alike within a pair, 0 where a pair says
  nothing. mismatched: prompts with completions of another pair, [B, T]. rewards: [B], the mean of the group that a row
  was chosen from; sampled: [B], completions that were sampled for it. Unused fields are None.
  """

  batch: Batch
  weights: Array
  mismatched: Batch | None = None
  rewards: Array | None = None
  sampled: Array | None = None


class CachedBatch(NamedTuple):
  """A Batch with what a cached teacher predicts at its supervised positions; what stands elsewhere means nothing.

  known: ids int32 [B, T, k], ascending; logprobs float32 [B, T, k]; tail float32 [B, T], the mass of all other tokens.
  """

  batch: Batch
  known: Mapping[str, Array]


class TrainState(NamedTuple):
  """step: int32 scalar; params: {'model': ..., 'projectors': ...}; opt_state: optax; ema: like params, or None."""

  step: Array
  params: Params
  opt_state: Any
  ema: Params | None = None


class Objective(NamedTuple):
  """What a recipe minimises.

  terms(params, batch, frozen, rng) -> ({term: (weight, total)}, {metric: Mean | Max}). frozen holds, beside the
  recipe's models, 'average': the running average of params, where the run keeps one.
  denominators(batch) -> {term: count}, from masks alone, on the global batch.
  The loss is the sum over terms of weight * total / count.
  resolved: what a run prints at its start (estimator, denominator, mask rule, temperature).
  prepare(batch, step) -> what terms and denominators get in the batch's place, made of the global batch before it is
  split: scheduled weights, counts of other masks. Leaves keep their rows in front. None leaves the batch as it is.
  indivisible: why the batch cannot be split into microbatches; '' where it can.
  group: rows that follow each other and share work; a microbatch holds them side by side where it can.
  """

  terms: Callable[..., tuple[dict[str, tuple[Any, Any]], dict[str, Mean | Max]]]
  denominators: Callable[[Any], dict[str, Array]]
  resolved: Mapping[str, Any]
  prepare: Callable[[Any, Any], Any] | None = None
  indivisible: str = ''
  group: int = 1


class Source(NamedTuple):
  """Where batches come from.

  next(params, step) -> Batch | CachedBatch | Rollouts | Pairs; a data set ignores params, a rollout source samples with
  them and keeps no reference to them past the call.
  get_state() -> JSON-serialisable cursor; set_state(state) restores it exactly.
  """

  next: Callable[[Params, int], Any]
  get_state: Callable[[], Any]
  set_state: Callable[[Any], None]


class Recipe(NamedTuple):
  """A recipe = objective + source + frozen models ({name: (TransformerConfig, params)}) + extra parameters.

  extra_params(rng) -> {'projectors': ...}: parameters trained beside the model; None where there are none.
  """

  objective: Objective
  source: Source
  frozen: Mapping[str, tuple[Any, Params]]
  extra_params: Callable[[Array], Params] | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
  """One problem of a task.

  answer: canonical string. rationale: worked solution, one step a line, without the final answer line.
  metadata: whatever the task's grader needs, plus 'steps' (number of reasoning steps) where known.
  """

  id: str
  question: str
  answer: str
  rationale: str | None = None
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Prompt(NamedTuple):
  """What a completion continues. The id seeds its sampling, whatever batch it lands in.

  tokens: ids of `text` where they are not its plain encoding: of a rendered chat, or after a bos.
  opening: with tokens, the end of `text` that stands after them, with which the completion is made to begin.
  """

  id: str
  text: str
  tokens: tuple[int, ...] = ()
  opening: str = ''


class Spent(NamedTuple):
  """Tokens that one answer cost: prefilled and sampled by the student, scored by another model."""

  prefilled: int = 0
  sampled: int = 0
  scored: int = 0


@dataclasses.dataclass(frozen=True)
class Completion:
  """One sampled completion of one prompt.

  prompt: the text that it continues, with whatever a strategy added to it. tokens: sampled ids, with the end-of-text id
  when it was sampled. logprobs: same length, at the sampling temperature, before top-k / top-p truncation.
  finished: False where the length limit cut it. spent: all tokens behind it, discarded siblings included.
  """

  prompt: Prompt
  sample: int
  text: str
  prompt_tokens: tuple[int, ...]
  tokens: tuple[int, ...]
  logprobs: tuple[float, ...]
  finished: bool
  spent: Spent = Spent()


# (prompts, sampling) -> one list of `sampling.samples` completions a prompt. Strategies map Generate to Generate.
Generate = Callable[[Sequence[Prompt], 'SamplingParams'], list[list[Completion]]]


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """How to sample. temperature 0 is greedy; top_k 0 and top_p 1 switch the truncations off."""

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  max_new_tokens: int = 128
  samples: int = 1
  seed: int = 0
