"""Sizes of the quickstart, per task and for its full and smoke forms; chosen on development seeds 900 and above.

Used by configs/quickstart.py; python -m experiments.quickstart prints what it resolves to.
"""

_MUON = dict(name='muon', learning_rate=3e-3, matrix_learning_rate=0.02)
_ARM = dict(name='muon', learning_rate=2e-3, matrix_learning_rate=0.015)
_RL = dict(name='adamw', learning_rate=2e-4, schedule='linear', warmup_steps=5, weight_decay=0.0)

_ARITHMETIC = dict(
    vocab=512, length=160, row=176, context=256, new_tokens=120, rows=12, decode_rows=256,
    teacher=dict(embed_dim=128, num_layers=4, num_heads=4, mlp_dim=384),
    student=dict(embed_dim=64, num_layers=3, num_heads=4, mlp_dim=192),
    divergence='forward_kl', on_policy_divergence='forward_kl', hidden_weight=1.0,
    optimizer=dict(teacher=_MUON, base=_MUON, arm=_ARM, rl=_RL),
    annotations=2, annotations_used='', opd_prompts=48, opd_temperature=0.5, rl_prompts=32, group=8, votes=8,
)
_GSM8K = _ARITHMETIC | dict(
    vocab=1024, length=704, row=640, context=704, new_tokens=200, rows=4, decode_rows=128, opd_prompts=32, rl_prompts=8,
    annotations_used='unfiltered_',  # a teacher trained for minutes is almost never right on these problems
)

# teacher, student: folders of models that are there, in place of those that the line makes.
DEFAULTS = dict(
    task='arithmetic_mix', size='full', seed=1, steps=1.0, dtype='float32', teacher='', student='', format='plain',
)

# A tokenizer that was not trained on the problems needs more tokens for them, and a chat template adds its own.
ROOM = dict(
    own={}, plain=dict(length=320, row=320, context=448), chat=dict(length=448, row=448, context=576),
)

SIZES = {
    'arithmetic_mix': _ARITHMETIC,
    'arithmetic_mix/full': dict(
        teacher_problems=16_000, gold=2000, prompts=3000, rl_problems=4000, dev=400, test=1000, hard=300,
        steps=dict(teacher=500, base=400, arm=300, rl=120),
    ),
    'arithmetic_mix/smoke': dict(
        teacher_problems=2000, gold=200, prompts=64, rl_problems=200, dev=32, test=64, hard=32, votes=4,
        teacher=dict(embed_dim=64, num_layers=2, num_heads=4, mlp_dim=192),  # compiling takes most of the time
        student=dict(embed_dim=32, num_layers=1, num_heads=4, mlp_dim=96),
        new_tokens=64, decode_rows=64, opd_prompts=8, rl_prompts=4, annotations_used='unfiltered_',
        steps=dict(teacher=20, base=10, arm=6, rl=2),
    ),
    'gsm8k': _GSM8K,
    'gsm8k/full': dict(
        teacher_problems=6000, gold=500, prompts=500, rl_problems=1000, dev=100, test=1319,
        steps=dict(teacher=300, base=60, arm=60, rl=10),
    ),
    'gsm8k/smoke': dict(
        teacher_problems=600, gold=100, prompts=32, rl_problems=64, dev=16, test=32, votes=4, annotations=2,
        steps=dict(teacher=10, base=4, arm=2, rl=1),
    ),
}
