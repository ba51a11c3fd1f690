"""Adapters for a published model of the Qwen2.5-0.5B shape: LoRA of rank 16 on all projections, the rest frozen in nf4.

Run: python -m experiments.train --config=configs/sft/lora.py --config.tokenizer=DIR --config.init_from=DIR \\
       --workdir=runs/lora
Plan: python -m experiments.plan --config=configs/sft/lora.py --topology=v5e:4x4
Any other run takes the same section: --config.adapters.rank=16 --config.adapters.base=int8 --config.adapters.kind=dora
Hardware: one accelerator of 16 GB. Status: not yet run at this size.
Reference: Hu et al., LoRA, arXiv:2106.09685; Dettmers et al., QLoRA, arXiv:2305.14314.
"""

from configs import base
from configs.sft import qwen2p5_0p5b


def get_config(arg: str = ''):
  """arg: 'smoke' shrinks it to a CPU minute."""
  config = qwen2p5_0p5b.get_config(arg)
  config.adapters = base.adapters(16, base='nf4')
  config.optimizer.learning_rate = 2e-4
  if not base.parse_arg(arg, smoke=False).smoke:
    config.recipe.batch.size = 16
    config.mesh = ()
  return config
