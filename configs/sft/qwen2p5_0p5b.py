"""Supervised fine-tuning of a model of the Qwen2.5-0.5B shape on worked solutions, rows of 4096 tokens.

Run: python -m experiments.train --config=configs/sft/qwen2p5_0p5b.py --config.tokenizer=DIR --config.init_from=DIR \\
       --workdir=runs/qwen
Plan: python -m experiments.plan --config=configs/sft/qwen2p5_0p5b.py --topology=v5e:4x4
Hardware: 16 TPU v5e chips. Status: compiled for v5e:4x4 only, not yet run there.
Shape: Qwen2.5 Technical Report, arXiv:2412.15115, and the published config.json of Qwen2.5-0.5B.
"""

from configs import base


def get_config(arg: str = ''):
  """arg: 'smoke' shrinks it to a CPU minute."""
  a = base.parse_arg(arg, smoke=False)
  if a.smoke:
    shape = dict(embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=128, max_length=256)
  else:
    shape = dict(
        embed_dim=896, num_layers=24, num_heads=14, num_kv_heads=2, mlp_dim=4864, max_length=4096, vocab_size=151_936,
        rope_base=1_000_000.0,
    )
  return base.train(
      base.sft(
          base.data('arithmetic_mix' if a.smoke else 'gsm8k', count=200 if a.smoke else 0),
          base.batch(4, 128) if a.smoke else base.batch(64, 4096), head_chunk=None,
      ),
      tokenizer='byte' if a.smoke else '', model=base.model(**shape, qkv_bias=True, dtype='bfloat16', remat='full'),
      optimizer=base.optimizer('adamw', learning_rate=1e-5, matrix_learning_rate=0.0, schedule='cosine', b2=0.999),
      num_steps=5 if a.smoke else 1000, mesh=() if a.smoke else (1, 16, 1),
  )
