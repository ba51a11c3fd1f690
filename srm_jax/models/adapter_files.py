"""Adapters in and out, as `peft` writes them: a folder of adapter_config.json and adapter_model.safetensors.

Each family's table says which published matrix a projection is; peft's names are made of that matrix's.
Left out, and refused by name: ranks or alphas of some modules, trained biases, embeddings and heads, and
initialisations that change the base (PiSSA, OLoRA, LoftQ, CorDA).
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from srm_jax import sharding
from srm_jax.models import adapters, tensor_files, weights
from srm_jax.models.adapters import AdapterConfig
from srm_jax.models.config import TransformerConfig
from srm_jax.models.families import FAMILIES
from srm_jax.models.families.family import Piece, UnsupportedError
from srm_jax.models.tensor_files import TensorSource
from srm_jax.models.tensor_header import CheckpointError, TensorInfo, no_pickles
from srm_jax.types import Params

CONFIG, TENSORS = 'adapter_config.json', 'adapter_model.safetensors'
PREFIX = 'base_model.model.'
# Ours -> end of theirs; theirs are transposed.
SUFFIXES = {'a': 'lora_A.weight', 'b': 'lora_B.weight', 'magnitude': 'lora_magnitude_vector'}
# What a file may say where only this is built.
ONLY: Mapping[str, Any] = dict(
    peft_type='LORA', bias='none', fan_in_fan_out=False, modules_to_save=None, rank_pattern={}, alpha_pattern={},
    layer_replication=None, lora_bias=False, use_qalora=False, use_bdlora=None, target_parameters=None,
    trainable_token_indices=None, alora_invocation_tokens=None,
)
PLAIN_STARTS = (None, True, False, 'gaussian', 'orthogonal', 'eva')  # that leave the base as it was
RSLORA, PLAIN = 'alpha/sqrt(r)', 'alpha/r'


def save_adapters(folder, config: TransformerConfig, adapter: AdapterConfig, tree: Params, *, base: str = ''):
  """Writes adapters so that `peft.PeftModel.from_pretrained(model, folder)` reads them.

  Args:
    folder: made where it is missing; earlier adapters in it are replaced.
    tree: as `adapters.init_adapters` makes it.
    base: where peft finds the base model, a folder or a name.

  Raises:
    UnsupportedError: a projection that the published model keeps as a part of a larger matrix.
  """
  folder = epath.Path(folder)
  modules = {place: _module(config, *place) for place in _places(config, adapter)}
  sources = list(_sources(adapters.targeted(config, adapter), modules, jax.device_get(tree)))
  folder.mkdir(parents=True, exist_ok=True)
  tensor_files.write_file(folder / TENSORS, sources)
  alpha = int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
  words = ONLY | dict(
      r=adapter.rank, lora_alpha=alpha, use_rslora=adapter.scaling == RSLORA, use_dora=adapter.kind == 'dora',
      target_modules=list(modules.values()), task_type='CAUSAL_LM', lora_dropout=0.0, inference_mode=True,
      init_lora_weights=True, base_model_name_or_path=base or None,
  )
  temporary = folder / f'{CONFIG}.tmp'
  temporary.write_text(json.dumps(words, indent=2, sort_keys=True) + '\n')
  temporary.replace(folder / CONFIG)


def load_adapters(folder, config: TransformerConfig) -> tuple[AdapterConfig, Params]:
  """Adapters that peft or `save_adapters` wrote, for a base of this config, on the current mesh.

  Raises:
    UnsupportedError: adapter_config.json says something that is not built here.
    CheckpointError: missing, unknown or misshapen tensors, each named; found before any is read.
  """
  folder = epath.Path(folder)
  words = _read_words(folder)
  infos = _open(folder)
  kind = 'dora' if words.get('use_dora') else 'lora'
  found = _assign(folder, config, infos, [key for key in SUFFIXES if key != 'magnitude' or kind == 'dora'])
  layers = {name: [layer for other, layer in found if other == name] for name, _ in found}
  targets = tuple(
      target for name, some in layers.items()
      for target in ([name] if len(some) == config.num_layers else [f'{layer}/{name}' for layer in some])
  )
  scaling = RSLORA if words.get('use_rslora') else PLAIN
  adapter = AdapterConfig(words['r'], float(words['lora_alpha']), targets, kind, scaling)
  _check_shapes(folder, config, adapter, found)
  made = {
      name: {key: np.stack([tensor_files.read(found[name, layer][key]).T for layer in some])
             for key in found[name, some[0]]}
      for name, some in layers.items()
  }
  return adapter, _placed(config, adapter, adapters._nest(made))


def _placed(config, adapter, tree):
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return jax.device_put(tree)
  return jax.device_put(tree, sharding.shardings(adapters.adapter_names(config, adapter), tree, mesh))


def _places(config, adapter) -> Iterator[tuple[str, int]]:
  for name, layers in adapters.targeted(config, adapter).items():
    for layer in layers:
      yield name, layer


def _piece(config: TransformerConfig, name: str) -> tuple[str, Piece]:
  family = FAMILIES[weights.family_of(config)]
  return family.model_type, family.table(config)[('layers', *name.split('/'), 'kernel')]


def _module(config, name: str, layer: int) -> str:
  """'model.layers.0.self_attn.q_proj' of ('attention/q', 0)."""
  model_type, piece = _piece(config, name)
  if piece.total:
    raise UnsupportedError(
        f'{name}: a published {model_type} keeps it as rows of {piece.name}, and peft knows only adapters of all of '
        'them; train others, or merge the adapters and save the model'
    )
  return piece.name.format(layer=layer).removesuffix('.weight')


def _sources(targeted, modules, tree) -> Iterator[TensorSource]:
  for (name, layer), module in modules.items():
    for key, value in adapters._at(tree['layers'], name).items():
      matrix = np.ascontiguousarray(value[targeted[name].index(layer)].T)
      yield tensor_files.source(f'{PREFIX}{module}.{SUFFIXES[key]}', matrix)


def _read_words(folder) -> dict[str, Any]:
  path = folder / CONFIG
  if not path.exists():
    raise CheckpointError(f'{folder} has no {CONFIG}; give a folder that peft or save_adapters wrote')
  try:
    words = json.loads(path.read_text())
    strange = {key: words[key] for key, only in ONLY.items() if (words.get(key) or None) != (only or None)}
  except (ValueError, AttributeError, KeyError) as error:
    raise CheckpointError(f'{path} is no description of adapters ({error!r}); write it again') from error
  if words.get('init_lora_weights') not in PLAIN_STARTS:
    strange['init_lora_weights'] = words['init_lora_weights']
  for key, value in strange.items():
    raise UnsupportedError(f'{path}: {key}={value!r} is not supported, only {ONLY.get(key, PLAIN_STARTS)!r}')
  for key in ('r', 'lora_alpha'):
    if isinstance(words.get(key), bool) or not isinstance(words.get(key), int | float) or words[key] <= 0:
      raise CheckpointError(f'{path}: {key}={words.get(key)!r} is no positive number')
  return words


def _open(folder) -> dict[str, TensorInfo]:
  if not (folder / TENSORS).exists():
    raise CheckpointError(f'{folder} has no {TENSORS}. {no_pickles(folder)}')
  return tensor_files.open_file(folder / TENSORS)


def _assign(folder, config, infos, wanted) -> dict[tuple[str, int], dict[str, TensorInfo]]:
  """{(projection, layer): {'a': tensor, ...}} in the order of the model, each complete."""
  modules = {}
  for name in adapters.kernels(config):
    if not _piece(config, name)[1].total:
      modules |= {_module(config, name, layer): (name, layer) for layer in range(config.num_layers)}
  pattern = re.compile(re.escape(PREFIX) + rf'(.+)\.({"|".join(map(re.escape, SUFFIXES.values()))})')
  keys, found, unknown = {suffix: key for key, suffix in SUFFIXES.items()}, {}, []
  for full, info in infos.items():
    match = pattern.fullmatch(full.removesuffix('.weight') if 'magnitude' in full else full)
    if match and match[1] in modules and keys[match[2]] in wanted:
      found.setdefault(modules[match[1]], {})[keys[match[2]]] = info
    else:
      unknown.append(full)
  missing = [f'{SUFFIXES[key]} of {name} in layer {layer}' for (name, layer), have in found.items()
             for key in wanted if key not in have]
  for word, names in (('not known', unknown), ('missing', missing)):
    if names:
      raise CheckpointError(f'{folder / TENSORS}: {len(names)} tensors are {word}: {", ".join(names[:5])}')
  if not found:
    raise CheckpointError(f'{folder / TENSORS} holds no tensors; write it again')
  return {place: found[place] for place in modules.values() if place in found}


def _check_shapes(folder, config, adapter, found):
  for (name, _), have in found.items():
    inputs, outputs = adapters.kernels(config)[name].matrix
    shapes = {'a': (adapter.rank, inputs), 'b': (outputs, adapter.rank), 'magnitude': (outputs,)}
    for key, info in have.items():
      if info.shape != shapes[key]:
        raise CheckpointError(f'{info.place} has shape {info.shape}, not {shapes[key]} as the model and {CONFIG} say')
