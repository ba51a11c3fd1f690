"""What a run's policy writes now: groups of completions, their tokens coloured by advantage, log-ratio or entropy.

python -m experiments.rollouts --workdir=runs/grpo [--step=N] [--prompts=8] [--samples=8] [--out=page.html]
    (writes runs/grpo/rollouts.html)

Reads the run's config and its newest checkpoint (or that of a step); nothing is trained and nothing else is written.
"""

import pathlib

from absl import app, flags

from experiments import command, runtime


def write(workdir, step, prompts: int, samples: int, out) -> pathlib.Path:
  """Writes the page and returns its path: `out`, or rollouts.html in the workdir."""
  from experiments.rollouts import page
  from srm_jax import alarms, metrics, rollout_view

  view = rollout_view.view(workdir, step=step, prompts=prompts, samples=samples)
  path = pathlib.Path(out or pathlib.Path(workdir) / 'rollouts.html')
  path.parent.mkdir(parents=True, exist_ok=True)
  rung = alarms.replay([row for row in metrics.read(workdir) if row['step'] <= view.step])
  path.write_text(page.render(view, rung), encoding='utf-8')
  print(f'{path}: {len(view.groups)} prompts of step {view.step}, {samples} completions each')
  return path


def launch():
  workdir = flags.DEFINE_string('workdir', None, 'Of a run that samples.')
  step = flags.DEFINE_integer('step', None, 'Of a checkpoint that is kept; the newest if not given.')
  prompts = flags.DEFINE_integer('prompts', 8, 'How many.', lower_bound=1)
  samples = flags.DEFINE_integer('samples', 8, 'Completions of each.', lower_bound=1)
  out = flags.DEFINE_string('out', None, 'FILE.html; rollouts.html in the workdir if not given.')
  flags.mark_flag_as_required('workdir')

  def main(argv):
    if len(argv) > 1:
      raise app.UsageError(f'unexpected arguments {argv[1:]}')
    command.show_progress_of_library()
    runtime.prepare()
    command.guarded(lambda: write(workdir.value, step.value, prompts.value, samples.value, out.value))

  app.run(main)


if __name__ == '__main__':
  launch()
