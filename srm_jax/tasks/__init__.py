"""Tasks by name. Nothing is read, generated or downloaded before a task's `problems` is called."""

from srm_jax.tasks import chains, guesses, levels, math, orders, padded, procedural, running_sums
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
    'sums_in_any_order': orders.orders_task('sums_in_any_order'),
    'short_sums_in_any_order': orders.orders_task('short_sums_in_any_order', terms=4),
    'running_sums_padded': running_sums.running_sums_task('running_sums_padded', padded.padded),
    'running_sums_2_to_8': levels.levels_task('running_sums_2_to_8', running_sums.forward, terms=range(2, 9)),
    'running_sums_with_slips': running_sums.running_sums_task(
        'running_sums_with_slips', running_sums.with_slips, solution=running_sums.as_written
    ),
    'running_sums_guessed': guesses.guesses_task(
        running_sums.running_sums_task('running_sums_guessed', running_sums.forward, terms=5), 'running_sums_guessed'
    ),
    'gsm8k': math.gsm8k_task(),
}
