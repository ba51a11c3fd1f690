"""What the studies read off their cells: steps to an accuracy, ways of texts, verdicts by their rules."""

import json
import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from configs.studies.chain_length import SIZES
from experiments.distillation_studies import capacity_gap, chain_length, on_policy_or_rl, one_prompt
from experiments.study import cells, running
from srm_jax.types import Problem


@pytest.mark.parametrize('curve, accuracy, steps', [
    ({'0': 0.2, '10': 0.6, '20': 0.8}, 0.7, 15),
    ({'0': 0.2, '10': 0.6, '20': 0.8}, 0.6, 10),
    ({'0': 0.2, '8': 0.6, '16': 0.3, '24': 0.9}, 0.5, 6),  # the first time counts
    ({'0': 0.2, '100': 0.6}, 0.7, math.inf),
    ({'0': 0.8, '8': 0.9}, 0.7, 0),
    ({'0': 0.2, '100': 0.6, '20': 0.4}, 0.5, 60),  # steps are in order of numbers, not of text
])
def test_steps_to_an_accuracy(curve, accuracy, steps):
  assert on_policy_or_rl.reached(curve, accuracy) == pytest.approx(steps)


def test_a_slow_arm_that_does_not_get_there_gives_a_bound():
  fast, slow = {'0': 0.2, '10': 0.7}, {'0': 0.2, '40': 0.45}
  assert on_policy_or_rl.ratio(slow, fast, 0.7) == (4.0, True)
  assert on_policy_or_rl.ratio({'0': 0.2, '40': 0.7}, fast, 0.7) == (4.0, False)
  for never in ({'0': 0.2, '10': 0.6}, {'0': 0.9, '10': 0.95}):
    value, bound = on_policy_or_rl.ratio(slow, never, 0.7)
    assert math.isnan(value) and not bound


@pytest.mark.parametrize('ratios, bounds, least, word', [
    ([2.0, 2.1, 1.9, 2.0, 2.2], '', 1.5, 'supported'),
    ([2.0, 2.1, 1.9, 2.0, 2.2], 'all', 1.5, 'supported'),  # a bound from below is enough
    ([1.0, 1.1, 0.9, 1.0, 1.2], '', 1.5, 'contradicted'),
    ([1.0, 1.1, 0.9, 1.0, 1.2], 'first', 1.5, 'inconclusive'),
    ([3.0, 3.1, 2.9, 1.49, 3.0], '', 1.5, 'inconclusive'),  # a seed below
    ([1.2, 1.9, 1.5, 1.4, 1.6], '', 1.5, 'inconclusive'),
    ([2.0, math.nan, 2.0, 2.0, 2.0], '', 1.5, 'inconclusive'),
])
def test_the_rule_of_ratios(ratios, bounds, least, word):
  pairs = [(value, bounds == 'all' or (bounds == 'first' and not i)) for i, value in enumerate(ratios)]
  verdict = on_policy_or_rl.judge_ratio('claim', pairs, least)
  assert verdict.verdict == word and bool(verdict.needed) == (word == 'inconclusive')


def test_a_verdict_on_ratios_shows_ratios():
  shown = on_policy_or_rl.judge_ratio('claim', [(2.0, False), (8.0, False)], 1.5).evidence['running_sums']
  assert shown.mean == pytest.approx(4) and shown.by_seed == (2.0, 8.0) and shown.low < 4 < shown.high


def test_tokens_add_up_over_steps(tmp_path):
  rows = [{'step': 4, 'completion_tokens': 10.0}, {'step': 6, 'completion_tokens': 5.0}]
  (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  assert running.sampled_tokens(tmp_path, {'prompts': 2, 'samples': 3}) == {'4': 240.0, '6': 300.0}


def _sum(number):
  return Problem(str(number), '3+8+4+9', '4')


FORWARD, BACKWARD = '154\n#### 4', '314\n#### 4'


@pytest.mark.parametrize('texts, expected', [
    ([FORWARD, BACKWARD] * 2, dict(forward=0.5, backward=0.5, entropy=1.0, invalid=0.0, mixed=0.0)),
    ([FORWARD] * 4, dict(forward=1.0, backward=0.0, entropy=0.0, invalid=0.0, mixed=0.0)),
    ([FORWARD, 'nothing', '114\n#### 4', BACKWARD],
     dict(forward=2 / 3, backward=1 / 3, entropy=0.9183, invalid=0.5, mixed=0.25)),
])
def test_shares_of_texts(texts, expected):
  assert capacity_gap.shares([_sum(i) for i in range(4)], texts) == pytest.approx(expected, abs=1e-4)


def _grades(accuracy, n=200):
  correct = [float(i < round(accuracy * n)) for i in range(n)]
  return {'accuracy': accuracy, 'n': n, 'correct': cells.pack(correct), 'tokens_per_answer': 20.0}


def _sized(noise, sign=1):
  """Students that gain from long chains with their size; sign -1: that lose."""
  lead = {size: sign * (-0.15 + 0.15 * place) for place, size in enumerate(SIZES)}
  best = 0.03 if sign > 0 else -0.3
  arms = {'short': lambda x: 0.5, 'short_more': lambda x: 0.5, 'long': lambda x: 0.5 + x, 'mix_50': lambda x: 0.5}
  arms['mix_20'] = lambda x: 0.5 + max(x, 0) + best
  return {f'{size}_{arm}': _grades(accuracy(x) + noise) for size, x in lead.items() for arm, accuracy in arms.items()}


def _cells(study):
  """Five seeds in which every claim holds."""
  found = []
  for seed in range(1, 6):
    noise = 0.005 * seed
    if study == 'chain_length':
      found.append({'task': 'sums', 'seed': seed, 'models': _sized(noise)})
      continue
    names = {
        'on_policy_or_rl': on_policy_or_rl.ARMS, 'capacity_gap': capacity_gap.ARMS,
        'one_prompt': ('opd_1', 'grpo_1', 'opd_8', 'grpo_8'),
    }[study]
    models = {name: _grades((0.4 if name.startswith('grpo') else 0.7) + noise) for name in ('teacher', 'base', *names)}
    for name, one in models.items():
      steps = {'opd': 8, 'grpo': 64}.get(name, 24)
      one['curve'] = {'0': 0.2, str(steps): 0.72 + noise, str(2 * steps): 0.9}
      one['sampled'] = {'0': 0.0, str(2 * steps): 3000.0 * steps}
      low = name in ('reverse_on', 'minillm_on')
      one |= dict(forward=0.5, backward=0.5, mixed=0.1)
      one |= dict(entropy=0.4 + noise, invalid=0.1 + noise) if low else dict(entropy=0.9, invalid=0.5)
    found.append({'task': 'running_sums', 'seed': seed, 'models': models})
  return found


@pytest.mark.parametrize('study', [on_policy_or_rl, one_prompt, capacity_gap, chain_length])
def test_where_all_claims_hold_they_are_supported_and_shown(study):
  name = study.__name__.rpartition('.')[2]
  results = json.loads(json.dumps(running.summary(study.STUDY, 'full', _cells(name))))
  assert {one['verdict'] for one in results[name]['verdicts']} == {'supported'}
  text = running.markdown(results)
  assert text.count('**supported**') == len(results[name]['verdicts']) and 'Seeds 1, 2, 3, 4, 5.' in text
  figure = Figure()
  study.STUDY.draw(_cells(name), figure)
  assert all(axis.has_data() for axis in figure.axes)


@pytest.mark.parametrize('study', [on_policy_or_rl, one_prompt, capacity_gap])
def test_where_arms_change_places_claims_are_contradicted(study):
  name = study.__name__.rpartition('.')[2]
  places = {
      'on_policy_or_rl': dict(grpo='opd', opd='grpo', opd_sampled='grpo'),
      'one_prompt': dict(opd_1='grpo_1', grpo_1='opd_1', opd_8='grpo_8', grpo_8='opd_8'),
      'capacity_gap': dict(forward_on='reverse_on', reverse_on='forward_on', forward_off='minillm_on',
                           minillm_on='forward_off'),
  }[name]
  swapped = [
      cell | {'models': cell['models'] | {new: cell['models'][old] for new, old in places.items()}}
      for cell in _cells(name)
  ]
  assert {verdict.verdict for verdict in study.STUDY.judge(swapped)} == {'contradicted'}


def test_where_large_students_lose_by_long_chains_s7_is_contradicted():
  found = [{'task': 'sums', 'seed': seed, 'models': _sized(0.005 * seed, sign=-1)} for seed in range(1, 6)]
  assert {verdict.verdict for verdict in chain_length.judge(found)} == {'contradicted'}


@pytest.mark.parametrize('gaps, rho', [
    ([0.1, 0.2, 0.3], 1), ([0.3, 0.2, 0.1], -1), ([0.1, 0.3, 0.2], 0.5), ([0, 0, 0], 0),
])
def test_rank_correlation_with_size(gaps, rho):
  assert chain_length.rank_correlations(np.array([gaps])) == pytest.approx([rho])


def test_a_record_is_results_figure_and_tables(tmp_path):
  results = running.summary(one_prompt.STUDY, 'full', _cells('one_prompt'))
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'results.json').write_text(json.dumps(results))
  (tmp_path / 'run' / 'figure.png').write_bytes(b'picture')
  (tmp_path / 'README.md').write_text('above\n<!-- S2b -->\nold\n<!-- /S2b -->\nbelow\n')
  running.record(results, 'S2b', tmp_path / 'run', tmp_path / 'S2b')
  text = (tmp_path / 'README.md').read_text()
  assert text.startswith('above\n') and text.endswith('below\n') and '**supported**' in text and 'old' not in text
  assert (tmp_path / 'S2b' / 'figure.png').read_bytes() == b'picture'
