"""What the presets of configs/rl share: arithmetic problems, sizes of a step, a small model and where it starts."""

from configs import base

DEFAULTS = dict(
    start='runs/logits', prompts=32, samples=8, steps=50, max_new_tokens=128, learning_rate=3e-4, smoke=False,
)


def run(arg: str, *, kl=0.0, choices=None, rollouts=None, budget=None):
  """The training run of a preset.

  Args:
    arg: of the config; DEFAULTS names what it may change, and kl.
    kl: default weight of a penalty to the policy that the run starts from; 0 loads no reference.
    choices: (arguments) -> what base.policy_gradient is told.
    rollouts: (arguments) -> what base.rollouts is told besides sizes.
    budget: numbers of tokens that problems ask for.
  """
  a = base.parse_arg(arg, kl=kl, **DEFAULTS)
  if a.smoke:
    a.update(prompts=2, samples=4, steps=2, max_new_tokens=16)
  sampled = base.rollouts(
      prompts=a.prompts, samples=a.samples, length=256, max_new_tokens=a.max_new_tokens,
      **(rollouts(a) if rollouts else {}),
  )
  data = base.data(count=50 if a.smoke else 4000, seed=3, budget=budget)
  reference = dict(kl=a.kl, reference=a.start if a.kl else '')
  recipe = base.policy_gradient(data, sampled, **reference, **(choices(a) if choices else {}))
  return base.train(
      recipe, tokenizer='byte', model=base.model(embed_dim=64, num_layers=3, num_heads=4, mlp_dim=192),
      init_from=a.start, num_steps=a.steps,
      optimizer=base.optimizer('adamw', learning_rate=a.learning_rate, schedule='constant', weight_decay=0.0),
  )
