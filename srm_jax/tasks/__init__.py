"""Tasks by name. Nothing is read, generated or downloaded before a task's `problems` is called."""

from srm_jax.tasks import math, procedural
from srm_jax.tasks.task import Task

TASKS: dict[str, Task] = {
    'arithmetic_mix': procedural.procedural_task('arithmetic_mix', **procedural.PRESETS['arithmetic_mix']),
    'worded_mix': procedural.procedural_task('worded_mix', **procedural.PRESETS['worded_mix']),
    'sums': procedural.procedural_task('sums', **procedural.PRESETS['sums']),
    'rewriting': procedural.procedural_task('rewriting', **procedural.PRESETS['rewriting']),
    'gsm8k': math.gsm8k_task(),
}
