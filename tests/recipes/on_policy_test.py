"""Rollouts are a pure function of parameters, seed and step, and their cursor is what they were drawn from."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import base
from srm_jax import schema
from srm_jax.data import tokenizer
from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.recipes import on_policy, preference
from srm_jax.recipes.context import Context, DataConfig, load_problems
from srm_jax.rewards import Graded
from srm_jax.types import Completion
from tests import tiny
from tests.tiny import tiny_tasks  # noqa: F401

MODEL = TransformerConfig(258, 1, 16, 2, 2, 8, 32, max_length=64)
CONTEXT = Context(MODEL, tokenizer.load('byte'), 1, 10)


def make(context=CONTEXT, *, advantage=None, rollouts=None, teaches=on_policy.within_groups, **options):
  config = schema.parse(on_policy.RolloutConfig, tiny.rollouts(**(rollouts or {})), 'rollouts')
  data = schema.parse(DataConfig, tiny.data(**options), 'data')
  return on_policy.source(config, data, context, advantage=advantage, teaches=teaches)


@pytest.fixture(scope='module')
def params():
  return {'model': jax.jit(transformer.init_params, static_argnums=0)(MODEL, jax.random.key(0))}


@pytest.fixture(scope='module')
def drawn(params):
  """Steps 0, 1 and 2 of one source."""
  source = make()
  return [source.next(params, step) for step in range(3)]


def test_a_step_is_drawn_again_from_its_number_alone(params, drawn):
  again = make().next(params, 2)
  jax.tree.map(np.testing.assert_array_equal, again, drawn[2])
  assert not np.array_equal(drawn[0].batch.inputs, drawn[1].batch.inputs)
  assert drawn[0].batch.inputs.shape == (8, 12) and drawn[0].advantages is None
  other_seed = make(CONTEXT._replace(seed=2)).next(params, 2)
  assert not np.array_equal(other_seed.batch.inputs, drawn[2].batch.inputs)


def test_samples_of_a_group_share_the_prompt_and_differ_after_it(drawn):
  for group in range(2):
    rows = drawn[0].batch.inputs[drawn[0].group == group]
    assert len({tuple(row[:4]) for row in rows}) == 1 and len({tuple(row) for row in rows}) == 4


ROOM = SimpleNamespace(length=16, max_new_tokens=8)


@pytest.mark.parametrize('longest, length', [(3, 8), (8, 8), (9, 12), (12, 12), (13, 16), (16, 16), (17, 16)])
def test_rows_are_the_shortest_of_three_lengths(longest, length):
  row = lambda tokens: Graded(None, Completion(None, 0, '', (1,), (2,) * (tokens - 1), (), True), None)
  assert on_policy.row_length([[row(2)], [row(longest)]], ROOM, 0) == length


def test_rows_that_do_not_divide_over_the_hosts_are_refused(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 3)
  with pytest.raises(schema.ConfigError, match='are 8 rows a step, which do not divide over 3 hosts'):
    make()


def test_the_state_names_the_prompts():
  source = make()
  source.set_state(source.get_state())
  with pytest.raises(schema.ConfigError, match='the prompts changed since the checkpoint'):
    make(count=11).set_state(source.get_state())
  with pytest.raises(schema.ConfigError, match='the prompts changed'):
    make(CONTEXT._replace(seed=2)).set_state(source.get_state())


@pytest.mark.parametrize('context, rollouts, room', [
    (CONTEXT, dict(length=11), 11), (CONTEXT._replace(model=dataclasses.replace(MODEL, max_length=10)), dict(), 10),
])
def test_prompts_that_do_not_fit_are_refused_before_anything_is_sampled(context, rollouts, room):
  with pytest.raises(schema.ConfigError, match=f'has 4 tokens; with max_new_tokens=8 it does not fit in {room}'):
    make(context, rollouts=rollouts)
  assert make(rollouts=dict(length=12))


def test_metrics_count_what_can_be_scored():
  made = tiny.random_rollouts()
  found = on_policy.metrics(made)
  assert found['reward'].total == (made.rewards * made.valid).sum() and found['reward'].count == 7
  assert found['unscorable'].total == 1 and found['unscorable'].count == 8
  assert found['completion_tokens'].total == made.batch.loss_mask.sum()


@pytest.mark.parametrize('prompt, completion, length', [(3, 5, 8), (3, 6, 12), (6, 6, 12), (6, 7, 16), (1, 15, 16)])
def test_rows_are_no_longer_than_the_batch_needs(prompt, completion, length):
  short = SimpleNamespace(completion=SimpleNamespace(prompt_tokens=(0,), tokens=(0,)))
  longest = SimpleNamespace(completion=SimpleNamespace(prompt_tokens=(0,) * prompt, tokens=(0,) * completion))
  assert on_policy.row_length([[short, longest], [short, short]], ROOM, 0) == length


@pytest.mark.parametrize('completion, length', [(1, 9), (4, 9), (5, 11), (6, 11), (7, 13), (8, 13)])
def test_behind_prompts_of_one_width_only_completions_count(completion, length):
  row = SimpleNamespace(completion=SimpleNamespace(prompt_tokens=(0,) * 3, tokens=(0,) * completion))
  assert on_policy.row_length([[row, row]], ROOM, 5) == length


# Dynamic sampling, on completions that a fake sampler writes: no model is asked.


@pytest.fixture
def fake(monkeypatch):
  """make_generate whose completions depend on prompt, sample and seed; {'calls': prompts of each}."""
  seen = {'calls': []}

  def make_fake(config, params, tokenizer, *, batch_size):
    def generate(prompts, sampling):
      seen['calls'].append([prompt.id for prompt in prompts])
      text = lambda prompt, sample: f'{prompt.id} {sample if params(prompt, sampling.seed) else 0}'
      one = lambda prompt, sample: Completion(
          prompt, sample, text(prompt, sample), (1, 2, 3, 4), (5,) * (1 + sample), (-0.5,) * (1 + sample), sample != 3,
      )
      return [[one(prompt, sample) for sample in range(sampling.samples)] for prompt in prompts]

    return generate

  monkeypatch.setattr(on_policy, 'make_generate', make_fake)
  return seen


def policy(varied):
  """A 'model' that samples different completions where varied(prompt, seed), else the same one four times."""
  return {'model': varied}


def dynamic(prompts=3, rounds=2, **options):
  return make(rollouts=dict(dynamic=dict(prompts=prompts, rounds=rounds), **options), name='parity', count=40)


always, never = policy(lambda prompt, seed: True), policy(lambda prompt, seed: False)
sometimes = policy(lambda prompt, seed: int(prompt.id[0]) % 2 == 0)


def rewards_by_group(made):
  return [set(made.rewards[(made.group == group) & (made.valid > 0)].tolist()) for group in np.unique(made.group)]


def test_groups_that_tell_nothing_are_dropped_and_the_rest_is_carried(fake):
  source = dynamic(prompts=3, rounds=9)
  for step in range(6):
    made = source.next(sometimes, step)
    assert made.batch.inputs.shape[0] == 8
    assert all(len(rewards) == 2 for rewards in rewards_by_group(made))
  drawn = [prompt for call in fake['calls'] for prompt in call]
  carried = [group['problem'] for group in source.get_state()['carried']]
  assert len(drawn) < 40 and len(set(drawn)) == len(drawn)  # every problem once before any comes again
  assert 12 + len(carried) <= sum(int(prompt[0]) % 2 == 0 for prompt in drawn)
  assert set(carried) <= set(drawn[-9:])


def test_what_is_carried_needs_no_sampling(fake):
  source = dynamic(prompts=8, rounds=1)
  source.next(always, 0)
  calls, carried = len(fake['calls']), len(source.get_state()['carried'])
  assert carried >= 2  # six of eight groups at most are left over; a parity group may be of one kind by chance
  source.next(always, 1)
  assert len(fake['calls']) == calls


def test_a_step_that_cannot_be_filled_carries_no_loss_on_what_fills_it(fake):
  source = dynamic(prompts=3, rounds=2)
  made = source.next(never, 0)
  assert len(fake['calls']) == 2 and made.batch.inputs.shape[0] == 8
  assert not made.batch.loss_mask.any()
  found = on_policy.metrics(made)
  assert found['zero_variance'].total == found['zero_variance'].count == pytest.approx(6)


def test_rates_are_of_all_that_was_drawn(fake):
  source = dynamic(prompts=3, rounds=9)
  made = source.next(sometimes, 0)
  found = on_policy.metrics(made)
  drawn = sum(len(call) for call in fake['calls'])
  informative = 2 + len(source.get_state()['carried'])
  assert found['zero_variance'].count == pytest.approx(drawn)
  assert found['zero_variance'].total == pytest.approx(drawn - informative) and drawn > informative
  assert 0 < found['pass_rate'].total <= found['pass_rate'].count <= 4 * drawn
  sampled = found['drawn_tokens']  # dropped groups and carried ones were sampled as well: four completions each
  assert sampled.count == 8 and drawn > 2 and sampled.total == pytest.approx(4 * drawn * made.outcomes.lengths.mean())
  halves = jax.tree.map(lambda x: x[::2], made), jax.tree.map(lambda x: x[1::2], made)
  for name, whole in found.items():  # microbatches add up
    parts = [on_policy.metrics(half)[name] for half in halves]
    assert sum(float(part.total) for part in parts) == pytest.approx(float(whole.total), abs=1e-4)
    assert sum(float(part.count) for part in parts) == pytest.approx(float(whole.count), abs=1e-4)


@pytest.mark.parametrize('stopped', [1, 2, 3])
def test_carried_groups_survive_a_restart(fake, stopped):
  source = dynamic(prompts=5, rounds=4)
  expected = [source.next(sometimes, step) for step in range(5)]
  source = dynamic(prompts=5, rounds=4)
  for step in range(stopped):
    source.next(sometimes, step)
  state = json.loads(json.dumps(source.get_state()))
  resumed = dynamic(prompts=5, rounds=4)
  resumed.set_state(state)
  for step in range(stopped, 5):
    jax.tree.map(np.testing.assert_array_equal, resumed.next(sometimes, step), expected[step])


def test_dynamic_sampling_must_be_able_to_fill_a_step():
  with pytest.raises(schema.ConfigError, match='1 rounds of 1 prompts are fewer than the 2 of a step'):
    dynamic(prompts=1, rounds=1)


def test_cut_completions_carry_no_loss_where_they_are_masked(fake):
  learnt = make(name='parity').next(always, 0)
  masked = make(name='parity', rollouts=dict(cut='mask')).next(always, 0)
  cut = learnt.outcomes.finished == 0
  assert cut.sum() == 2 and learnt.batch.loss_mask[cut].sum() == 8
  assert not masked.batch.loss_mask[cut].any()
  np.testing.assert_array_equal(masked.batch.loss_mask[~cut], learnt.batch.loss_mask[~cut])
  np.testing.assert_array_equal(masked.rewards, learnt.rewards)
  assert on_policy.metrics(masked)['completion_tokens'] == on_policy.metrics(learnt)['completion_tokens']
  assert on_policy.metrics(masked)['truncated'].total == 2
  with pytest.raises(schema.ConfigError, match="cut is 'drop'; choose from"):
    make(rollouts=dict(cut='drop'))


def test_a_run_without_any_difference_stops_with_advice(fake):
  source = make(name='parity', rollouts=dict(patience=3))
  source.next(never, 0)
  source.next(never, 1)
  resumed = make(name='parity', rollouts=dict(patience=3))
  resumed.set_state(json.loads(json.dumps(source.get_state())))
  with pytest.raises(schema.ConfigError, match='for 3 steps in a row .* nothing was learnt; fix: problems'):
    resumed.next(never, 2)
  patient = make(name='parity', rollouts=dict(patience=0))
  for step in range(5):
    patient.next(never, step)
  source = make(name='parity', rollouts=dict(patience=3))
  for step in range(8):
    source.next(never if step % 3 else always, step)
  unrewarded = make(name='parity', rollouts=dict(patience=3), teaches=None)
  for step in range(5):
    unrewarded.next(never, step)
  assert unrewarded.get_state()['still'] == 0


def test_what_a_comparison_within_groups_or_in_the_batch_can_learn_from():
  group = lambda *rewards: [Graded(None, None, reward) for reward in rewards]
  alike, differing, unscorable = [group(1.0), group(1.0)], [group(0.0, 0.0), group(1.0, 1.0)], [group(None, 1.0)]
  assert not any(map(on_policy.within_groups, (alike, differing, unscorable)))
  assert on_policy.within_groups([group(1.0, 1.0), group(0.0, 1.0)])
  assert [on_policy.within_batch(groups) for groups in (alike, differing, unscorable)] == [False, True, False]


@pytest.mark.parametrize('loss', ['dpo', 'kto'])
def test_pairs_of_rollouts_need_a_difference_within_a_group(fake, monkeypatch, tmp_path, loss):
  """Differences between groups make no pair, for kto neither."""
  drawn, folder = on_policy.rollout, tiny.write_model(tmp_path, MODEL)

  def alike_within(*args, **options):
    groups = drawn(*args, **options)
    return [[one._replace(reward=float(place)) for one in group] for place, group in enumerate(groups)]

  monkeypatch.setattr(on_policy, 'rollout', alike_within)
  section = base.preference(tiny.data('parity'), loss=loss, reference=folder, rollouts=tiny.rollouts(patience=2))
  source = preference.build(section, CONTEXT).source
  assert not source.next(always, 0).weights.any()
  with pytest.raises(schema.ConfigError, match='for 2 steps in a row all rewards of a group were alike'):
    source.next(always, 1)


def test_rewards_of_a_section_are_summed_and_reported(fake):
  parts = dict(task=base.reward('task'), long=base.reward('soft_overlong', 0.5, max_length=3, cache=2))
  data = schema.parse(DataConfig, tiny.data('parity'), 'data')
  rewards, models = on_policy.open_rewards(parts, data, CONTEXT)
  assert not models
  config = schema.parse(on_policy.RolloutConfig, tiny.rollouts(), 'rollouts')
  made = on_policy.source(config, data, CONTEXT, advantage=None, rewards=rewards).next(always, 0)
  found = on_policy.metrics(made)
  penalty = np.array([0.0, -0.5, -1.0, -1.0] * 2)
  np.testing.assert_allclose(made.outcomes.parts['long'][0], penalty)
  known = made.valid > 0
  np.testing.assert_allclose(made.rewards[known], (made.outcomes.right + 0.5 * penalty)[known])
  assert found['reward/long'].total == penalty.sum() and found['reward/long'].count == 8
  assert found['length_right'].count + found['length_wrong'].count == known.sum()


@pytest.mark.parametrize('parts, message', [
    (dict(x=base.reward('lenght')), "rewards.x.kind 'lenght' unknown"),
    (dict(x=base.reward('cosine')), "needs the options .'max_length'."),
    (dict(x=base.reward('length_max')), 'asks for no number of tokens; fix: data.budget'),
    (dict(x=base.reward('soft_overlong', max_length=4, cache=9)), 'rewards.x: cache 9 of soft_overlong'),
])
def test_rewards_that_cannot_work_are_found_at_the_start(parts, message):
  with pytest.raises(schema.ConfigError, match=message):
    on_policy.open_rewards(parts, schema.parse(DataConfig, tiny.data(), 'data'), CONTEXT)


def test_a_budget_is_asked_for_and_told_to_rewards():
  data = schema.parse(DataConfig, tiny.data(budget=(8, 16)), 'data')
  problems = load_problems(data)
  assert {problem.metadata['budget'] for problem in problems} == {8, 16}
  for problem in problems:
    assert problem.question == f'{problem.id} Think for {problem.metadata["budget"]} tokens.'
  assert load_problems(data) == problems
  plain = load_problems(schema.parse(DataConfig, tiny.data(), 'data'))
  assert [problem.id for problem in plain] == [problem.id for problem in problems]
