"""What a run samples now: its own prompts, rewards and advantages, and a reference to compare it with."""

import numpy as np
import pytest

from configs import base
from srm_jax import checkpoints, rollout_view
from srm_jax.data import tokenizer
from srm_jax.inference.score import make_scorer
from srm_jax.losses.advantages import group_relative
from srm_jax.models.config import TransformerConfig
from srm_jax.rollout import subsample
from srm_jax.schema import ConfigError, resolve
from srm_jax.train import train
from srm_jax.types import Completion, Prompt
from tests import tiny
from tests.tiny import one_device, tiny_tasks  # noqa: F401

BYTES = tokenizer.load('byte')
MODEL = TransformerConfig(258, 1, 16, 2, 2, 8, 32, max_length=64)


def as_trained(workdir, config, *, seed=0):
  """The workdir of a run of this config with the random parameters of a seed, at step 7."""
  tiny.write_model(workdir, MODEL, seed=seed)
  checkpoints.claim(workdir, {key: value for key, value in resolve(config).items() if key != 'progress'})
  return workdir


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return as_trained(tmp_path_factory.mktemp('grpo'), tiny.grpo(), seed=1)


@pytest.fixture(scope='module')
def seen(run):
  return rollout_view.view(run, prompts=2, samples=4)


def all_samples(view):
  return [sample for group in view.groups for sample in group.samples]


def test_prompts_and_grades_are_those_of_the_step(seen):
  problems = subsample(tiny.PARITY.problems('train', count=12, seed=1), 2, seed=1, step=7)
  assert seen.step == 7 and [group.prompt for group in seen.groups] == [f'{one.question}\n' for one in problems]
  for group, problem in zip(seen.groups, problems):
    assert group.answer == problem.answer and len(group.samples) == 4
    for sample in group.samples:
      assert sample.reward == sample.grade == tiny.PARITY.grade(problem, sample.text)
  assert {sample.reward for sample in all_samples(seen)} == {0.0, 1.0, None}


def test_values_belong_to_the_tokens_of_the_completion(run, seen):
  score = make_scorer(MODEL, checkpoints.load_model(run).params, BYTES)
  assert {sample.finished for sample in all_samples(seen)} == {False, True}
  for group in seen.groups:
    for sample in group.samples:
      assert BYTES.decode(sample.ids) == sample.text and 1 <= len(sample.ids) <= 8
      assert sample.finished == (sample.ids[-1] == BYTES.eos_id) and (sample.finished or len(sample.ids) == 8)
      prompt = Prompt('', group.prompt)
      ids = tuple(BYTES.encode(group.prompt))
      logprobs, = score([Completion(prompt, 0, sample.text, ids, sample.ids, (), True)])
      np.testing.assert_allclose(sample.logprobs, logprobs, atol=1e-4)
      assert sample.entropy.shape == logprobs.shape and np.all((sample.entropy > 0) & (sample.entropy < np.log(258)))
      assert sample.reference is None


def test_advantages_are_those_that_the_run_trains_on(seen):
  for group in seen.groups:
    rewards = np.array([[sample.reward or 0.0 for sample in group.samples]], np.float32)
    valid = np.array([[sample.reward is not None for sample in group.samples]], np.float32)
    for sample, advantage in zip(group.samples, group_relative(rewards, valid=valid)[0]):
      np.testing.assert_allclose(sample.advantages, np.full(len(sample.ids), advantage), rtol=1e-5)


@pytest.mark.parametrize('kl, reference', [(0.1, 'reference'), (0.0, 'start ')])
def test_the_reference_is_that_of_the_penalty_or_the_start(tmp_path, kl, reference):
  """Parameters like the reference's have log-ratio 0, others have not."""
  start = tiny.write_model(tmp_path / 'start', MODEL)
  recipe = base.grpo(tiny.data('parity'), tiny.rollouts(temperature=0.7), kl=kl, reference=start)
  for seed in (0, 1):
    workdir = as_trained(tmp_path / str(seed), tiny.train(recipe, init_from=start), seed=seed)
    view = rollout_view.view(workdir, prompts=2, samples=4)
    assert view.reference.startswith(reference) and view.temperature == 0.7
    ratios = np.concatenate([sample.logprobs - sample.reference for sample in all_samples(view)])
    assert np.abs(ratios).max() < 1e-5 if seed == 0 else np.abs(ratios).max() > 1e-2


def test_distillation_on_samples_is_compared_with_its_teacher(tmp_path):
  """Rows of a data set beside the samples are left out."""
  teacher = tiny.write_model(tmp_path / 'teacher', MODEL)
  recipe = base.on_policy_distill(
      teacher, tiny.data('parity'), tiny.rollouts(), base.distillation('reverse_kl'),
      mixing=base.mixing(tiny.data(), tiny.batch(2, 32), mix='both'),
  )
  view = rollout_view.view(as_trained(tmp_path / 'run', tiny.train(recipe)), prompts=2, samples=4)
  assert view.reference == 'teacher' and [len(group.samples) for group in view.groups] == [4, 4]


def test_all_that_is_drawn_is_shown(tmp_path):
  """Parts of the reward; groups that would be dropped or cut into minibatches; completions without loss; the values of
  a critic; a reference inside the reward.
  """
  start = tiny.write_model(tmp_path / 'start', MODEL, seed=1)
  recipe = base.policy_gradient(
      tiny.data('sums'), tiny.rollouts(cut='mask', dynamic=dict(prompts=2, rounds=1), patience=1), epochs=2,
      rewards={'task': base.reward('task'), 'form': base.reward('format', 0.5)}, advantage=base.choice('gae'),
      critic=dict(coef=0.1, clip=None), kl=0.1, place='reward', estimator='k1', reference=start,
  )
  config = tiny.train(recipe, num_steps=2, init_from=start)
  with pytest.raises(ConfigError, match='for 1 steps in a row'):
    train(config, tmp_path / 'run')
  recipe.rollouts.patience = 0
  train(config, tmp_path / 'other')
  view = rollout_view.view(tmp_path / 'other', prompts=2, samples=4)
  assert [len(group.samples) for group in view.groups] == [4, 4] and view.reference == 'reference'
  for sample in all_samples(view):
    assert sample.parts.keys() == {'task', 'form'} and sample.reward == sample.grade == 0
    assert len(sample.reference) == len(sample.ids) == len(sample.advantages)
    assert sample.finished or not sample.advantages.any()


def test_a_group_without_loss_has_the_longest_prompt_that_fits():
  batch = tiny.random_batch(rows=2)
  row = batch.inputs[0].tolist()
  problems = {tuple(row[:2]): None, tuple(row[:3]): None, (0, *row[1:5]): None}
  asked = rollout_view._Asked(None, problems)
  assert rollout_view._prompt_length(batch._replace(loss_mask=0 * batch.loss_mask), asked) == 3
  first = int(np.flatnonzero(batch.loss_mask[0])[0])
  assert rollout_view._prompt_length(batch, asked) == first + 1


def test_what_does_not_sample_is_refused(tmp_path, run):
  with pytest.raises(ConfigError, match='is no run'):
    rollout_view.view(tmp_path)
  with pytest.raises(ConfigError, match="its recipe 'sft' has no rollouts"):
    rollout_view.view(as_trained(tmp_path / 'sft', tiny.sft()))
  with pytest.raises(ConfigError, match=r'keeps no checkpoint of step 3; choose from \[7\]'):
    rollout_view.view(run, step=3)
  recipe = base.on_policy_distill(
      str(run), tiny.data('parity'), tiny.rollouts(), base.distillation('reverse_kl'),
      mixing=base.mixing(tiny.data(), tiny.batch(2, 32), fraction=0.0),
  )
  with pytest.raises(ConfigError, match='step 7 of .* learns from no rewarded samples'):
    rollout_view.view(as_trained(tmp_path / 'data', tiny.train(recipe)))
