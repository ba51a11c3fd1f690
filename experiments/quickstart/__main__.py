"""Makes a small reasoning model and says what each step was worth.

bash experiments/quickstart.sh [--task=gsm8k] [--smoke] [--seed=N] [--minutes=12] [--workdir=DIR]
bash experiments/quickstart.sh --teacher=DIR --student=DIR    starts from published models, or from those of other runs

The same command continues a stopped run, with the seed, step counts and dtype that it was started with.
"""

import logging
import pathlib
import time

import rich.console
import rich.markup
import rich.table
from absl import app, flags

from experiments import command, runtime

FLAGS = flags.FLAGS
CALIBRATION = {'full': 10.0, 'smoke': 0.0}  # seconds after which nothing new is measured


def workdir_for(task: str, smoke: bool) -> pathlib.Path:
  """runs/quickstart, with what differs from the default behind it."""
  suffix = ('' if task == 'arithmetic_mix' else f'-{task}') + ('-smoke' if smoke else '')
  return pathlib.Path(f'runs/quickstart{suffix}')


def run(
    task: str, size: str, seed: int | None, minutes: float, workdir: pathlib.Path, console: rich.console.Console,
    *, format: str = 'plain', **models: str,
):
  """Runs or continues the line in a workdir, and writes its table and report.

  Args:
    format: how problems are put to the models, 'plain' or in their 'chat' template.
    models: folders of a `teacher` and a `student` to start from; '' or none where the line makes its own.
  """
  from configs import quickstart
  from experiments.quickstart import record
  from srm_jax import stages

  models = {name: str(pathlib.Path(folder).absolute()) for name, folder in models.items() if folder}
  settings = record.read(workdir)
  if settings is None:
    settings = _start(task, size, record.fresh_seed() if seed is None else seed, minutes, console, models, format)
    record.write(workdir, settings, {})
  else:
    record.agree(settings, workdir, task=task, size=size, seed=seed, format=format, **models)
    console.print(f'Continuing {workdir}: seed {settings.seed}, steps × {settings.steps:g}, {settings.dtype}')
  config, started, done = quickstart.get_config(settings.arg), time.time(), {}
  order = list(config.order)

  def report(stage):
    done[stage.name] = stage
    record.write(workdir, settings, done)
    kept = (stage.workdir / 'done.json').stat().st_mtime < started
    _say_done(stage, f'{len(done):>2}/{len(order)}', 'kept' if kept else f'{stage.seconds:.0f} s', console)

  stages.run_stages(config, workdir, report=report)
  finish(workdir, console)


def _start(task: str, size: str, seed: int, minutes: float, console: rich.console.Console, models, format):
  """Chooses dtype and step counts for this machine, and says what the run will take."""
  from configs import quickstart
  from experiments.quickstart import calibrate, estimate, record
  from srm_jax import schema

  if format != 'plain' and not models:
    raise schema.ConfigError('--format=chat needs --teacher or --student: only published models have a chat template')
  if models:
    console.print(f'Seed {seed}; with models of your own nothing is calibrated, estimated or shortened')
    given = dict(format=format, **models)
    return record.Settings(task, size, seed, 1.0, 'float32', minutes, {}, {}, calibrate.machine(), **given)

  def make(steps: float, dtype: str = 'float32'):
    return quickstart.get_config(f'task={task},size={size},seed={seed},steps={steps:g},dtype={dtype}')

  console.print(f'Calibrating; seed {seed}')
  speed = calibrate.calibrate(make(1.0), limit=CALIBRATION[size])
  # A smoke run is small already: it keeps its steps, whatever they take.
  budget = 60 * minutes if size == 'full' else float('inf')
  steps, seconds = estimate.fit(make, speed, budget)
  measured = speed._asdict() | {'whole': sum(estimate.seconds(make(1.0), speed).values())}
  settings = record.Settings(task, size, seed, steps, speed.dtype, minutes, seconds, measured, calibrate.machine())
  _say_estimate(settings, console)
  return settings


def _groups(seconds) -> dict[str, float]:
  """Stages as the estimate shows them: all dev, test and harder evaluations are one line each."""
  names = {'dev': 'dev evaluations', 'test': 'test evaluations', 'hard': 'harder split'}
  found: dict[str, float] = {}
  for name, value in seconds.items():
    title = names.get(name.split('_')[0], name)
    found[title] = found.get(title, 0.0) + value
  return found


def _say_estimate(settings, console: rich.console.Console):
  from experiments.quickstart import sentences

  rates = ', '.join(f'{rate / 1e9:.0f} GFLOP/s in {dtype}' for dtype, rate in settings.calibration['products'].items())
  where = f'{settings.machine["devices"]}, {settings.machine["cores"]} cores'
  console.print(f'{where}: products run at {rates}; computing in {settings.dtype}', highlight=False)
  table = rich.table.Table('stage', 'minutes, about', box=None, pad_edge=False)
  for name, value in _groups(settings.estimates).items():
    table.add_row(name, f'{value / 60:.1f}')
  table.add_row('[bold]sum[/bold]', f'[bold]{sum(settings.estimates.values()) / 60:.1f}[/bold]')
  console.print(table)
  if settings.steps != 1.0:
    console.print(sentences.shortened(settings), style='yellow')


def _say_done(stage, place: str, took: str, console: rich.console.Console):
  words = rich.markup.escape(outcome(stage))
  console.print(f'[dim]{place}[/dim] [bold]{stage.name:<20}[/bold] {words} [dim]({took})[/dim]', highlight=False)


def outcome(stage) -> str:
  """What came out of a stage, in a few words."""
  found = stage.outcome
  if stage.run == 'given':
    return f'given: {stage.target}'
  if stage.run == 'tokenizer':
    return f'{found["vocab_size"]} pieces, {found["tokens_per_text"]:.0f} tokens a problem'
  if stage.run == 'train':
    reward = f', reward {found["reward"]:.2f}' if 'reward' in found else ''
    return f'step {found["step"]}, loss {found["loss"]:.3f}{reward}'
  if stage.run == 'annotate':
    return f'{found["correct"]} of {found["samples"]} right, {found["solved"]} of {found["problems"]} problems solved'
  if stage.run == 'select':
    return f'{found["chosen"]} is best on dev ({100 * found["scores"][found["chosen"]]:.1f} %)'
  parts = (f'{name} {100 * row["accuracy"]:.1f} %' for name, row in found.items())
  return ', '.join(parts) + f' of {next(iter(found.values()))["n"]}'


def finish(workdir, console: rich.console.Console) -> pathlib.Path:
  """Prints the tables of a finished run and writes table.md and report.html."""
  from experiments.quickstart import cases, findings, page, record, reference, sentences, table
  from srm_jax.recipes.context import find_task

  settings, stages = record.load(workdir)
  found, known = findings.collect(stages), reference.read()
  outside, bands = sentences.against_reference(found, known, settings)
  table.show(found, console)
  console.print(sentences.headline(found), style='bold', highlight=False)
  for sentence in sentences.verdicts(found):
    console.print(sentence, highlight=False)
  console.print(bands, style='yellow' if outside else 'dim', highlight=False)
  report = page.Report(settings, stages, found, cases.find(stages, found), known, find_task(settings.task).chance)
  path = pathlib.Path(workdir) / 'report.html'
  path.write_text(page.render(report), encoding='utf-8')
  (pathlib.Path(workdir) / 'table.md').write_text(table.markdown(found), encoding='utf-8')
  console.print(f'Report: {path}', highlight=False, soft_wrap=True)
  return path


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}')
  command.show_progress_of_library()
  logging.getLogger('srm_jax').setLevel(logging.WARNING)  # the outcome of a stage says enough
  # Which type is faster is measured; models of a million parameters were so in float32 with these products, too.
  runtime.prepare(bfloat16=bool(FLAGS.teacher or FLAGS.student))
  workdir = pathlib.Path(FLAGS.workdir) if FLAGS.workdir else workdir_for(FLAGS.task, FLAGS.smoke)
  size = 'smoke' if FLAGS.smoke else 'full'
  console = rich.console.Console()
  models = dict(teacher=FLAGS.teacher, student=FLAGS.student)
  how = dict(format=FLAGS.format, **models)
  command.guarded(lambda: run(FLAGS.task, size, FLAGS.seed, FLAGS.minutes, workdir, console, **how))


if __name__ == '__main__':
  flags.DEFINE_enum('task', 'arithmetic_mix', ['arithmetic_mix', 'gsm8k'], 'What the models learn.')
  flags.DEFINE_bool('smoke', False, 'Tiny sizes, to see everything run once.')
  flags.DEFINE_integer('seed', None, 'Of problems, models and sampling; a fresh one by default.')
  flags.DEFINE_string('workdir', None, 'Where results go; runs/quickstart[-gsm8k][-smoke] by default.')
  flags.DEFINE_string('teacher', '', 'A published model (config.json, safetensors, tokenizer) or a workdir as teacher.')
  flags.DEFINE_string('student', '', 'The same as the start of every student; it must share the tokenizer.')
  flags.DEFINE_enum('format', 'plain', ['plain', 'chat'], 'How problems are put; chat takes the models\' template.')
  flags.DEFINE_float('minutes', 12.0, 'Budget; where the estimate is higher, trainings are shortened.', lower_bound=0.1)
  app.run(main)
