"""A trained reward model as one summand of a reward: kind 'model' of recipe.rewards.

  base.reward('model', folder='runs/process', score='min')

Its value is a probability: of an outcome model that the completion is right, of a process model what `score` makes of
those of its steps. Reference: Wang et al., Math-Shepherd, arXiv:2312.08935.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from srm_jax import checkpoints, schema
from srm_jax.inference.reward_scores import make_reward_scorer, reduced
from srm_jax.losses.reward_model import AGGREGATIONS
from srm_jax.recipes import reward_model
from srm_jax.recipes.context import Context, require_same_vocabulary
from srm_jax.rewards import Graded

KIND = 'model'


@dataclasses.dataclass(frozen=True)
class ModelRewardConfig:
  """folder: workdir of a run of recipe reward_model. score: from AGGREGATIONS, over steps; 'last' of completions."""

  folder: str
  score: str


def open_model(options: Mapping[str, Any], where: str, context: Context):
  """(fn([graded, ...]) -> probabilities, (TransformerConfig, params)) of a reward model.

  Raises:
    ConfigError: the folder holds none, its tokenizer is another one, or the score is unknown.
  """
  config = schema.parse(ModelRewardConfig, options, where)
  schema.choose(f'{where}.score', config.score, AGGREGATIONS)
  section = checkpoints.run_config(config.folder).get('recipe', {})
  if section.get('name') != 'reward_model':
    raise schema.ConfigError(f'{where}.folder {config.folder!r} holds no run of recipe reward_model; train one first')
  model = checkpoints.load_model(config.folder)
  require_same_vocabulary(f'reward model {config.folder}', model.tokenizer, 'the policy', context.tokenizer)
  score = make_reward_scorer(
      model.config, model.params, model.extra[reward_model.HEAD], model.tokenizer,
      segment=reward_model.segmentation(section),
  )

  def fn(group: Sequence[Graded]) -> list[float]:
    return np.exp(reduced(config.score, score([one.completion for one in group]))).tolist()

  return fn, (model.config, {**model.params, reward_model.HEAD: model.extra[reward_model.HEAD]})
