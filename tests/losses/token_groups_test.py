import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srm_jax.data import alignment, packing, tokenizer
from srm_jax.losses import cross_entropy, cross_tokenizer, distillation, kl_penalty, token_groups
from srm_jax.losses.token_groups import CHUNK_LOSSES
from tests.data.vocabularies import TEXTS

GROUPS = jnp.array([[-1, 1, 1, -1, 1, 0, -1], [0, 2, 2, 2, -1, -1, -1]])  # in any order, with holes, group 1 empty
LOGPROBS = -jnp.arange(1.0, 15.0).reshape(2, 7)


def normal(*shape, seed=0, scale=2.0):
  return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def test_first_positions_by_hand():
  first = token_groups.first_positions(GROUPS, num_groups=4)
  np.testing.assert_array_equal(first, [[5, 1, 0, 0], [0, 0, 1, 0]])
  assert first.dtype == jnp.int32
  values = normal(2, 7, 3)
  picked = token_groups.at_first_positions(values, GROUPS, num_groups=4)
  np.testing.assert_array_equal(picked[0, :2], values[0, jnp.array([5, 1])])
  np.testing.assert_array_equal(picked[1, 2], values[1, 1])


def test_chunk_logprobs_by_hand():
  found = token_groups.chunk_logprobs(LOGPROBS, GROUPS, num_groups=4)
  np.testing.assert_array_equal(found.whole, [[-6, -10, 0, 0], [-8, 0, -30, 0]])
  np.testing.assert_array_equal(found.later, [[0, -8, 0, 0], [0, 0, -21, 0]])
  garbage = jnp.where(GROUPS < 0, jnp.nan, LOGPROBS)
  for values, expected in zip(token_groups.chunk_logprobs(garbage, GROUPS, num_groups=4), found):
    np.testing.assert_array_equal(values, expected)
    assert values.dtype == jnp.float32


def test_chunk_gradients_reach_each_token_of_a_group_once():
  weights = jnp.arange(8.0).reshape(2, 4)

  def total(logprobs, part):
    return jnp.sum(weights * getattr(token_groups.chunk_logprobs(logprobs, GROUPS, num_groups=4), part))

  np.testing.assert_array_equal(jax.grad(total)(LOGPROBS, 'whole'), [[0, 1, 1, 0, 1, 0, 0], [4, 6, 6, 6, 0, 0, 0]])
  np.testing.assert_array_equal(jax.grad(total)(LOGPROBS, 'later'), [[0, 0, 1, 0, 1, 0, 0], [0, 0, 6, 6, 0, 0, 0]])
  spread = token_groups.to_tokens(weights, GROUPS)
  np.testing.assert_array_equal(spread, jax.grad(total)(LOGPROBS, 'whole'))  # one is the transpose of the other


def test_wrong_shapes_raise():
  with pytest.raises(AssertionError):
    token_groups.chunk_logprobs(LOGPROBS[:, :3], GROUPS, num_groups=4)
  with pytest.raises(AssertionError):
    token_groups.first_positions(GROUPS[0], num_groups=4)
  for loss in CHUNK_LOSSES.values():
    with pytest.raises(AssertionError):
      loss(LOGPROBS, LOGPROBS[:1])


# --- likelihoods of whole groups


def coin(p, q):
  return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def test_binary_kl_by_hand():
  p, q = np.array([[0.5, 0.9, 0.02]]), np.array([[0.25, 0.3, 0.6]])
  np.testing.assert_allclose(token_groups.binary_kl(jnp.log(q), jnp.log(p)), coin(p, q), rtol=1e-4)
  found = token_groups.binary_kl(jnp.log(q), jnp.log(p), temperature=4.0)
  np.testing.assert_allclose(found, coin(p**0.25, q**0.25), rtol=1e-4)


def test_binary_kl_of_improbable_chunks():
  p, q = np.array([[1e-5, 1e-6]]), np.array([[3e-5, 5e-6]])  # differences of numbers that differ by 1e-5 from 1
  np.testing.assert_allclose(token_groups.binary_kl(jnp.log(q), jnp.log(p)), coin(p, q), rtol=1e-3)


@pytest.mark.parametrize('temperature', [1e-3, 1.0, 100.0])
def test_binary_kl_of_impossible_chunks(temperature):
  loss = lambda q, p: jnp.sum(token_groups.binary_kl(q, p, temperature=temperature))
  for q, p in ((-1.0, -jnp.inf), (-jnp.inf, -1.0), (-jnp.inf, -jnp.inf)):
    value, slope = jax.value_and_grad(loss)(jnp.full((1, 1), q), jnp.full((1, 1), p))
    assert np.isfinite(value) and np.all(np.isfinite(slope))
  one_coin = token_groups.binary_kl(jnp.array([[-1.0]]), jnp.array([[-jnp.inf]]))
  np.testing.assert_allclose(one_coin, -np.log1p(-np.exp([[-1]])), rtol=1e-5)


def test_binary_kl_bounds_the_kl_over_all_chunks():
  p, q = (jax.nn.softmax(normal(6, seed=seed)) for seed in (0, 1))
  whole = float(jnp.sum(p * jnp.log(p / q)))
  for v in range(6):
    assert 0 <= token_groups.binary_kl(jnp.log(q[v])[None, None], jnp.log(p[v])[None, None])[0, 0] <= whole + 1e-6


@pytest.mark.parametrize('name', CHUNK_LOSSES)
def test_chunk_losses_vanish_only_where_the_models_agree(name):
  loss = CHUNK_LOSSES[name]
  logprobs = jnp.array([[-0.0, -1e-7, -0.1, -3.0, -90.0]])
  np.testing.assert_allclose(loss(logprobs, logprobs), jnp.zeros((1, 5)), atol=1e-9)
  np.testing.assert_allclose(jax.grad(lambda x: loss(x, logprobs).sum())(logprobs), jnp.zeros((1, 5)), atol=1e-6)
  others = loss(jnp.array([[-0.5, -2.0]]), jnp.array([[-1.0, -1.5]]))
  assert others.dtype == jnp.float32 and np.all(others > 1e-3)


@pytest.mark.parametrize('name', CHUNK_LOSSES)
def test_chunk_gradients(name):
  loss = CHUNK_LOSSES[name]
  student, teacher = jnp.array([[-0.2, -1.0, -3.0, -0.9]]), jnp.array([[-1.5, -0.3, -2.0, -0.1]])
  ours, theirs = jax.grad(lambda *x: loss(*x).sum(), argnums=(0, 1))(student, teacher)
  np.testing.assert_array_equal(theirs, jnp.zeros_like(teacher))
  step = 1e-2
  difference = (loss(student + step, teacher) - loss(student - step, teacher)) / (2 * step)
  np.testing.assert_allclose(ours, difference, rtol=2e-3)
  # Rounding may put a log-probability above 0; what k3 is at -200 says its table.
  for extreme in (0.0, 1e-5, 1e-7, -1e-8, *([] if name == 'k3' else [-200.0])):
    value, gradient = jax.value_and_grad(lambda x: loss(x, teacher).sum())(jnp.full((1, 4), extreme))
    assert np.isfinite(gradient).all() and np.isfinite(value)


def test_the_squared_loss_is_twice_k2():
  np.testing.assert_allclose(2 * CHUNK_LOSSES['k2'](LOGPROBS, 0 * LOGPROBS), jnp.square(LOGPROBS), rtol=1e-6)
  assert CHUNK_LOSSES['k3'] is kl_penalty.KL_ESTIMATORS['k3']


def test_temperature_errors():
  with pytest.raises(ValueError, match='temperature -1 of binary_kl must be positive'):
    token_groups.binary_kl(LOGPROBS, LOGPROBS, temperature=-1)


# --- with alignment


@pytest.fixture(scope='module')
def tokenizers(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tokenizers')
  sizes = {'small': 300, 'large': 340}
  return {
      name: tokenizer.load(tokenizer.train_sentencepiece(TEXTS, folder / f'{name}.model', vocab_size=size))
      for name, size in sizes.items()
  } | {'byte': tokenizer.load('byte')}


def data_set(ours, theirs, *, front=0):
  texts = [text[: 14 + 3 * i] for i, text in enumerate(TEXTS[:6])]
  example = lambda of, i, text, front: packing.from_prompt_completion(
      f'{i}', [of.eos_id] * front + of.encode('Q:'), of.encode(text), of.eos_id
  )
  return [
      alignment.align_examples(example(ours, i, text, 0), example(theirs, i, text, front), ours, theirs)
      for i, text in enumerate(texts)
  ]


def logits_of(batch, size, seed):
  """Logits that depend on what a causal model would see: the tokens of the example so far, but no bos (id eos)."""
  weights = np.random.default_rng(seed).normal(size=(400, size)).astype(np.float32)
  out = np.zeros((*batch.inputs.shape, size), np.float32)
  for row, time in zip(*np.nonzero(batch.segment_ids)):
    start = time - batch.positions[row, time]
    prefix = [i for i in batch.inputs[row, start : time + 1] if i not in (1, 256)]
    out[row, time] = weights[prefix].sum(axis=0) / 3
  return jnp.asarray(out)


def terms(batch, ours, theirs, logits=None):
  """{term: sum over groups} of a batch."""
  logits = logits or [logits_of(batch.batch, ours.vocab_size, 0), logits_of(batch.teacher, theirs.vocab_size, 1)]
  return {name: float(value) for name, value in _terms(batch, logits, *alignment.shared_ids(ours, theirs)).items()}


@jax.jit
def _terms(batch, logits, student_ids, teacher_ids):
  groups = batch.student_groups, batch.teacher_groups
  sides = list(zip(logits, (batch.batch.targets, batch.teacher.targets), groups))
  count = batch.valid.shape[1]
  chunks = [
      token_groups.chunk_logprobs(cross_entropy.token_logprobs(x, ids), groups, num_groups=count)
      for x, ids, groups in sides
  ]
  at_first = [token_groups.at_first_positions(x, groups, num_groups=count) for x, _, groups in sides]
  targets = cross_tokenizer.GroupTargets(batch.valid, batch.exact, *(chunk.later for chunk in chunks))
  flat = lambda x: x.reshape(-1, *x.shape[2:])
  found = cross_tokenizer.hybrid(
      *map(flat, at_first), jax.tree.map(flat, targets), student_ids=student_ids, teacher_ids=teacher_ids
  )
  values = {name: flat(loss(*(chunk.whole for chunk in chunks))) for name, loss in CHUNK_LOSSES.items()}
  values |= {'shared': found['shared'], 'uld': found['uld']}
  return {name: jnp.sum(jnp.where(flat(batch.valid), value, 0.0)) for name, value in values.items()}


@pytest.mark.parametrize('names', [('small', 'large'), ('byte', 'small')])
def test_terms_do_not_depend_on_how_rows_are_packed(names, tokenizers):
  ours, theirs = (tokenizers[name] for name in names)
  aligned = data_set(ours, theirs)
  layouts = [
      alignment.lay_out(aligned, np.arange(6)[:, None], student_length=60, teacher_length=50),
      alignment.lay_out(aligned, [[5, 0, -1], [2, 1, 3], [-1, 4, -1]], student_length=110, teacher_length=100),
  ]
  found = [terms(batch, ours, theirs) for batch in layouts]
  assert found[0]['shared'] > 1 and found[0]['uld'] > 1
  for name in found[0]:
    np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-4)


def test_a_bos_on_one_side_changes_nothing(tokenizers):
  ours, theirs = tokenizers['small'], tokenizers['large']
  lay = lambda aligned: alignment.lay_out(aligned, np.arange(6)[:, None], student_length=60, teacher_length=50)
  expected, found = (terms(lay(data_set(ours, theirs, front=front)), ours, theirs) for front in (0, 1))
  for name in expected:
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


def test_equal_tokenizers_give_the_plain_divergence_of_every_token(tokenizers):
  ours = tokenizers['small']
  batch = alignment.lay_out(data_set(ours, ours), [[0, 1, 2], [3, 4, 5]], student_length=120, teacher_length=120)
  student_ids, teacher_ids = alignment.shared_ids(ours, ours)
  np.testing.assert_array_equal(student_ids, teacher_ids)
  # Left out are padding, the unknown piece, and bytes that have pieces of their own: nobody samples them.
  never = np.setdiff1d(np.arange(ours.vocab_size), student_ids)
  assert 30 < never.size < 150
  logits = [logits_of(batch.batch, ours.vocab_size, seed).at[..., never].set(-30.0) for seed in (0, 1)]
  total = jnp.sum(distillation.forward_kl(*logits) * batch.batch.loss_mask)
  found = terms(batch, ours, ours, logits)
  assert found['uld'] == 0.0 and batch.valid.sum() == batch.batch.loss_mask.sum() and batch.exact[batch.valid].all()
  np.testing.assert_allclose(found['shared'], total, rtol=1e-4)
  equal = terms(batch, ours, ours, logits[:1] * 2)
  np.testing.assert_allclose(list(equal.values()), np.zeros(len(equal)), atol=1e-3)
