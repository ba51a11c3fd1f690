"""The folder of a checkpoint, distrusted like its files: which of them hold its tensors, by name and by index."""

import re

from etils import epath

from srm_jax.models import tensor_header
from srm_jax.models.tensor_header import AGAIN, CheckpointError, TensorInfo, open_file, show

SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
WEIGHTS = re.compile(r'.*\.safetensors(\.index\.json)?')
PICKLES = re.compile(r'(pytorch|adapter)_model.*\.bin|.*\.(pt|pth|ckpt)')


def open_folder(folder) -> dict[str, TensorInfo]:
  """All tensors of a folder, in the order in which they lie: model.safetensors, or the shards that its index names.

  Args:
    folder: a local path, or one that epath knows (gs://...).

  Raises:
    CheckpointError: no such folder, no weights, pickled weights only, or anything wrong with the index or a header.
  """
  folder = epath.Path(folder)
  if not folder.is_dir():
    fault = 'is a file' if folder.exists() else 'does not exist'
    raise CheckpointError(f'{folder} {fault}; give the folder that holds {SINGLE}')
  has_single, has_index = (folder / SINGLE).exists(), (folder / INDEX).exists()
  if not has_single and not has_index:
    raise _no_weights(folder)
  if not has_index:
    return open_file(folder / SINGLE)
  weight_map = _weight_map(folder / INDEX)
  if has_single and set(weight_map.values()) != {SINGLE}:
    raise CheckpointError(
      f'{folder} holds both {SINGLE} and {INDEX}, which names other files: remove the one that is of another model')
  return _open_shards(folder, weight_map)


def _weight_map(path) -> dict[str, str]:
  """{tensor: file name} of an index."""
  with tensor_header.opened(path) as stream:
    size = tensor_header.size_of(stream)
    if size > tensor_header.MAX_HEADER:
      raise CheckpointError(f'{path} has {size} bytes; {tensor_header.MAX_HEADER} are allowed; {AGAIN}')
    raw = stream.read(size)
  weight_map = tensor_header.json_object(raw, path, 'index').get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise CheckpointError(f"{path}: 'weight_map' is {show(weight_map)}, not file names by tensor; {AGAIN}")
  for name, file in weight_map.items():
    where = f'{path}: tensor {show(name)} lies in {show(file)}'
    if not isinstance(file, str) or not file.isprintable() or re.search(r'[/\\:]', file) or file in ('', '.', '..'):
      raise CheckpointError(f'{where}, which is not the plain name of a file in this folder; {AGAIN}')
    if not file.endswith('.safetensors'):
      raise CheckpointError(f'{where}, which is no safetensors file. {tensor_header.no_pickles(path.parent)}')
  return weight_map


def _open_shards(folder, weight_map: dict[str, str]) -> dict[str, TensorInfo]:
  """The tensors of all shards, which must be just those that the index names, each where it says."""
  shards = sorted(set(weight_map.values()))
  absent = [shard for shard in shards if not (folder / shard).exists()]
  if absent:
    raise CheckpointError(f'{folder / INDEX} names {show(absent)}, which are not there; download them too')
  found = {}
  for shard in shards:
    for name, info in open_file(folder / shard).items():
      if name in found:
        raise CheckpointError(f'{info.place} is in {found[name].file.name} too; {AGAIN}')
      found[name] = info
  for name, info in found.items():
    if weight_map.get(name) != info.file.name:
      raise CheckpointError(f'{info.place}, but {INDEX} has it in {weight_map.get(name)}; {AGAIN}')
  missing = sorted(weight_map.keys() - found.keys())
  if missing:
    raise CheckpointError(f'{folder / weight_map[missing[0]]}: {INDEX} promises {show(missing)} here; {AGAIN}')
  return found


def matching(folder, pattern: re.Pattern) -> list[str]:
  """Names of the files of a folder that match, sorted."""
  return sorted(path.name for path in folder.iterdir() if pattern.fullmatch(path.name))


def weight_files(folder) -> list[str]:
  """Names of all files of a folder that hold weights, in this format or pickled."""
  return matching(folder, WEIGHTS) + matching(folder, PICKLES)


def _no_weights(folder) -> CheckpointError:
  """Why a folder without model.safetensors and without an index cannot be opened."""
  others, pickles = matching(folder, WEIGHTS), matching(folder, PICKLES)
  if others:
    return CheckpointError(
      f'{folder} holds {show(others)}, but neither {SINGLE} nor {INDEX}: a write or download that was '
      'interrupted, or weights of something else; finish it, or give another folder')
  if pickles:
    return CheckpointError(f'{folder} holds pickled weights only ({show(pickles)}). {tensor_header.no_pickles(folder)}')
  return CheckpointError(f'{folder} holds no weights: neither {SINGLE} nor {INDEX}; give a folder that does')
