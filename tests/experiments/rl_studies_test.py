"""What the RL studies read off their cells: gains in pass@k, and the verdicts on them."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from configs import base
from experiments.rl_studies import pass_at_k
from experiments.study import running
from srm_jax import schema
from srm_jax.models.config import TransformerConfig
from srm_jax.rewards import Graded
from srm_jax.types import Completion
from tests import tiny
from tests.tiny import tiny_tasks  # noqa: F401


def cell(seed, before, after):
  """Shares by k of the two models: lists over KS."""
  shares = lambda values: {kind: dict(zip(map(str, pass_at_k.KS), values)) for kind in ('pass', 'majority')}
  models = {'base': shares(before), 'grpo': shares(after)}
  return {'task': 'running_sums', 'seed': seed, 'models': models}


def cells(gain_first, gain_last):
  noise = [0.0, 0.01, -0.01, 0.005, -0.005]
  before = [0.3, 0.4, 0.5, 0.6, 0.7]
  return [
      cell(seed, before, [0.3 + gain_first + one, 0.4, 0.5, 0.6, 0.7 + gain_last]) for seed, one in enumerate(noise, 1)
  ]


@pytest.mark.parametrize('first, last, words', [
    (0.3, 0.0, ['supported', 'supported']), (0.3, 0.2, ['supported', 'contradicted']),
    (-0.1, 0.0, ['contradicted', 'contradicted']), (0.3, 0.1, ['supported', 'inconclusive']),
    (0.3, -0.05, ['supported', 'supported']), (0.0, 0.0, ['inconclusive', 'inconclusive']),
])
def test_the_rule(first, last, words):
  assert [one.verdict for one in pass_at_k.judge(cells(first, last))] == words


def test_gains_are_after_minus_before():
  np.testing.assert_allclose(pass_at_k.gains(cells(0.2, 0.1), 1), [0.2, 0.21, 0.19, 0.205, 0.195])
  np.testing.assert_allclose(pass_at_k.gains(cells(0.2, 0.1), 256), [0.1] * 5)


def test_results_are_shown():
  found = cells(0.3, 0.0)
  results = json.loads(json.dumps(running.summary(pass_at_k.STUDY, 'full', found)))
  text = running.markdown(results)
  assert '**supported**' in text and '| 256 |' in text and 'Seeds 1, 2, 3, 4, 5.' in text
  figure = Figure()
  pass_at_k.draw(found, figure)
  assert len(figure.axes) == 2 and all(len(axis.lines) == 12 for axis in figure.axes)


def test_shares_of_many_answers_by_hand(monkeypatch, tmp_path):
  """Two problems: one right of 256, and all right; the wrong answers agree."""
  folder = tiny.write_model(tmp_path, TransformerConfig(258, 1, 16, 2, 2, 8, 32, max_length=64))

  def rollout(generate, prompting, problems, sampling):
    del generate, prompting
    def group(problem, right):
      rows = []
      for sample in range(sampling.samples):
        text = f'#### {problem.answer}' if sample < right else '#### 99'
        rows.append(Graded(problem, Completion(None, sample, text, (1,), (2,), (0.0,), True), float(sample < right)))
      return rows

    return [group(problems[0], 1), group(problems[1], 256)]

  monkeypatch.setattr(pass_at_k, 'rollout', rollout)
  section = schema.resolve(base.train(
      {}, tokenizer='byte', model={}, optimizer={}, num_steps=1,
      measure=dict(data=tiny.data('sums', count=2), new_tokens=4, decode_rows=8, samples=256),
  ))['measure']
  found = pass_at_k.of_many(folder, section, 1)
  for k in pass_at_k.KS:
    assert found['pass'][str(k)] == pytest.approx((k / 256 + 1) / 2)
  assert found['majority']['256'] == 0.5 and found['majority']['1'] == pytest.approx(0.5, abs=0.02)
