"""Supervised fine-tuning of a published model on worked solutions, rows of 4096 tokens.

Run: python -m experiments.train --config=configs/sft/published.py:folder=DIR --workdir=runs/sft
Plan: python -m experiments.plan --config=configs/sft/published.py:preset=llama3.2-3b --topology=v5e:4x4
Hardware: 16 TPU v5e chips. Status: compiled for v5e:4x4 (Qwen2.5-1.5B, Llama-3.2-3B, Gemma-3-4B); the smallest
shapes were run on a CPU. folder has config.json, safetensors and tokenizer.json; a preset has the shape alone.
"""

from configs import base


def get_config(arg: str = ''):
  """arg: 'folder=DIR' or 'preset=NAME' of srm_jax.models.families; 'rows=64,length=4096'; 'format=chat' puts problems
  through the folder's chat template; 'smoke' shrinks it.
  """
  a = base.parse_arg(arg, preset='qwen2.5-1.5b', folder='', rows=64, length=4096, format='plain', smoke=False)
  how = dict(dtype='bfloat16', param_dtype='float32', remat='full', max_length=a.length)
  if a.smoke:
    how |= dict(vocab_size=0, num_layers=2, embed_dim=64, head_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=128)
  return base.train(
      base.sft(
          base.data(
              'arithmetic_mix' if a.smoke else 'gsm8k', count=200 if a.smoke else 0, prompting=base.prompt(a.format),
          ),
          base.batch(4, 128) if a.smoke else base.batch(a.rows, a.length), head_chunk=None,
      ),
      tokenizer=a.folder or ('byte' if a.smoke else ''), init_from=a.folder,
      model=base.model_of(a.folder, **how) if a.folder else base.preset(a.preset, **how),
      optimizer=base.optimizer('adamw', learning_rate=1e-5, matrix_learning_rate=0.0, schedule='cosine', b2=0.999),
      num_steps=5 if a.smoke else 1000, mesh=() if a.smoke or a.folder else (1, 16, 1),
  )
