"""The math of the field as pure functions on arrays: no model, no parameters, no config inside.

distillation      divergences between student and teacher distributions, per token
divergences       what they are made of, on log-probabilities
top_k             the same to a teacher of whom only the likeliest tokens are known
cross_tokenizer   the same between different vocabularies; token_groups: tokens that spell the same bytes
features          distances between student and teacher hidden states
relations         distances between what their tokens attend to
on_policy_distillation  the teacher's opinion of sampled tokens, as advantages
policy_gradient   surrogates: what an advantage multiplies
advantages        from rewards to advantages
kl_penalty        estimators of KL(policy || reference) from sampled tokens
reductions        per-token values and a mask to `Mean(total, count)`
cross_entropy     losses on target tokens
vocabulary        sums over a vocabulary that may be split over a mesh axis
lm_head           any of the per-token losses from hidden states, in chunks, without materialised logits

Per-token losses are unreduced: they return `[...]` or `[B, T]` values to be minimised, and `reductions` says what is
divided by what. Teachers, references, advantages and old log-probabilities never receive a gradient.
"""
