"""Tasks by name. Nothing is read, generated or downloaded before a task's `problems` is called."""

from srm_jax.tasks import chains, math, procedural, running_sums
from srm_jax.tasks.task import Task

_SUMS = procedural.procedural_task('sums', **procedural.PRESETS['sums'])

TASKS: dict[str, Task] = {
    'arithmetic_mix': procedural.procedural_task('arithmetic_mix', **procedural.PRESETS['arithmetic_mix']),
    'worded_mix': procedural.procedural_task('worded_mix', **procedural.PRESETS['worded_mix']),
    'sums': _SUMS,
    'sums_checked': chains.restyled(_SUMS, 'sums_checked', chains.checked_steps),
    'rewriting': procedural.procedural_task('rewriting', **procedural.PRESETS['rewriting']),
    'running_sums': running_sums.running_sums_task('running_sums', running_sums.forward),
    'running_sums_either_way': running_sums.running_sums_task(
        'running_sums_either_way', running_sums.either_way, terms=4
    ),
    'gsm8k': math.gsm8k_task(),
}
