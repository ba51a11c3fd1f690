"""GRPO of a published model with the task's verifier, prompts of up to 1024 tokens and completions of up to 3072.

Run: python -m experiments.train --config=configs/rl/published.py:model=DIR --workdir=runs/grpo
Plan: python -m experiments.plan --config=configs/rl/published.py --topology=v5e:4x4
Hardware: 16 TPU v5e chips. Status: the update compiled for v5e:4x4 (Qwen2.5-1.5B); no published weights have run.
DIR has config.json, safetensors and tokenizer.json; a preset's name in its place has the shape alone, for plan.
Problems are put through the chat template. With kl=0.001 the start is the reference policy.
Reference: Shao et al., DeepSeekMath, arXiv:2402.03300; the setting: Zeng et al., SimpleRL-Zoo, arXiv:2503.18892.
"""

from configs import base
from srm_jax.models.families import PRESETS


def get_config(arg: str = ''):
  """arg: 'model=DIR', 'prompts=2,samples=8' (a step's rows), 'kl=0.001', 'format=plain', 'smoke'."""
  a = base.parse_arg(
      arg, model='qwen2.5-1.5b', prompts=2, samples=8, length=4096, new_tokens=3072, kl=0.0, format='chat', smoke=False,
  )
  known = a.model in PRESETS
  how = dict(dtype='bfloat16', param_dtype='float32', remat='full', max_length=a.length)
  if a.smoke:
    how |= dict(dtype='float32', max_length=512)
  if a.smoke and known:
    how |= dict(vocab_size=0, num_layers=2, embed_dim=64, head_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=128)
  data = base.data(
      'arithmetic_mix' if a.smoke else 'gsm8k', count=32 if a.smoke else 0,
      prompting=base.prompt('plain' if known and a.smoke else a.format),
  )
  rollouts = base.rollouts(
      prompts=a.prompts, samples=a.samples, length=512 if a.smoke else a.length,
      max_new_tokens=16 if a.smoke else a.new_tokens,
  )
  return base.train(
      base.policy_gradient(data, rollouts, kl=a.kl, reference=a.model if a.kl else ''),
      tokenizer=('byte' if a.smoke else '') if known else a.model, init_from='' if known else a.model,
      model=base.preset(a.model, **how) if known else base.model_of(a.model, **how),
      optimizer=base.optimizer('adamw', learning_rate=1e-6, matrix_learning_rate=0.0, schedule='constant', b2=0.999),
      num_steps=2 if a.smoke else 200, mesh=() if a.smoke or not known else (1, 16, 1),
  )
