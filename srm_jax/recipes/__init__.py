"""RECIPES: name -> build(config.recipe, Context) -> Recipe; CONFIGS: name -> the record that config.recipe must fit."""

from srm_jax.recipes import distill, on_policy_distill, policy_gradient, sft

RECIPES = {
    'sft': sft.build,
    'distill': distill.build,
    'on_policy_distill': on_policy_distill.build,
    'policy_gradient': policy_gradient.build,
}

CONFIGS = {
    'sft': sft.SFTConfig,
    'distill': distill.DistillConfig,
    'on_policy_distill': on_policy_distill.OnPolicyDistillConfig,
    'policy_gradient': policy_gradient.PolicyGradientConfig,
}
