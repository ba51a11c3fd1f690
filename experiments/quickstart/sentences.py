"""What a run says in words: its finding, what is told apart and what is not, the reference, and its limits."""

from collections.abc import Iterable

from experiments.quickstart.findings import CONTROL, STEPS, Findings
from experiments.quickstart.record import Settings
from experiments.quickstart.reference import Reference, differences
from experiments.quickstart.table import SHORT, count, percent, points, probability

SURE = 0.05  # p below which a difference counts as told apart from chance


def headline(findings: Findings) -> str:
  """The finding in one sentence."""
  rows, best = findings.rows, findings.rows[findings.best_distilled]
  accuracy = {name: percent(row.score.accuracy) for name, row in rows.items()}
  return (
      f'{STEPS[best.name].title} takes a student of {count(best.params)} parameters to {accuracy[best.name]} of '
      f'{best.score.n:,} held-out problems, fine-tuning on gold solutions to {accuracy[CONTROL]}; RL ends at '
      f'{accuracy["rl"]}, the {rows["teacher"].params / best.params:.1f}× larger teacher at {accuracy["teacher"]}.'
  )


def verdicts(findings: Findings) -> list[str]:
  """Which differences these problems can tell from chance, and which they cannot, in a sentence each."""
  compared = [row for row in (*findings.rows.values(), *findings.strategies.values()) if row.compared is not None]
  sure = [row for row in compared if row.compared.test.p < SURE]
  unsure = [row for row in compared if row.compared.test.p >= SURE]
  told = f'Told apart from its neighbour at p < .05: {_differences(sure)}.'
  found = [told if sure else 'No step is told apart from its neighbour at p < .05.']
  return found + ([f'Not told apart: {_differences(unsure)}.'] if unsure else [])


def _differences(rows: Iterable) -> str:
  def one(row):
    p, test = probability(row.compared.test.p), row.compared.test
    equals = p if p.startswith('<') else f'= {p}'
    return f'{row.title} over {SHORT[row.compared.against]} ({points(test.difference)} points, p {equals})'

  return ', '.join(map(one, rows))


def against_reference(findings: Findings, reference: Reference | None, settings: Settings) -> tuple[list[str], str]:
  """Rows outside their band, and a sentence on the bands, or on why there are none."""
  if reference is None:
    return [], (
        'There is no reference (experiments/quickstart/reference.json): nothing says how far other seeds fall from '
        'this run.'
    )
  differing = differences(reference, settings)
  if differing:
    return [], f'The reference is of another setting ({"; ".join(differing)}): no band is drawn.'
  rows = findings.rows | findings.strategies
  bands = {name: band for name, band in reference.bands.items() if name in rows}
  outside = [name for name, band in bands.items() if not band.low <= rows[name].score.accuracy <= band.high]
  note = (
      f'Bands: where 95 % of new runs should fall, from {len(reference.about["seeds"])} reference seeds in '
      f'{reference.about["dtype"]} (t prediction interval).'
  )
  if not outside:
    return [], f'{note} Every row of this run lies inside its band.'
  return outside, f'{note} Outside its band: {", ".join(rows[name].title for name in outside)}.'


def shortened(settings: Settings) -> str:
  """What was cut to fit the budget; '' where nothing was."""
  if settings.steps == 1.0:
    return ''
  left = sum(settings.estimates.values()) / 60
  aim = f'to fit {settings.minutes:g}' if left <= settings.minutes + 0.1 else f'which still leaves about {left:.0f}'
  return (
      f'This machine would take about {settings.calibration["whole"] / 60:.0f} minutes: every training is shortened to '
      f'{settings.steps:.0%} of its steps, {aim}. Expect lower accuracies than those of the reference.'
  )


def human_written(findings: Findings, chance: float) -> str:
  """What a reader of a run on GSM8K must know first."""
  return (
      'These are problems that people wrote. A model trained from scratch for minutes scores near zero on them: the '
      f'teacher is at {percent(findings.rows["teacher"].score.accuracy)}, always giving the most frequent answer at '
      f'{percent(chance)}.'
  )


SMOKE = 'A smoke run: it shows that every part works. Its numbers mean nothing.'
UNFILTERED = (
    'The teacher is almost never right here, so that hardly an annotation would be left: the arms learn from its wrong '
    'ones too.'
)
SAMPLES = (
    'Majority and best-of-n choose among the same samples, of which "one sample" is the first. Every sampled token '
    'counts; prompts, and what the teacher reads to score, count too.'
)
CURVES = (
    'Means over the steps since the point before. Arms have their own targets (gold or annotations) and losses: '
    'compare accuracies in the table, not losses here.'
)
LIMITS = (
    'Intervals and tests are over problems. How another seed would fall is what the reference bands say, for this '
    'setting only.',
    'The arms get the same number of steps, not the same computation or wall time: on-policy arms cost more per step.',
    'Every arm runs with one set of hyper-parameters, chosen on development seeds; others might reorder arms that '
    'lie close.',
    'These are models of a million parameters or fewer, from scratch, on one family of problems. Which method wins '
    'for a pretrained model of a billion parameters is another question.',
    'The p values are not corrected for the number of comparisons in the tables.',
    'The arm that RL starts from is chosen on a dev split. RL trains on for more steps: its gain is not one of '
    'algorithm alone.',
    'The control learns the gold solutions of prompts that the teacher solved; its FLOPs leave out the finding of '
    'those prompts.',
    'FLOPs count products of matrices that are useful work: no padding, and no prompts read while annotating.',
)
GENERATED = (
    'The problems are generated, and their worked solutions follow one canonical order of steps: a step marked wrong '
    'is not the canonical one. Nothing here is about language that people wrote.'
)
NEAR_ZERO = 'Near zero the differences between rows are mostly noise: nothing here ranks the methods.'


def limits(settings: Settings) -> tuple[str, ...]:
  """What a reader must not conclude."""
  return (*LIMITS, NEAR_ZERO if settings.task == 'gsm8k' else GENERATED)
