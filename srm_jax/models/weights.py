"""Published checkpoints in and out: folders of config.json and safetensors, as Hugging Face transformers writes them.

Each family's table says where a parameter lies; the same table reads and writes. A device's slice of a parameter is
read straight into memory that JAX takes over: the model is never twice on the host.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

from srm_jax import sharding
from srm_jax.models import tensor_files, transformer
from srm_jax.models.config import TransformerConfig
from srm_jax.models.families import FAMILIES
from srm_jax.models.families.family import Family, Piece, UnsupportedError
from srm_jax.models.tensor_files import TensorSource
from srm_jax.models.tensor_header import CheckpointError, TensorInfo
from srm_jax.types import Params

CONFIG = 'config.json'
READERS = 2  # threads of a load; each holds one block beside the model
OURS = ('dtype', 'param_dtype', 'remat', 'unroll')  # fields of a config that no published file knows
# The text part of a model that also sees pictures, under the names that it has alone.
PREFIXES = (('language_model.model.', 'model.'), ('model.language_model.', 'model.'), ('language_model.', ''))
NO_TOKENS = dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'))  # some readers would assume their own
BUFFERS = ('rotary_emb.inv_freq',)  # written by old versions, computed by all


class Part(NamedTuple):
  """A parameter of ours, or one layer (and expert) of it: `name` is the tensor that holds it."""

  path: tuple[str, ...]
  place: tuple[int, ...]
  name: str
  piece: Piece


def load_pretrained(folder, *, dtype: str | None = None) -> tuple[TransformerConfig, Params]:
  """A published model, on the current mesh (or one device).

  Args:
    folder: local, or one that epath knows (gs://...), with config.json and safetensors.
    dtype: what the parameters are cast to and computed in; None keeps that of the checkpoint's embedding.

  Returns:
    (config, params); config.dtype and config.param_dtype are the parameters' dtype, and may be replaced.

  Raises:
    UnsupportedError: an architecture, or a key of config.json, that is not built here.
    CheckpointError: missing, extra, misshapen or damaged tensors, each named with its file; found before any is read.
  """
  family, config = read_config(folder)
  infos = {_plain(name): info for name, info in tensor_files.open_folder(folder).items()}
  shapes = param_shapes(config)
  parts = list(_parts(family, config, shapes))
  _check(folder, family, config, infos, parts, shapes)
  stored = infos[parts[0].name].dtype
  wanted = np.dtype(jnp.dtype(dtype)) if dtype else stored
  config = _with_dtype(config, wanted)
  by_path: dict[tuple[str, ...], list[Part]] = {}
  for part in parts:
    by_path.setdefault(part.path, []).append(part)
  places = _places(config, shapes)

  def make(path):
    return jax.make_array_from_callback(
        shapes[path], places[path], lambda index: _read(by_path[path], infos, shapes[path], index, wanted)
    )

  # Reading and transposing leave the interpreter alone, so that a second thread helps.
  with ThreadPoolExecutor(READERS) as pool:
    params = dict(zip(shapes, pool.map(make, shapes)))
  return config, traverse_util.unflatten_dict(params)


def save_pretrained(folder, config: TransformerConfig, params: Params, *, dtype: str | None = None,
                    extra: Mapping[str, Any] | None = None, max_shard_bytes: int = 5 * 2**30, overwrite: bool = False):
  """Writes config.json and safetensors that transformers and `load_pretrained` read.

  The family is the first that can say all that the config says; one tensor at a time is in memory.

  Args:
    dtype: of the written tensors; None keeps the parameters'.
    extra: further keys of config.json, such as eos_token_id.
    max_shard_bytes: of tensors in one file; more make several files and an index.
    overwrite: replaces the weights of an earlier call.

  Raises:
    UnsupportedError: no family can say this config.
    CheckpointError: the folder holds weights already.
  """
  name = family_of(config)
  flat = traverse_util.flatten_dict(params)
  shapes = {path: leaf.shape for path, leaf in flat.items()}
  wanted = np.dtype(jnp.dtype(dtype)) if dtype else None
  sources = list(_sources(FAMILIES[name], config, flat, shapes, wanted))
  folder = epath.Path(folder)
  tensor_files.write_folder(folder, sources, max_shard_bytes=max_shard_bytes, overwrite=overwrite)
  words = {
      'architectures': [FAMILIES[name].architectures[0]], 'model_type': FAMILIES[name].model_type,
      **FAMILIES[name].write(config), 'torch_dtype': str(sources[0].dtype), **NO_TOKENS, **(extra or {}),
  }
  temporary = folder / f'{CONFIG}.tmp'
  temporary.write_text(json.dumps(words, indent=2, sort_keys=True) + '\n')
  temporary.replace(folder / CONFIG)


def read_config(folder) -> tuple[Family, TransformerConfig]:
  """Family and config of a published model's config.json.

  Raises:
    UnsupportedError, CheckpointError: as `load_pretrained`.
  """
  path = epath.Path(folder) / CONFIG
  if not path.exists():
    raise CheckpointError(f'{folder} has no {CONFIG}; give the folder of a published model')
  try:
    words = json.loads(path.read_text())
    named = words.get('architectures') or []
  except (ValueError, AttributeError) as error:
    raise CheckpointError(f'{path} is no JSON object ({error}); download it again') from error
  for family in FAMILIES.values():
    if set(named) & set(family.architectures):
      try:
        return family, family.read(words)
      except UnsupportedError as error:
        raise UnsupportedError(f'{folder}/{error}') from error
      except (TypeError, KeyError, ValueError) as error:
        raise UnsupportedError(f'{path} cannot be read as {named[0]}: {error!r}') from error
  known = sorted(name for family in FAMILIES.values() for name in family.architectures)
  raise UnsupportedError(f'{path}: architectures {named} are not supported; known are {known}')


def family_of(config: TransformerConfig) -> str:
  """The first family whose config.json says all that this config says.

  Raises:
    UnsupportedError: there is none.
  """
  want = _published(config)
  for name, family in FAMILIES.items():
    try:
      if _published(family.read(family.write(config))) == want:
        return name
    except (UnsupportedError, ValueError, ZeroDivisionError, TypeError, KeyError):
      continue
  raise UnsupportedError(f'none of the families {sorted(FAMILIES)} has all of {config}; nothing could read it back')


def _published(config: TransformerConfig):
  """What of a config a published file can say; the base of local layers counts only where there are some."""
  fields = {key: value for key, value in vars(config).items() if key not in OURS}
  return fields | ({} if config.window else {'local_rope_base': None}) | {'rope_dim': config.rotary_dim}


def param_shapes(config: TransformerConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
  """{path: shape} of all parameters."""
  flat = traverse_util.flatten_dict(nn.meta.unbox(transformer.abstract_params(config)))
  return {path: leaf.shape for path, leaf in flat.items()}


def _with_dtype(config, dtype):
  return dataclasses.replace(config, dtype=str(dtype), param_dtype=str(dtype))


def _places(config, shapes):
  """{path: sharding} on the current mesh, or one device."""
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return dict.fromkeys(shapes, place)
  abstract = nn.meta.unbox(transformer.abstract_params(config))
  return traverse_util.flatten_dict(sharding.shardings(transformer.param_names(config), abstract, mesh))


def _plain(name: str) -> str:
  for prefix, alone in PREFIXES:
    if name.startswith(prefix):
      return alone + name.removeprefix(prefix)
  return name


def _parts(family: Family, config: TransformerConfig, shapes) -> Iterator[Part]:
  """Every tensor that the model needs, in the order of the parameters.

  Raises:
    UnsupportedError: the family's table has no entry for a parameter of this config, or one too many.
  """
  table = family.table(config)
  if table.keys() != shapes.keys():
    raise UnsupportedError(f'a {family.model_type} has other parameters: {sorted(table.keys() ^ shapes.keys())[:4]}')
  for path, piece in table.items():
    counts = shapes[path][: 2 if '{expert}' in piece.name else 1 if '{layer}' in piece.name else 0]
    for place in np.ndindex(*counts):
      yield Part(path, place, piece.name.format(**dict(zip(('layer', 'expert'), place))), piece)


def _their_shape(part: Part, shape) -> tuple[int, ...]:
  """Shape of the tensor that holds a part of a parameter of this shape."""
  own, inputs = shape[len(part.place) :], part.piece.inputs
  if inputs is None:
    return own
  rows = part.piece.total or math.prod(own[inputs:])
  return (rows, math.prod(own[:inputs])) if inputs else (rows,)


def _check(folder, family: Family, config, infos: Mapping[str, TensorInfo], parts, shapes):
  """Everything that can be wrong with the names and shapes, at once and before anything is read."""
  wanted = {part.name: _their_shape(part, shapes[part.path]) for part in parts}
  free = {'lm_head.weight'} if config.tie_embeddings else set()  # some write the tied head a second time
  missing = [name for name in wanted if name not in infos]
  extra = [
      name for name in infos
      if name not in wanted and name not in free and not name.startswith(family.ignored) and not name.endswith(BUFFERS)
  ]
  wrong = [
      f'{infos[name].place} has shape {infos[name].shape}, not {shape}'
      for name, shape in wanted.items() if name in infos and infos[name].shape != shape
  ]
  found = [f'{len(names)} tensors are {word}: {", ".join(names[:5])}' for word, names in
           (('missing', missing), ('not known', extra), ('misshapen', wrong)) if names]
  if found:
    raise CheckpointError(f'{folder} does not hold the {family.model_type} of its {CONFIG}: {"; ".join(found)}')


def _read(parts: list[Part], infos, shape, index, dtype) -> np.ndarray:
  """The slice `index` of a parameter, all its layers (and experts) in one array."""
  spans = [range(*one.indices(size)) for one, size in zip(index, shape, strict=True)]
  out = tensor_files.aligned_empty([len(span) for span in spans], dtype)
  depth = len(parts[0].place)
  for part in parts:
    places = [span.index(at) if at in span else None for at, span in zip(part.place, spans)]
    if None not in places:
      _read_part(part, infos[part.name], shape[depth:], spans[depth:], out[tuple(places)])
  return out


def _read_part(part: Part, info: TensorInfo, shape, spans, out: np.ndarray):
  """One tensor's share, transposed on the way where it is a matrix.

  Raises:
    CheckpointError: an axis other than the first input and the first output is split over devices.
  """
  inputs = part.piece.inputs
  if inputs is None:
    tensor_files.read_into(info, out, tuple(slice(span.start, span.stop) for span in spans))
    return
  rows = _flat_span(shape[inputs:], spans[inputs:], info)
  rows = slice(rows.start + part.piece.start, rows.stop + part.piece.start)
  if not inputs:
    tensor_files.read_into(info, out.reshape(-1), (rows,))
    return
  columns = _flat_span(shape[:inputs], spans[:inputs], info)
  flat = out.reshape(columns.stop - columns.start, rows.stop - rows.start)
  tensor_files.read_into(info, flat.T, (rows, columns))


def _flat_span(shape, spans, info) -> slice:
  """Where a block lies on the flattened axes; only the first may be split."""
  inner = math.prod(shape[1:])
  if any(len(span) != size for span, size in zip(spans[1:], shape[1:], strict=True)):
    raise CheckpointError(f'{info.place}: cannot be split over devices on axes {shape[1:]}; change sharding.RULES')
  return slice(spans[0].start * inner, spans[0].stop * inner)


def _sources(family: Family, config, flat, shapes, dtype) -> Iterator[TensorSource]:
  """Tensors to write, in the order of the table; fused ones are joined from their parts."""
  together: dict[str, list[Part]] = {}
  for part in _parts(family, config, shapes):
    together.setdefault(part.name, []).append(part)
  for name, parts in together.items():
    kind = dtype or np.dtype(flat[parts[0].path].dtype)
    shape = _their_shape(parts[0], shapes[parts[0].path])
    yield TensorSource(name, kind, shape, lambda parts=parts, kind=kind: _written(parts, flat, kind))


def _written(parts: list[Part], flat, dtype) -> np.ndarray:
  blocks = []
  for part in sorted(parts, key=lambda part: part.piece.start):
    value, inputs = np.asarray(jax.device_get(flat[part.path][part.place])), part.piece.inputs
    if inputs is not None:
      value = value.reshape(math.prod(value.shape[:inputs]), -1).T if inputs else value.reshape(-1)
    blocks.append(value)
  return np.ascontiguousarray(np.concatenate(blocks) if len(blocks) > 1 else blocks[0], dtype)
