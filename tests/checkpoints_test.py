"""Checkpoints are whole or set aside, verified when read, and do not care on which mesh they were written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from srm_jax import checkpoints, sharding
from srm_jax.models import transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.schema import ConfigError
from srm_jax.types import TrainState

MODEL = TransformerConfig(258, 1, 16, 2, 2, 8, 32)
META = {'source': {'step': 3}, 'frozen': {}, 'flops': 1.5}


def state(step, mesh=None, spec=PartitionSpec('fsdp', 'tensor'), seed=0):
  """A train state of a bfloat16 and a float32 matrix with momenta, on one device or on a mesh."""
  rng = np.random.default_rng(seed + step)
  params = {'model': {
      'a': jnp.asarray(rng.normal(size=(64, 32)), jnp.float32),
      'b': jnp.asarray(rng.normal(size=(8, 8)), jnp.bfloat16),
  }}
  made = TrainState(jnp.asarray(step, jnp.int32), params, {'mu': jax.tree.map(lambda x: x * 2, params)}, None)
  if mesh is None:
    return made
  return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec if x.ndim else PartitionSpec())), made)


def assert_equal(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(actual), jax.device_get(expected))


@pytest.fixture
def saved(tmp_path):
  """A workdir with checkpoints 1 and 2."""
  opened = checkpoints.open_checkpoints(tmp_path)
  for step in (1, 2):
    opened.save(state(step), META | {'source': {'step': step}})
  opened.close()
  return tmp_path


def restore(workdir, like):
  opened = checkpoints.open_checkpoints(workdir)
  try:
    return opened.restore_latest(like)
  finally:
    opened.close()


def largest_file(folder):
  return max((path for path in folder.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(workdir, step):
  path = largest_file(workdir / 'checkpoints' / str(step) / 'params')
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(workdir, step):
  path = largest_file(workdir / 'checkpoints' / str(step) / 'params')
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  path.write_bytes(content)


def lose_the_meta(workdir, step):
  (workdir / 'checkpoints' / str(step) / 'meta' / 'metadata').unlink()


pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # readers that orbax gave up
DAMAGES = [truncate, flip_a_bit, lose_the_meta]


def test_round_trip(saved):
  found = restore(saved, state(7))
  assert_equal(found.state, state(2))
  assert found.meta == META | {'source': {'step': 2}}
  assert found.state.params['model']['b'].dtype == jnp.bfloat16


def test_nothing_saved_nothing_restored(tmp_path):
  assert restore(tmp_path, state(0)) is None


def test_a_step_that_is_there_stays(saved):
  opened = checkpoints.open_checkpoints(saved)
  opened.save(state(2, seed=9), META)
  opened.close()
  assert_equal(restore(saved, state(0)).state, state(2))


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(saved, damage, caplog):
  damage(saved, 2)
  assert_equal(restore(saved, state(0)).state, state(1))
  assert 'checkpoint 2 is damaged' in caplog.text
  assert list((saved / 'checkpoints').glob('damaged-2*'))  # set aside, not thrown away
  opened = checkpoints.open_checkpoints(saved)
  opened.save(state(2), META)  # the run comes by again
  opened.close()
  assert_equal(restore(saved, state(0)).state, state(2))


def test_content_is_checked_against_the_fingerprint(saved, monkeypatch, caplog):
  opened = checkpoints.open_checkpoints(saved)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints, 'fingerprint', lambda tree: 'of something else')
    opened.save(state(3), META)
  opened.close()
  assert_equal(restore(saved, state(0)).state, state(2))
  assert 'checkpoint 3 is damaged (its content does not match the fingerprint' in caplog.text


def test_no_whole_checkpoint_is_an_error_not_a_fresh_start(saved):
  truncate(saved, 1)
  truncate(saved, 2)
  with pytest.raises(ValueError, match=r'none of the checkpoints \[2, 1\]'):
    restore(saved, state(0))


def test_the_newest_are_kept(tmp_path):
  opened = checkpoints.open_checkpoints(tmp_path, keep=2)
  for step in (1, 2, 3):
    opened.save(state(step), META)
  opened.close()
  assert sorted(checkpoints.open_checkpoints(tmp_path).manager.all_steps()) == [2, 3]


def test_restores_onto_another_mesh(tmp_path):
  opened = checkpoints.open_checkpoints(tmp_path)
  opened.save(state(5, sharding.make_mesh((2, 2, 2))), META)
  opened.close()
  other = state(0, sharding.make_mesh((1, 8, 1)), PartitionSpec('fsdp'))
  found = restore(tmp_path, other)
  assert_equal(found.state, state(5))
  assert found.state.params['model']['a'].sharding == other.params['model']['a'].sharding
  assert_equal(restore(tmp_path, state(0)).state, state(5))


def test_fingerprint_is_the_same_on_every_mesh():
  prints = {
      checkpoints.fingerprint(state(1, mesh).params)
      for mesh in (None, sharding.make_mesh((2, 2, 2)), sharding.make_mesh((1, 1, 8)))
  }
  assert len(prints) == 1


def test_fingerprint_sees_every_bit_and_every_place():
  words = np.arange(12, dtype=np.uint32)
  prints = {checkpoints.fingerprint([words.view(np.float32)])}
  for place, bit in ((0, 0), (5, 31), (11, 15), (11, 16)):
    changed = words.copy()
    changed[place] ^= np.uint32(1 << bit)
    prints.add(checkpoints.fingerprint([changed.view(np.float32)]))
  prints.add(checkpoints.fingerprint([words[::-1].copy().view(np.float32)]))
  prints.add(checkpoints.fingerprint([words[:6].view(np.float32), words[6:].view(np.float32)]))
  assert len(prints) == 7
  one, other = {'a': jnp.zeros(2), 'b': jnp.ones(2)}, {'a': jnp.ones(2), 'b': jnp.zeros(2)}
  assert checkpoints.fingerprint(one) != checkpoints.fingerprint(other)


def test_a_workdir_belongs_to_one_config(tmp_path):
  config = {'seed': 1, 'model': {'depth': 2, 'width': 3}, 'mesh': (1, 2)}
  checkpoints.claim(tmp_path / 'run', config)
  checkpoints.claim(tmp_path / 'run', config | {'mesh': [1, 2]})  # the same once it is JSON
  message = r'config\.model\.width was 3, is 4; config\.seed was 1, is None\. Use another --workdir'
  with pytest.raises(ConfigError, match=message) as error:
    checkpoints.claim(tmp_path / 'run', {'model': {'depth': 2, 'width': 4}, 'mesh': (1, 2)})
  assert 'depth' not in str(error.value)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A workdir as a training run leaves it, written from eight devices."""
  workdir = tmp_path_factory.mktemp('trained')
  checkpoints.describe_model(workdir, MODEL, 'byte')
  model = jax.jit(transformer.init_params, static_argnums=0)(MODEL, jax.random.key(0))
  params = {'model': model, 'projectors': {'0': jnp.ones((4, 4))}}
  mesh = sharding.make_mesh((2, 2, 2))
  names = {'model': transformer.param_names(MODEL), 'projectors': {'0': PartitionSpec()}}
  placed = jax.device_put(params, sharding.shardings(names, params, mesh))
  opened = checkpoints.open_checkpoints(workdir)
  opened.save(TrainState(jnp.asarray(4, jnp.int32), placed, {}, None), META)
  opened.close()
  return workdir, params['model']


def test_load_model_of_a_workdir(trained):
  workdir, params = trained
  model = checkpoints.load_model(workdir)
  assert (model.config, model.step, model.tokenizer.name) == (MODEL, 4, 'byte')
  assert_equal(model.params, params)
  assert model.fingerprint == checkpoints.fingerprint(params)
  assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(model.params)} == {1}


def test_load_model_of_a_step(tmp_path):
  checkpoints.describe_model(tmp_path, MODEL, 'byte')
  opened = checkpoints.open_checkpoints(tmp_path)
  models = [jax.jit(transformer.init_params, static_argnums=0)(MODEL, jax.random.key(i)) for i in (1, 2)]
  for step, model in enumerate(models, start=1):
    opened.save(TrainState(jnp.int32(step), {'model': model}, {}), META)
  opened.close()
  for step, model in ((None, models[1]), (1, models[0]), (2, models[1])):
    found = checkpoints.load_model(tmp_path, step=step)
    assert found.step == (step or 2)
    assert_equal(found.params, model)
  with pytest.raises(ConfigError, match=r'keeps no checkpoint of step 3; choose from \[2, 1\]'):
    checkpoints.load_model(tmp_path, step=3)


def test_load_model_puts_it_on_the_current_mesh(trained):
  workdir, params = trained
  with jax.set_mesh(sharding.make_mesh((1, 4, 2))):
    model = checkpoints.load_model(workdir, dtype='bfloat16')
  assert model.params['embedding'].sharding.spec == PartitionSpec('tensor', 'fsdp')
  assert_equal(model.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_load_model_says_what_is_wrong(tmp_path):
  with pytest.raises(ConfigError, match='holds no model'):
    checkpoints.load_model(tmp_path)
  checkpoints.describe_model(tmp_path, MODEL, 'byte')
  with pytest.raises(ConfigError, match='no finished checkpoint'):
    checkpoints.load_model(tmp_path)
  opened = checkpoints.open_checkpoints(tmp_path)
  opened.save(state(1), META)
  opened.close()
  truncate(tmp_path, 1)
  with pytest.raises(ConfigError, match='checkpoint 1 of .* is damaged'):
    checkpoints.load_model(tmp_path)
