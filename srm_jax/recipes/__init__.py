"""RECIPES: name -> build(config.recipe, Context) -> Recipe; CONFIGS: name -> the record that config.recipe must fit."""

from srm_jax.recipes import cross_tokenizer, distill, on_policy_distill, policy_gradient, preference, reward_model, sft

RECIPES = {
    'sft': sft.build,
    'distill': distill.build,
    'cross_tokenizer': cross_tokenizer.build,
    'on_policy_distill': on_policy_distill.build,
    'policy_gradient': policy_gradient.build,
    'preference': preference.build,
    'reward_model': reward_model.build,
}

CONFIGS = {
    'sft': sft.SFTConfig,
    'distill': distill.DistillConfig,
    'cross_tokenizer': cross_tokenizer.CrossTokenizerConfig,
    'on_policy_distill': on_policy_distill.OnPolicyDistillConfig,
    'policy_gradient': policy_gradient.PolicyGradientConfig,
    'preference': preference.PreferenceConfig,
    'reward_model': reward_model.RewardModelConfig,
}
