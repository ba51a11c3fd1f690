"""The GRPO benchmark counts the work rightly, and refuses a side that does other work."""

import io
import json
import pathlib

import pytest

from experiments.benchmarks import grpo, grpo_sides, timing
from srm_jax.data import tokenizer
from srm_jax.models.config import TransformerConfig, num_params

WORK = grpo_sides.Work(**grpo.SMOKE_STEP, dtype='float32', weights='float32', tokenizer='')
TEXT = ' '.join(['2'] * WORK.new_tokens)


def turns(asked='\n', work=WORK):
  """A side's end of a pipe in which `asked` stands, and what it writes."""
  told = io.StringIO()
  return grpo_sides.Turns(work, io.StringIO(asked), told), told


@pytest.fixture
def clock(monkeypatch):
  """Time that passes as a test says: clock[0] += seconds."""
  now = [0.0]
  monkeypatch.setattr(grpo_sides.time, 'perf_counter', lambda: now[0])
  monkeypatch.setattr(grpo_sides.time, 'process_time', lambda: 2 * now[0])
  return now


def test_seconds_of_a_part_leave_out_those_of_the_parts_inside_it(clock):
  side, told = turns('\n\n')

  def spend(seconds):
    clock[0] += seconds

  def sample():
    spend(3.0)
    score(0.5)
    spend(1.0)
    for _ in range(WORK.rows):
      side.grade(TEXT)

  score, rollout = side.timed('scoring', spend), side.timed('rollout', sample)
  for step in (1, 2):
    assert side.wait()
    rollout()
    spend(2.5)
    side.done(step)
  assert not side.wait()
  expected = {'scoring': 0.5, 'rollout': 4.0, 'update': 2.5, 'processor': 14.0}
  assert [json.loads(line) for line in told.getvalue().splitlines()] == [expected, expected]


def test_a_completion_that_ends_early_stops_the_benchmark():
  side, _ = turns()
  side.wait()
  assert side.grade(TEXT) == 1.0
  with pytest.raises(AssertionError, match=f'{WORK.new_tokens - 1} tokens instead of {WORK.new_tokens}'):
    side.grade(TEXT[2:])


@pytest.mark.parametrize('steps, graded', [(0, WORK.rows), (2, WORK.rows), (1, WORK.rows - 1), (1, WORK.rows + 1)])
def test_another_number_of_steps_or_completions_stops_the_benchmark(steps, graded):
  side, told = turns()
  side.wait()
  for _ in range(graded):
    side.grade(TEXT)
  with pytest.raises(AssertionError, match=f'{steps} steps, {graded} graded; expected 1 and {WORK.rows}'):
    side.done(steps)
  assert not told.getvalue()


def test_model_and_prompts_are_of_the_size_asked_for():
  side, _ = turns()
  parameters, biases = num_params(TransformerConfig(**WORK.model)), 3 * 64
  side.check(parameters=parameters, encode=str.split)
  side.check(parameters=parameters + biases, encode=str.split)
  with pytest.raises(AssertionError, match='prompts of'):
    side.check(parameters=parameters, encode=list)
  for wrong in (parameters - 64 * 64, parameters + 64 * 64):  # without the embedding, and with it twice
    with pytest.raises(AssertionError, match='a model of'):
      side.check(parameters=wrong, encode=str.split)


def test_the_reward_differs_between_completions():
  assert grpo_sides.reward('1 2 3 4') == 0.5 and grpo_sides.reward('1 3 5') == 0.0


def test_ids_are_words_and_none_of_the_models_ends_a_text(tmp_path):
  grpo_sides.write_tokenizer(tmp_path, 64)
  made = tokenizer.load(pathlib.Path(tmp_path))
  assert made.eos_id == made.pad_id == 64 and made.end_ids == (64,) and made.prefix_ids == ()
  assert made.decode(list(range(64))).split() == list(map(str, range(64)))
  texts = grpo_sides.prompts(WORK)
  assert len(set(texts)) == grpo_sides.DISTINCT * WORK.prompts
  assert {len(made.encode(text)) for text in texts} == {WORK.prompt_tokens}


def test_least_work_of_a_step():
  """By hand: 2 prompts of 5 tokens, 8 completions of 8, 64 * (64 + 4 * 64 + 3 * 128) weights, one layer."""
  weights, heads = 64 * (64 + 4 * 64 + 3 * 128), 2 * 32
  found = grpo.least(WORK)
  prefill, decode = 2 * 4 * (2 * weights + 4 * heads * 2), 8 * 8 * (2 * weights + 4 * heads * 9)
  assert found.rollout == prefill + decode
  assert found.update == 3 * (prefill + decode)
  assert found.read == 4 * 8 * (weights + 8 * 2 * heads * 9)


def test_a_line_is_of_the_timed_steps_and_gives_rates():
  reports = [{'rollout': 9.0, 'scoring': 9.0, 'update': 9.0, 'processor': 99.0}]  # compilation
  reports += [{'rollout': 1.0, 'scoring': 0.25, 'update': 2.0, 'processor': seconds} for seconds in (5.0, 7.0, 6.0)]
  text = grpo.line('srm_jax', timing.Timing(3.25, 0.0, 3), reports, grpo.Least(100e9, 300e9, 0.0))
  words = 'srm_jax 3.250 s rollout 1.000 s ( 100.0 GFLOP/s) scoring 0.250 s update 2.000 s ( 150.0 GFLOP/s) 6.000'
  assert text.split() == f'{words} processor s'.split()
  once = grpo.line('srm_jax', timing.Timing(27.0, 0.0, 1), reports[:1], grpo.Least(100e9, 300e9, 0.0))
  assert once.endswith('99.000 processor s   (its first step only)')


def test_speed_is_to_the_faster_way_in_which_a_peer_runs():
  walls = {'srm_jax': 2.0, 'TRL autocast': 8.0, 'TRL weights': 5.0, 'Tunix': 6.0}
  timings = {label: timing.Timing(wall, 0.0, 1) for label, wall in walls.items()}
  assert grpo.ratios(timings) == '2.50 x TRL, 3.00 x Tunix'
  del timings['Tunix']
  assert grpo.ratios(timings) == '2.50 x TRL'


def test_a_side_that_stops_says_why():
  broken = grpo_sides.Work(**{**grpo.SMOKE_STEP, 'model': {}}, dtype='float32', weights='float32', tokenizer='')
  with grpo.Side('product', broken) as side, pytest.raises(RuntimeError, match='(?s)product .*step 1.*embed_dim'):
    side()
