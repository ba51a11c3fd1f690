"""Rows of an evaluation: what they count, what they cost, and that choices among samples are among the same samples."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import base
from srm_jax import checkpoints, schema, statistics
from srm_jax import evaluate as module
from srm_jax.data import prompting as prompts
from srm_jax.data import steps
from srm_jax.evaluate import evaluate, read_completions, summarize
from srm_jax.inference import reward_scores
from srm_jax.models import heads
from srm_jax.models.config import TransformerConfig, forward_flops
from srm_jax.rewards import Graded
from srm_jax.types import Completion, Prompt, SamplingParams, Spent
from tests import tiny
from tests.data import chats
from tests.tiny import one_device, tiny_tasks  # noqa: F401

MODEL = TransformerConfig(258, 1, 16, 2, 2, 8, 32, max_length=64)
ROWS = dict(
    direct=base.strategy('direct'), greedy=base.strategy(), sample=base.strategy(temperature=1.0),
    majority=base.strategy('self_consistency', samples=3, temperature=1.0),
    best=base.strategy('best_of_n', samples=4, temperature=1.0),
)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  folder = tmp_path_factory.mktemp('models')
  return tiny.write_model(folder / 'model', MODEL), tiny.write_model(folder / 'scorer', MODEL, seed=1)


def config(folders, rows=ROWS, **options):
  model, scorer = folders
  data = tiny.data('parity', split='test', count=6)
  made = base.evaluate(model, data, rows, scorer=scorer, max_new_tokens=8, batch_size=8)
  made.update(progress=False, **options)
  return made


@pytest.fixture(scope='module')
def observed(folders, tmp_path_factory):
  """(evaluation, every group of completions that the model drew)."""
  drawn, make_generate = [], module.make_generate

  def spying(*args, **options):
    generate = make_generate(*args, **options)

    def spy(prompts, sampling):
      groups = generate(prompts, sampling)
      drawn.append((sampling, groups))
      return groups

    return spy

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(module, 'make_generate', spying)
    return evaluate(config(folders), tmp_path_factory.mktemp('evaluation')), drawn


def test_results_hold_what_the_table_needs(observed):
  results = observed[0].results
  assert results.keys() == ROWS.keys()
  for name, row in results.items():
    assert row['n'] == len(row['correct']) == 6 and row['accuracy'] == pytest.approx(np.mean(row['correct']))
    assert tuple(row['interval']) == pytest.approx(statistics.wilson_interval(sum(row['correct']), 6))
    assert sum(count for _, count in row['by_steps'].values()) == 6 and set(row['by_steps']) <= {'1', '2'}
    assert row['tokens_per_answer'] == row['spent']['sampled'] / 6
    texts = read_completions(observed[0].workdir, name)
    assert [int(line['reward'] == 1.0) for line in texts.values()] == row['correct']
    assert row['unscorable'] == sum(line['reward'] is None for line in texts.values())
  assert json.loads((observed[0].workdir / 'results.json').read_text())['best']['correct'] == results['best']['correct']


def test_choices_are_made_among_the_same_samples(observed):
  evaluation, drawn = observed
  sampled = [groups for sampling, groups in drawn if sampling.temperature == 1.0]
  assert len(sampled) == 1 and len(drawn) == 3  # one pool, one greedy pass, one direct pass
  pool = {group[0].prompt.id: [one.text for one in group] for group in sampled[0]}
  assert all(len(group) == 4 for group in pool.values())
  texts = {row: read_completions(evaluation.workdir, row) for row in ROWS}
  for identifier, group in pool.items():
    assert texts['sample'][identifier]['text'] == group[0]
    assert texts['majority'][identifier]['text'] in group[:3]
    assert texts['best'][identifier]['text'] in group
  assert any(texts['best'][identifier]['text'] != group[0] for identifier, group in pool.items())


def test_the_direct_row_asks_for_the_answer_at_once(observed):
  for line in read_completions(observed[0].workdir, 'direct').values():
    assert line['prompt'].endswith(tiny.PARITY.answer_cue) and line['text'].startswith(tiny.PARITY.answer_cue)


def test_cost_counts_discarded_samples_and_the_scorer(observed):
  results = observed[0].results
  spent = {name: row['spent'] for name, row in results.items()}
  assert spent['sample']['sampled'] < spent['majority']['sampled'] < spent['best']['sampled']
  assert spent['majority']['scored'] == 0
  assert spent['best']['scored'] == spent['best']['sampled'] + 4 * 6 * 4  # and the prompt of every sample
  tokens = spent['best']['prefilled'] + spent['best']['sampled']
  assert results['best']['flops'] == forward_flops(MODEL, tokens) + forward_flops(MODEL, spent['best']['scored'])


def test_a_killed_run_continues_with_the_rows_that_are_left(observed, folders, tmp_path):
  rows = evaluate(config(folders), tmp_path)
  path = tmp_path / 'results.json'
  kept = {name: row for name, row in json.loads(path.read_text()).items() if name in ('best', 'direct')}
  path.write_text(json.dumps(kept))
  again = evaluate(config(folders), tmp_path)
  plain = lambda results: json.loads(json.dumps(results))
  assert plain(again.results) == plain(rows.results) == plain(observed[0].results)


def test_errors(folders, tmp_path):
  with pytest.raises(schema.ConfigError, match=r"strategy 'majority' unknown"):
    evaluate(config(folders, dict(a=base.strategy('majority'))), tmp_path)
  with pytest.raises(schema.ConfigError, match=r'config\.strategies is empty'):
    evaluate(config(folders, {}), tmp_path)
  with pytest.raises(schema.ConfigError, match=r'best_of_n needs config\.scorer'):
    evaluate(config((folders[0], '')), tmp_path)
  with pytest.raises(schema.ConfigError, match=r"score 'avg' unknown"):
    evaluate(config(folders, score='avg'), tmp_path)
  with pytest.raises(schema.ConfigError, match='holds no model'):
    evaluate(config(('/nowhere', ''), dict(a=base.strategy())), tmp_path)
  with pytest.raises(schema.ConfigError, match="has no completions of row 'greedy'"):
    read_completions(tmp_path, 'greedy')


def test_summary_by_hand():
  problems = tiny.SUMS.problems('test', count=3)
  graded = [
      Graded(problem, Completion(
          Prompt(problem.id, ''), 0, '', (1,), (2,), (0.0,), i > 0, Spent(2, 3 + i, 10 * (i == 2)),
      ), reward)
      for i, (problem, reward) in enumerate(zip(problems, (1.0, 0.0, None)))
  ]
  found = summarize(graded, MODEL, MODEL)
  assert (found['accuracy'], found['correct'], found['unscorable']) == (pytest.approx(1 / 3), [1, 0, 0], 1)
  assert found['spent'] == {'prefilled': 6, 'sampled': 12, 'scored': 10} and found['tokens_per_answer'] == 4
  assert found['finished'] == pytest.approx(2 / 3)
  assert found['flops'] == forward_flops(MODEL, 18) + forward_flops(MODEL, 10)


def test_a_chat_model_is_asked_through_its_template_under_every_strategy(tmp_path):
  folder = str(chats.save_family(tmp_path / 'published', 'qwen2_5'))
  chat_model = dataclasses.replace(MODEL, vocab_size=512, max_length=160)
  models = [tiny.write_model(tmp_path / str(seed), chat_model, seed=seed, tokenizer=folder) for seed in (0, 1)]
  made = config(models)
  made.data = tiny.data('parity', split='test', count=6, prompting=base.prompt('chat', system='Add.'))
  found = evaluate(made, tmp_path / 'evaluation')
  assert set(found.results) == set(ROWS)
  for row in ROWS:
    for line in read_completions(found.workdir, row).values():
      ending = '<|im_start|>assistant\n' + ('#### ' if row == 'direct' else '')
      assert line['prompt'].startswith('<|im_start|>system\nAdd.<|im_end|>') and line['prompt'].endswith(ending)


def rewarded(folder, target):
  """A workdir as the training of a reward model leaves it."""
  extra = {'value_head': heads.init_value_head(jax.random.key(2), MODEL.embed_dim)}
  recipe = base.reward_model(tiny.data(), tiny.batch(), target=target, segmentation='characters')
  checkpoints.claim(folder, {'recipe': recipe.to_dict()})
  return tiny.write_model(folder, MODEL, seed=1, extra=extra)


@pytest.mark.parametrize('target, score, segment', [
    ('outcome', 'mean', None), ('process', 'min', steps.characters), ('process', 'last', steps.characters),
])
def test_a_reward_model_scores_by_its_head(folders, tmp_path, target, score, segment):
  scorer = rewarded(tmp_path / 'reward', target)
  rows = dict(best=ROWS['best'], vote=base.strategy('weighted_vote', samples=4, temperature=1.0))
  found = evaluate(config((folders[0], scorer), rows, score=score), tmp_path / 'evaluation')
  model, judge = checkpoints.load_model(folders[0]), checkpoints.load_model(scorer)
  generate = module.make_generate(model.config, model.params, model.tokenizer, batch_size=8)
  prompting = prompts.plain(tiny.PARITY, model.tokenizer)
  sampling = SamplingParams(samples=4, max_new_tokens=8)
  groups = generate([prompting.prompt(one) for one in tiny.PARITY.problems('test', count=6, seed=1)], sampling)
  judged = reward_scores.make_reward_scorer(
      MODEL, judge.params, judge.extra['value_head'], judge.tokenizer, segment=segment
  )
  texts = read_completions(found.workdir, 'best')
  for group in groups:
    scores = reward_scores.reduced(score, judged(group))
    assert texts[group[0].prompt.id]['text'] == group[int(np.argmax(scores))].text
  assert found.results['vote']['spent']['scored'] == found.results['best']['spent']['scored'] > 0


def test_scores_are_of_the_kind_that_the_scorer_has(folders, tmp_path):
  with pytest.raises(schema.ConfigError, match="score of a reward model 'sum' unknown"):
    evaluate(config((folders[0], rewarded(tmp_path / 'reward', 'outcome')), score='sum'), tmp_path / 'a')
  with pytest.raises(schema.ConfigError, match="score of a language model 'product' unknown"):
    evaluate(config(folders, score='product'), tmp_path / 'b')
  with pytest.raises(schema.ConfigError, match=r'weighted_vote needs config\.scorer'):
    evaluate(config((folders[0], ''), dict(a=base.strategy('weighted_vote'))), tmp_path / 'c')


def test_a_scorer_of_another_vocabulary_is_refused(folders, tmp_path):
  tokenizer = str(chats.save_family(tmp_path / 'published', 'qwen2_5'))
  scorer = tiny.write_model(tmp_path / 's', dataclasses.replace(MODEL, vocab_size=512), tokenizer=tokenizer)
  with pytest.raises(schema.ConfigError, match='scorer .* has tokenizer .*, the model byte of 258'):
    evaluate(config((folders[0], scorer)), tmp_path / 'evaluation')
