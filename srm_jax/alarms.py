"""Alarms on the metrics of an RL run: what goes wrong, its likely cause, and the key to change.

An alarm is fn(history) -> Alarm | None, pure, over the rows of metrics.jsonl. It compares medians of WINDOW rows, so
that no single row rings it, is silent before 2 WINDOW rows hold its metric, and passes over missing keys and NaN.
Thresholds are rules of thumb: an alarm asks for a look at the completions (experiments.rollouts), it proves nothing.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

WINDOW = 5  # rows
LOOKS = 100  # how many ends of a finished history `replay` looks at, at most

Row = Mapping[str, float]
History = Sequence[Row]


class Alarm(NamedTuple):
  """name: key of ALARMS. step: of the last row seen. seen: figures and steps. fix: config keys, and which way."""

  name: str
  step: int
  seen: str
  cause: str
  fix: str


class _Series(NamedTuple):
  """The rows that hold a finite value of one metric."""

  name: str
  steps: list[int]
  values: list[float]

  def enough(self, windows: int = 2) -> bool:
    return len(self.values) >= windows * WINDOW

  def median(self, first: int, last: int | None = None) -> float:
    return statistics.median(self.values[first:last])

  def span(self, first: int, last: int | None = None) -> str:
    """'entropy 1.2 (median, steps 1 to 50)'."""
    steps = self.steps[first:last]
    return f'{self.name} {self.median(first, last):.3g} (median, steps {steps[0]} to {steps[-1]})'

  def change(self) -> str:
    return f'{self.span(0, WINDOW)}, then {self.span(-WINDOW)}'


def _series(history: History, name: str) -> _Series:
  found = [(row['step'], row[name]) for row in history if row.get(name) is not None and math.isfinite(row[name])]
  return _Series(name, [step for step, _ in found], [float(value) for _, value in found])


def _better(history: History) -> bool:
  """Whether the run does better than at its start, by the share of right answers where it is logged, else by reward."""
  series = next((one for name in ('pass_rate', 'reward') if (one := _series(history, name)).enough()), None)
  return series is not None and _drift(series, WINDOW) > 0


def _drift(series: _Series, rows: int) -> float:
  """From the median of the first rows to that of the last; 0 where rows are further from either than that."""
  parts = series.values[:rows], series.values[-rows:]
  first, last = map(statistics.median, parts)
  spread = statistics.median([abs(value - middle) for part, middle in zip(parts, (first, last)) for value in part])
  return last - first if abs(last - first) > spread else 0.0


def entropy_collapse(history: History) -> Alarm | None:
  """Entropy below a fifth of what it was, and below 0.1 nats a token."""
  entropy = _series(history, 'entropy')
  if not entropy.enough() or entropy.median(-WINDOW) >= min(0.1, 0.2 * entropy.median(0, WINDOW)):
    return None
  return Alarm(
      'entropy_collapse', entropy.steps[-1], entropy.change(),
      'probability piles up on what was rewarded early: samples of a group become alike and teach nothing',
      'config.recipe.surrogate.options.clip_high up (0.28), config.recipe.kl.coef or .entropy up, '
      'config.optimizer.learning_rate down, or config.recipe.rollouts.temperature up',
  )


def length_collapse(history: History) -> Alarm | None:
  """Completions below 0.4 of their length, and no better for it."""
  length = _series(history, 'completion_tokens')
  if not length.enough() or length.median(-WINDOW) >= 0.4 * length.median(0, WINDOW) or _better(history):
    return None
  return Alarm(
      'length_collapse', length.steps[-1], f'{length.change()}, and no more of them are right',
      'the reasoning is dropped: short answers are rewarded as much, or a length penalty outweighs being right',
      'weights of length in config.recipe.rewards down, config.recipe.kl.coef up, config.optimizer.learning_rate down',
  )


def length_explosion(history: History) -> Alarm | None:
  """Completions above twice their length, and no better for it."""
  length = _series(history, 'completion_tokens')
  if not length.enough() or length.median(-WINDOW) <= 2 * length.median(0, WINDOW) or _better(history):
    return None
  return Alarm(
      'length_explosion', length.steps[-1], f'{length.change()}, and no more of them are right',
      'a mean over each completion spreads the penalty of a long wrong one thin (arXiv 2503.20783)',
      'config.recipe.reduction.name to fixed_length or token_mean, config.recipe.rollouts.max_new_tokens down',
  )


def kl_blow_up(history: History) -> Alarm | None:
  """Above 1 nat a token from the reference policy; or above 0.1 and four times that of the window before."""
  kl = _series(history, 'kl')
  if not kl.enough():
    return None
  now, before = kl.median(-WINDOW), kl.median(-2 * WINDOW, -WINDOW)
  if now <= 1.0 and (now <= 0.1 or now <= 4 * before):
    return None
  return Alarm(
      'kl_blow_up', kl.steps[-1], f'{kl.span(-2 * WINDOW, -WINDOW)}, then {kl.span(-WINDOW)}',
      'the policy runs away from the reference policy: steps too large, or a reward that odd texts earn',
      'config.recipe.kl.coef up, config.optimizer.learning_rate down',
  )


def reward_hacking(history: History) -> Alarm | None:
  """Held-out accuracy 5 points below its best while the reward is above all that it was then.

  Both by medians: of three evaluations, and of WINDOW rows against each of the WINDOW rows up to the best.
  """
  held, reward = _series(history, 'accuracy'), _series(history, 'reward')
  if len(held.values) < 6 or not reward.enough():
    return None
  best = max(range(len(held.values) - 5), key=lambda start: (held.median(start, start + 3), start))
  until = [value for step, value in zip(reward.steps, reward.values) if step <= held.steps[best + 2]][-WINDOW:]
  if held.median(-3) > held.median(best, best + 3) - 0.05 or not until or reward.median(-WINDOW) <= max(until):
    return None
  return Alarm(
      'reward_hacking', reward.steps[-1],
      f'held-out {held.span(best, best + 3)}, then {held.span(-3)}; {reward.span(-WINDOW)}, above all before the fall',
      'the reward pays for something else than right answers, or the prompts are learnt by heart',
      f'look at the completions and at the grader; go back to step {held.steps[best + 2]}, config.recipe.kl.coef up, '
      'config.recipe.data.count up',
  )


def no_variance(history: History) -> Alarm | None:
  """No completion with an advantage in the last 2 WINDOW rows: all rewards of a group are alike, nothing is learnt.

  A source may ask this of its own steps: rows with 'step', 'zero_advantage' and, for the advice, 'reward'.
  """
  still, reward = _series(history, 'zero_advantage'), _series(history, 'reward')
  if not still.enough() or min(still.values[-2 * WINDOW :]) < 1.0:
    return None
  data = 'config.recipe.data.task, .split or .records to {} problems'
  high = reward.enough() and reward.median(-2 * WINDOW) > 0.5
  advice = data.format('harder') if high else f'start from a better model (config.init_from), {data.format("easier")}'
  seen = f'; {reward.span(-2 * WINDOW)}' if reward.enough() else ''
  return Alarm(
      'no_variance', still.steps[-1],
      f'equal rewards within every group of steps {still.steps[-2 * WINDOW]} to {still.steps[-1]}{seen}',
      'the problems are too easy' if high else 'the problems are too hard, or every answer fails its grader',
      f"{advice}; config.recipe.rollouts.order.name to 'pass_rates', config.recipe.rollouts.samples or .temperature up",
  )


def unscorable(history: History) -> Alarm | None:
  """More than a fifth of the completions without a reward."""
  share = _series(history, 'unscorable')
  if not share.enough() or share.median(-WINDOW) <= 0.2:
    return None
  return Alarm(
      'unscorable', share.steps[-1], share.span(-WINDOW),
      'the grader cannot read what the model writes, or runs into its limits: these completions teach nothing',
      'config.recipe.data.prompt.instruction to ask for the format, config.init_from to a model that has it',
  )


def truncated(history: History) -> Alarm | None:
  """More than three tenths of the completions cut at the length limit."""
  share = _series(history, 'truncated')
  if not share.enough() or share.median(-WINDOW) <= 0.3:
    return None
  return Alarm(
      'truncated', share.steps[-1], share.span(-WINDOW),
      'the limit cuts completions before their answer, and right reasoning is graded as wrong',
      "config.recipe.rollouts.max_new_tokens and .length up, or config.recipe.rollouts.cut to 'mask'",
  )


def gradient_spikes(history: History) -> Alarm | None:
  """Three or more of the last 2 WINDOW rows above ten times the median of those before."""
  norm = _series(history, 'grad_norm')
  if not norm.enough(3):
    return None
  usual = norm.median(-6 * WINDOW, -2 * WINDOW)
  late = list(zip(norm.steps, norm.values))[-2 * WINDOW :]
  spikes = [(step, value) for step, value in late if value > 10 * usual]
  if len(spikes) < 3:
    return None
  shown = ', '.join(f'{value:.3g} at step {step}' for step, value in spikes)
  return Alarm(
      'gradient_spikes', norm.steps[-1], f'grad_norm {shown}; the median before is {usual:.3g}',
      'few tokens with huge ratios or advantages decide the step',
      'config.optimizer.clip_norm down, config.optimizer.learning_rate down, config.recipe.rollouts.prompts up',
  )


def sampler_gap(history: History) -> Alarm | None:
  """Sampler and trainer differ by more than 0.05 nats a token: rounding is a hundredth of it."""
  gap = _series(history, 'sampler_gap')
  if not gap.enough() or gap.median(-WINDOW) <= 0.05:
    return None
  return Alarm(
      'sampler_gap', gap.steps[-1], gap.span(-WINDOW),
      'what samples is not what is trained: coarse rounding in decoding, or completions of older parameters',
      'config.recipe.truncation to 2, config.model.dtype to float32, config.recipe.updates.epochs down',
  )


def not_moving(history: History) -> Alarm | None:
  """Over 8 WINDOW rows neither reward, entropy nor length left its noise, nor the policy its reference."""
  if not _series(history, 'entropy').enough(8) or no_variance(history):
    return None
  series = [_series(history, name) for name in ('entropy', 'reward', 'completion_tokens')]
  kl = _series(history, 'kl')
  if any(not one.enough(8) or _drift(one, 2 * WINDOW) for one in series) or (kl.enough() and kl.median(-WINDOW) > 1e-3):
    return None
  return Alarm(
      'not_moving', series[0].steps[-1], '; '.join(one.change() for one in series),
      'the steps are too small to change the policy (usual with adapters at the rate of full fine-tuning)',
      'config.optimizer.learning_rate up (tenfold), config.recipe.kl.coef down',
  )


def message(alarm: Alarm) -> str:
  return f'alarm {alarm.name} at step {alarm.step}: {alarm.seen}. Likely: {alarm.cause}. Change: {alarm.fix}'


def ringing(history: History) -> list[Alarm]:
  """The alarms that ring at the end of a history; none where its last row has no 'reward', as outside of RL."""
  if not history or 'reward' not in history[-1]:
    return []
  return [alarm for check in ALARMS.values() if (alarm := check(history)) is not None]


def watcher(history: History) -> Callable[[Row], list[Alarm]]:
  """For a loop that continues a history: row -> the alarms that ring for the first time since this call."""
  rows, said = list(history), set()

  def watch(row: Row) -> list[Alarm]:
    rows.append(row)
    new = [alarm for alarm in ringing(rows) if alarm.name not in said]
    said.update(alarm.name for alarm in new)
    return new

  return watch


def replay(history: History) -> list[Alarm]:
  """The first of each alarm that rang over a finished history, in order; of a long one not every row is an end."""
  ends = {len(history) - round(look * max(1, len(history) / LOOKS)) for look in range(min(LOOKS, len(history)))}
  found: dict[str, Alarm] = {}
  for end in sorted(ends):
    for alarm in ringing(history[:end]):
      found.setdefault(alarm.name, alarm)
  return list(found.values())


ALARMS: dict[str, Callable[[History], Alarm | None]] = {
    'entropy_collapse': entropy_collapse,
    'length_collapse': length_collapse,
    'length_explosion': length_explosion,
    'kl_blow_up': kl_blow_up,
    'reward_hacking': reward_hacking,
    'no_variance': no_variance,
    'unscorable': unscorable,
    'truncated': truncated,
    'gradient_spikes': gradient_spikes,
    'sampler_gap': sampler_gap,
    'not_moving': not_moving,
}
