"""The losses of papers, as sums of terms, on one small student: paper=distillm, distillm2, gkd, minillm, taid, ...

Run: python -m experiments.train --config=configs/distill/papers.py:paper=gkd --config.recipe.teacher=runs/teacher \\
       --config.init_from=runs/sft --workdir=runs/gkd
Hardware: two CPU cores, minutes. Each entry of PAPERS names its paper and what is left out of it.
"""

from configs import base


def _growing(start, end, steps):
  return dict(name='linear', start=start, end=end, steps=steps)


# paper: (terms by the run's length, how sampled rows and data meet: None has data alone, '' samples alone).
PAPERS = {
    # Sanh et al., DistilBERT, arXiv:1910.01108: soft labels, labels and hidden states. Left out: masking.
    'distilbert': (lambda steps: dict(
        kl=base.divergence('forward_kl', 5.0, temperature=2.0, scaled=True), hidden=base.hidden('cosine', 1.0),
        cross_entropy=base.term('cross_entropy', 2.0)), None),
    # Romero et al., FitNets, arXiv:1412.6550. Left out: the hint stage of its own before distillation.
    'fitnets': (lambda steps: dict(hint=base.hidden('fitnets', 1.0), kl=base.divergence('forward_kl', 1.0)), None),
    # Sun et al., Patient KD, arXiv:1908.09355, PKD-Skip.
    'patient': (lambda steps: dict(
        hidden=base.hidden('patient', 10.0), kl=base.divergence('forward_kl', 0.5, temperature=2.0),
        cross_entropy=base.term('cross_entropy', 0.5)), None),
    # Wang et al., MiniLMv2, arXiv:2012.15828, on the last layers, with a causal mask. Left out: the choice of a layer.
    'minilm': (lambda steps: dict(relations=base.relations(relation_heads=4)), None),
    # Shing et al., TAID, arXiv:2501.16937. Left out: its adaptive rate.
    'taid': (lambda steps: dict(kl=base.divergence('taid', tau=_growing(0.4, 1.0, steps))), None),
    # Ko et al., DistiLLM, arXiv:2402.03898, the share of samples on a line. Left out: its replay buffer.
    'distillm': (lambda steps: dict(kl=base.divergence('skew_kl', alpha=0.1)), 'alternate'),
    # Ko et al., DistiLLM-2, arXiv:2503.07067. Left out: data of the teacher for the student's prompts, adaptive alpha.
    'distillm2': (lambda steps: dict(
        up=base.divergence('skew_kl', 0.5, rows='data', alpha=0.1),
        down=base.divergence('skew_reverse_kl', 0.5, rows='samples', alpha=0.1)), 'both'),
    # Agarwal et al., GKD, arXiv:2306.13649.
    'gkd': (lambda steps: dict(kl=base.divergence('jensen_shannon', beta=0.5)), 'alternate'),
    # Gu et al., MiniLLM, arXiv:2306.08543, whitened and clipped as its code does. Left out: samples from a mixture of
    # teacher and student, and r_t within the long part, where the code counts it a second time.
    'minillm': (lambda steps: dict(
        long=base.policy(
            'minillm', rows='samples', whiten=True, surrogate='clipped',
            surrogate_options=dict(clip_low=0.2, clip_high=0.2),
        ),
        short=base.divergence('reverse_kl', rows='samples'),
        cross_entropy=base.term('cross_entropy', 1.0, rows='data')), 'both'),
    # Lu et al., On-Policy Distillation, Thinking Machines 2025: sampled-token reverse KL as the advantage.
    'sampled_reverse_kl': (lambda steps: dict(policy=base.policy(rows='samples')), ''),
    # The same beside the task's rewards.
    'reward_and_teacher': (lambda steps: dict(policy=base.policy(reward_weight=1.0, rows='samples')), ''),
}


def get_config(arg: str = ''):
  """arg: 'paper=gkd', 'smoke'."""
  a = base.parse_arg(arg, paper='gkd', smoke=False)
  steps, sampled = (2, 2) if a.smoke else (300, 32)
  terms, meeting = PAPERS[a.paper]
  loss, data = base.loss(**terms(steps)), base.data(count=50 if a.smoke else 2000, seed=2)
  rows = base.batch(sampled, 256)
  if meeting is None:
    recipe = base.distill('runs/teacher', data, rows, loss)
  else:
    recipe = base.on_policy_distill(
        'runs/teacher', data, base.rollouts(
            prompts=sampled, samples=1 if a.paper != 'reward_and_teacher' else 2, length=256,
            max_new_tokens=16 if a.smoke else 128,
        ), loss, mixing=meeting and base.mixing(
            data, rows, mix=meeting, fraction=_growing(0.2, 0.8, steps)) or None,
    )
  return base.train(
      recipe, tokenizer='byte', model=base.model(embed_dim=64, num_layers=3, num_heads=4, mlp_dim=192),
      init_from='' if meeting is None else 'runs/sft',
      optimizer=base.optimizer(learning_rate=1e-3, matrix_learning_rate=0.005), num_steps=steps,
  )
