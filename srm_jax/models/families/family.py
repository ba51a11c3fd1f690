"""What a family of published models is: shapes, the words of its config.json, and where its weights lie."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from srm_jax.models import rope
from srm_jax.models.config import RopeScaling, TransformerConfig


class Piece(NamedTuple):
  """Where a parameter lies in a checkpoint.

  name: of the tensor, with {layer} and {expert} where there is one for each. inputs: how many leading axes of ours
  (after layer and expert) are a matrix's inputs; theirs is then [outputs, inputs], both flat; 0: theirs is one flat
  axis; None: theirs is as ours. start, total: first row of ours in a fused tensor, and its rows (0: not fused).
  """

  name: str
  inputs: int | None = 0
  start: int = 0
  total: int = 0


Table = dict[tuple[str, ...], Piece]  # path in the parameter tree -> piece


class Family(NamedTuple):
  """A family of published models.

  architectures: names in config.json that are read; the first is written. model_type: written. presets: shapes by
  name. read: content of config.json -> config. write: the reverse. table: where the weights lie. notes: what its chat
  template and tokenizer do that others do not. ignored: beginnings of tensor names that are no part of the text model.
  """

  architectures: tuple[str, ...]
  model_type: str
  presets: Mapping[str, TransformerConfig]
  read: Callable[[Mapping[str, Any]], TransformerConfig]
  write: Callable[[TransformerConfig], dict[str, Any]]
  table: Callable[[TransformerConfig], Table]
  notes: str
  ignored: tuple[str, ...] = ()


LAYER = 'model.layers.{layer}.'
TYPES = {'full_attention': 'g', 'sliding_attention': 'l'}


def dense_table(config: TransformerConfig) -> Table:
  """The names that Llama began with, and nearly all others kept."""
  layer = {
      ('attention', 'q', 'kernel'): Piece('self_attn.q_proj.weight', 1),
      ('attention', 'k', 'kernel'): Piece('self_attn.k_proj.weight', 1),
      ('attention', 'v', 'kernel'): Piece('self_attn.v_proj.weight', 1),
      ('attention', 'out', 'kernel'): Piece('self_attn.o_proj.weight', 2),
      ('mlp', 'gate', 'kernel'): Piece('mlp.gate_proj.weight', 1),
      ('mlp', 'up', 'kernel'): Piece('mlp.up_proj.weight', 1),
      ('mlp', 'down', 'kernel'): Piece('mlp.down_proj.weight', 1),
      ('attention_norm', 'scale'): Piece('input_layernorm.weight'),
      ('mlp_norm', 'scale'): Piece('post_attention_layernorm.weight'),
  }
  if config.qkv_bias:
    layer |= {('attention', name, 'bias'): Piece(f'self_attn.{name}_proj.bias') for name in 'qkv'}
  if config.qk_norm:
    layer |= {('attention', f'{name}_norm', 'scale'): Piece(f'self_attn.{name}_norm.weight') for name in 'qk'}
  return outer_table(config) | in_layers(layer)


def in_layers(layer: Table) -> Table:
  """A table of one layer as part of the whole model's."""
  return {('layers', *path): piece._replace(name=LAYER + piece.name) for path, piece in layer.items()}


def outer_table(config: TransformerConfig) -> Table:
  """Embedding, last norm and head."""
  table = {
      ('embedding',): Piece('model.embed_tokens.weight', None),
      ('final_norm', 'scale'): Piece('model.norm.weight'),
  }
  return table if config.tie_embeddings else table | {('head',): Piece('lm_head.weight', 1)}


class UnsupportedError(ValueError):
  """A published model that uses something that is not built here. The message names the key and its value."""


def refuse(hf: Mapping[str, Any], **wanted):
  """Raises UnsupportedError where a key is there and is not what is wanted (a missing or null one is fine)."""
  for key, value in wanted.items():
    if hf.get(key) not in (None, value):
      raise UnsupportedError(f'config.json: {key}={hf[key]!r} is not supported, only {value!r}')


def read_common(hf: Mapping[str, Any], **options) -> dict[str, Any]:
  """Fields of a TransformerConfig that all families spell alike; options replace or add some.

  Raises:
    UnsupportedError: a key that is needed is missing.
  """
  try:
    heads, width = hf['num_attention_heads'], hf['hidden_size']
    fields = dict(
        vocab_size=hf['vocab_size'], num_layers=hf['num_hidden_layers'], embed_dim=width, num_heads=heads,
        num_kv_heads=hf.get('num_key_value_heads') or heads, head_dim=hf.get('head_dim') or width // heads,
        mlp_dim=hf['intermediate_size'], max_length=hf['max_position_embeddings'],
        norm_eps=float(hf['rms_norm_eps']), tie_embeddings=bool(hf.get('tie_word_embeddings', False)),
    )
  except KeyError as error:
    raise UnsupportedError(f'config.json: {error.args[0]} is missing') from error
  return fields | options


def write_common(config: TransformerConfig, **options) -> dict[str, Any]:
  """The reverse of `read_common`, in words that old and new readers know; None leaves a key out."""
  written = dict(
      vocab_size=config.vocab_size, num_hidden_layers=config.num_layers, hidden_size=config.embed_dim,
      num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim,
      intermediate_size=config.mlp_dim, max_position_embeddings=config.max_length, rms_norm_eps=config.norm_eps,
      tie_word_embeddings=config.tie_embeddings, rope_theta=config.rope_base, hidden_act='silu',
      attention_dropout=0.0, initializer_range=0.02, use_cache=True,
  )
  scaling = write_scaling(config.rope_scaling)
  return {
      key: value for key, value in (written | dict(rope_scaling=scaling) | options).items() if value is not None
  }


# Our names of what rope types are made of, beside theirs.
SCALING_KEYS = {
    'linear': dict(factor='factor'),
    'llama3': dict(
        factor='factor', original_length='original_max_position_embeddings', low_freq_factor='low_freq_factor',
        high_freq_factor='high_freq_factor',
    ),
    'yarn': dict(
        factor='factor', original_length='original_max_position_embeddings', beta_fast='beta_fast',
        beta_slow='beta_slow', attention_factor='attention_factor', truncate='truncate',
    ),
    'longrope': dict(
        original_length='original_max_position_embeddings', short_factor='short_factor', long_factor='long_factor',
        attention_factor='attention_factor',
    ),
}


def rope_section(hf: Mapping[str, Any], kind: str = 'full_attention') -> dict[str, Any]:
  """What config.json says of rotary embedding, in its new form (rope_parameters) or the old (rope_scaling)."""
  section = hf.get('rope_parameters') or {}
  section = section.get(kind) or {} if kind in section else section
  return dict(hf.get('rope_scaling') or {}) | dict(section)


def read_rope(hf: Mapping[str, Any], *, base: float = 10_000.0) -> dict[str, Any]:
  """rope_base, rope_dim and rope_scaling of a TransformerConfig; `base` where none is given.

  Raises:
    UnsupportedError: a rope type that is not built here.
  """
  section = rope_section(hf)
  kind = section.get('rope_type') or section.get('type') or 'default'
  share = section.get('partial_rotary_factor') or hf.get('partial_rotary_factor') or 1.0
  head_dim = hf.get('head_dim') or hf['hidden_size'] // hf['num_attention_heads']
  return dict(
      rope_base=float(section.get('rope_theta') or hf.get('rope_theta') or base),
      rope_dim=0 if share == 1.0 else int(head_dim * share),
      rope_scaling=RopeScaling() if kind == 'default' else read_scaling(kind, section, hf),
  )


def read_scaling(kind: str, section: Mapping[str, Any], hf: Mapping[str, Any]) -> RopeScaling:
  """A RopeScaling from a rope section, with what its readers leave to be inferred filled in."""
  if kind not in SCALING_KEYS:
    raise UnsupportedError(f'config.json: rope type {kind!r} is not supported; known are {sorted(SCALING_KEYS)}')
  whole = {'original_max_position_embeddings': hf.get('original_max_position_embeddings')}
  found = {ours: whole.get(theirs) or section.get(theirs) for ours, theirs in SCALING_KEYS[kind].items()}
  if 'truncate' in section:
    found['truncate'] = section['truncate']
  if found.get('original_length', 1) is None:
    found['original_length'] = hf['max_position_embeddings']
  factor = section.get('factor') or hf['max_position_embeddings'] / (found.get('original_length') or 1)
  if 'factor' in found:
    found['factor'] = float(factor)
  if kind in rope.ATTENTION_FACTORS and not found['attention_factor']:
    found['attention_factor'] = rope.ATTENTION_FACTORS[kind](factor, found['original_length'], section)
  return RopeScaling(kind, **{key: value for key, value in found.items() if value is not None})


def write_scaling(scaling: RopeScaling) -> dict[str, Any] | None:
  """rope_scaling of config.json; None where nothing is stretched."""
  if scaling.kind == 'none':
    return None
  values = {theirs: getattr(scaling, ours) for ours, theirs in SCALING_KEYS[scaling.kind].items()}
  return {'rope_type': scaling.kind} | {
      key: list(value) if isinstance(value, tuple) else value for key, value in values.items()
  }


def read_pattern(hf: Mapping[str, Any], types: Sequence[str] | None) -> dict[str, Any]:
  """pattern and window of a TransformerConfig from config.json's layer types (None: all see everything).

  Raises:
    UnsupportedError: a type of layer that is not built here.
  """
  unknown = sorted(set(types or ()) - TYPES.keys())
  if unknown:
    raise UnsupportedError(f'config.json: layer_types {unknown} are not supported; known are {sorted(TYPES)}')
  pattern = shortest_period(''.join(TYPES[name] for name in types)) if types else 'g'
  return dict(pattern=pattern, window=hf['sliding_window'] if 'l' in pattern else 0)


def shortest_period(letters: str) -> str:
  """The shortest string that repeats (and perhaps breaks off) to `letters`."""
  repeats = (letters[:size] for size in range(1, len(letters) + 1))
  return next(one for one in repeats if (one * len(letters))[: len(letters)] == letters)


def write_pattern(config: TransformerConfig) -> list[str]:
  """layer_types of config.json, one a layer."""
  names = {letter: name for name, letter in TYPES.items()} | {'n': 'full_attention'}
  return [names[config.kind(layer)] for layer in range(config.num_layers)]
