"""A reward model inside a reward: its probabilities, beside other parts, and what does not fit."""

import json
import pathlib

import jax
import numpy as np
import pytest

from configs import base
from srm_jax import checkpoints, schema
from srm_jax.data import prompting, tokenizer
from srm_jax.inference import make_generate
from srm_jax.inference.reward_scores import make_reward_scorer, reduced
from srm_jax.models import heads
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import on_policy, policy_gradient
from srm_jax.recipes.context import Context, DataConfig
from srm_jax.rollout import rollout
from srm_jax.types import SamplingParams
from tests import tiny
from tests.tiny import tiny_tasks  # noqa: F401

MODEL = TransformerConfig(258, 1, 16, 2, 2, 8, 32, max_length=64)
CONTEXT = Context(MODEL, tokenizer.load('byte'), 1, 10)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """An outcome model with a random head."""
  path = tmp_path_factory.mktemp('reward')
  recipe = base.reward_model(tiny.data(), tiny.batch(), target='outcome')
  (path / 'config.json').write_text(json.dumps({'recipe': recipe.to_dict(), 'adapters': {'rank': 0}}))
  head = heads.init_value_head(jax.random.key(3), 16)
  return tiny.write_model(path, MODEL, seed=1, scale=3.0, extra={'value_head': head})


def test_its_probability_is_a_part_of_the_reward(folder):
  data = schema.parse(DataConfig, tiny.data('parity'), 'data')
  parts = dict(task=base.reward('task', 0.5), judge=base.reward('model', 2.0, folder=folder, score='last'))
  grading, models = on_policy.open_rewards(parts, data, CONTEXT)
  assert set(models) == {'reward/judge'} and models['reward/judge'][0] == MODEL
  policy, judge = (checkpoints.load_model(folder) for _ in range(2))
  generate = make_generate(MODEL, policy.params, policy.tokenizer, batch_size=8)
  problems = tiny.PARITY.problems('train', count=3)
  asked = prompting.plain(tiny.PARITY, policy.tokenizer)
  groups = rollout(generate, asked, problems, SamplingParams(samples=4, max_new_tokens=6), grading=grading)
  score = make_reward_scorer(MODEL, judge.params, judge.extra['value_head'], judge.tokenizer)
  logits = np.array([row[-1] for row in score([one.completion for group in groups for one in group])])
  expected = 1 / (1 + np.exp(-logits))
  assert expected.std() > 0.01
  rows = [one for group in groups for one in group]
  np.testing.assert_allclose([one.parts['judge'] for one in rows], expected, rtol=1e-4)
  for one, probability in zip(rows, expected, strict=True):
    if one.correct is None:
      assert one.reward is None
    else:
      assert one.reward == pytest.approx(0.5 * one.correct + 2 * probability, rel=1e-4)
  assert reduced('last', score([rows[0].completion])) == pytest.approx([np.log(expected[0])], rel=1e-4)


def test_a_run_names_it_among_its_frozen_models(folder):
  """So that a resumed run finds out that it has changed."""
  rewards = dict(judge=base.reward('model', folder=folder, score='last'))
  section = base.policy_gradient(tiny.data('parity'), tiny.rollouts(), rewards=rewards)
  frozen = policy_gradient.build(section, CONTEXT).frozen
  assert 'value_head' in frozen['reward/judge'][1]


@pytest.mark.parametrize('options, message', [
    (dict(score='last'), 'folder is missing'), (dict(folder='{}', score='best'), "score 'best' unknown"),
    (dict(folder='{}/..', score='last'), 'holds no run of recipe reward_model; train one first'),
])
def test_what_is_no_reward_model_is_refused(folder, options, message):
  options = {key: value.format(pathlib.Path(folder)) for key, value in options.items()}
  data = schema.parse(DataConfig, tiny.data('parity'), 'data')
  with pytest.raises(schema.ConfigError, match=message):
    on_policy.open_rewards(dict(judge=base.reward('model', **options)), data, CONTEXT)
