"""Between runs and published models.

python -m experiments.convert --source=runs/rl --target=DIR [--dtype=bfloat16] [--evaluation=runs/evaluation ...]
python -m experiments.convert --source=runs/lora --target=DIR --adapters
python -m experiments.convert --source=DIR --target=runs/qwen [--dtype=float32]

A run's workdir becomes a folder that Hugging Face transformers loads (config, safetensors, tokenizer, generation
config, model card); a published folder becomes a workdir with an Orbax checkpoint. Neither is needed inside srm_jax:
wherever a config wants a workdir (teacher, init_from, model), a published folder will do.
"""

from absl import app, flags

from experiments import command, runtime

SOURCE = flags.DEFINE_string('source', None, 'Workdir of a run, or folder of a published model.', required=True)
TARGET = flags.DEFINE_string('target', None, 'Where the other form goes.', required=True)
DTYPE = flags.DEFINE_string('dtype', '', 'Of the written parameters; theirs by default.')
EVALUATION = flags.DEFINE_multi_string('evaluation', [], 'Workdir of an evaluation whose scores go into the card.')
ADAPTERS = flags.DEFINE_bool('adapters', False, 'Write the adapters alone, as peft reads them, not merged.')
OVERWRITE = flags.DEFINE_bool('overwrite', False, 'Replace the weights of an earlier conversion.')


def run():
  from srm_jax import checkpoints, export

  dtype = DTYPE.value or None
  if ADAPTERS.value:
    export.export_adapters(SOURCE.value, TARGET.value)
    print(f'{TARGET.value}: adapters, for peft')
  elif checkpoints.is_published(SOURCE.value):
    export.take_in(SOURCE.value, TARGET.value, dtype=dtype)
    print(f'{TARGET.value}: a workdir with its checkpoint')
  else:
    export.export(
        SOURCE.value, TARGET.value, dtype=dtype, evaluations=EVALUATION.value, overwrite=OVERWRITE.value
    )
    print(f'{TARGET.value}: config, weights, tokenizer and card')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}')
  command.show_progress_of_library()
  runtime.prepare()
  command.guarded(run)


if __name__ == '__main__':
  app.run(main)
