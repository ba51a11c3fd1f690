"""Studies of the literature at the size of two CPU cores: what is expected, what came out here, how to see it again.

python -m experiments.reproduce --list
python -m experiments.reproduce --run=S2 --workdir=runs/S2 [--smoke] [--seeds=5]    (the same command continues)
"""

import importlib
import json
import pathlib
import subprocess
import sys
import textwrap
from typing import NamedTuple

from absl import app, flags

from experiments import command, runtime
from experiments.study import tables
from experiments.sweep import seeds

ROOT = pathlib.Path(__file__).resolve().parents[1]
ABLATION = 'experiments/distillation_ablation'
STUDIES = 'experiments/distillation_studies'
RL_STUDIES = 'experiments/rl_studies'
NOT_RUN = 'not run'


class Entry(NamedTuple):
  """A study: what was published, and where it is done again.

  expected: a line a claim, in the order of the claims that begin with `claims` in the recorded verdicts. config: below
  the repository; its stem is the section of `results`. module: which runs it, in the folder of its studies; script:
  what runs it where that is ''. published: a config with the same losses for published models on TPUs, or ''.
  seeds: those that the rule is about, as --seeds takes them.
  """

  title: str
  paper: str
  expected: tuple[str, ...]
  config: str
  results: str
  module: str = ''
  script: str = ''
  claims: str | tuple[str, ...] = ''
  published: str = ''
  seeds: str = '5'

  @property
  def place(self) -> str:
    """Of the module, as an import names it."""
    return '.'.join([*pathlib.PurePosixPath(self.results).parts[:2], self.module])


ENTRIES: dict[str, Entry] = {
    'ablation': Entry(
        'Logits against hidden states, off-policy and on-policy', 'arXiv:2306.13649, arXiv:1412.6550, arXiv:2012.15828',
        ('mean of four logit losses - SFT on the same annotations > 0', 'the same, on-policy - off-policy > 0',
         'logit losses - hidden losses > 0, off-policy', 'forward KL + cosine - forward KL > 0, off-policy'),
        'configs/studies/distillation_ablation.py', f'{ABLATION}/results.json', script=f'{ABLATION}/run.sh',
        claims=('Off-policy', 'Logits'), published='configs/distill/published_ablation.py',
    ),
    'S1': Entry(
        'Divergences on-policy against forward KL off-policy (GKD)', 'arXiv:2306.13649',
        ('mean of on-policy divergences - forward KL off-policy > 0, p < .05',
         'entropy after forward KL - after reverse KL > 0, both on-policy'),
        'configs/studies/distillation_ablation.py', f'{ABLATION}/results.json', script=f'{ABLATION}/run.sh',
        claims='S1', published='configs/distill/published_ablation.py',
    ),
    'S1b': Entry(
        'Reverse KL seeks a mode where the student is smaller (MiniLLM)', 'arXiv:2306.08543',
        ('invalid texts, forward - reverse KL > 0, both on-policy', 'entropy of ways, forward - reverse KL > 0',
         'invalid texts, forward KL off-policy - MiniLLM > 0', 'entropy of ways, forward KL off-policy - MiniLLM > 0'),
        'configs/studies/capacity_gap.py', f'{STUDIES}/S1b/results.json', module='capacity_gap',
    ),
    'S2': Entry(
        'On-policy distillation needs fewer updates than GRPO',
        'thinkingmachines.ai/blog/on-policy-distillation, arXiv:2505.09388 (published: 7 to 10 times)',
        ('updates of GRPO / of distillation on sampled tokens, to 70 %: >= 1.5',
         'updates of GRPO / of distillation over the vocabulary, to 70 %: >= 4'),
        'configs/studies/on_policy_or_rl.py', f'{STUDIES}/S2/results.json', module='on_policy_or_rl',
        seeds='3,4,5,9,10',
    ),
    'S2b': Entry(
        'On-policy distillation learns from one prompt, RL does not',
        'thinkingmachines.ai/blog/on-policy-distillation',
        ('held-out accuracy, distillation - GRPO > 0, 1 prompt', 'the same, 8 prompts'),
        'configs/studies/one_prompt.py', f'{STUDIES}/S2b/results.json', module='one_prompt',
    ),
    'S3': Entry(
        'What hidden states add to labels and to logits', 'arXiv:1412.6550, arXiv:1908.09355, arXiv:2012.15828',
        ('accuracy, cross-entropy + forward KL - cross-entropy > 0',
         'CKA to the teacher, + hidden states - without >= 0.1'),
        'configs/studies/logits_or_hidden.py', f'{ABLATION}/results.json', script=f'{ABLATION}/run.sh', claims='S3:',
    ),
    'S7': Entry(
        'Small students learn from short chains, larger ones from long', 'arXiv:2502.12143, arXiv:2506.07712',
        ('at equal epochs, smallest student, short - long > 0', 'rank correlation of (long - short) with size > .8',
         'at equal tokens, smallest student, short - long > 0', 'rank correlation of (long - short) with size > .8',
         'a fifth of long chains - the better pure set > -1 point, equal tokens'),
        'configs/studies/chain_length.py', f'{STUDIES}/S7/results.json', module='chain_length',
        seeds='3',
    ),
    'S4': Entry(
        'A model learns from its own right chains of thought (RFT, STaR)', 'arXiv:2308.01825, arXiv:2203.14465',
        ('accuracy, RFT with 16 samples - SFT on gold > 10 points', 'the same, 4 samples - 1 sample > 0',
         'the same, 16 samples - 4 samples > 0', '10 points - what three rounds from scratch gain > 0'),
        'configs/studies/rejection_sampling.py', f'{RL_STUDIES}/S4/results.json', module='rejection_sampling',
    ),
    'S6b': Entry(
        'RL raises pass@1, and hardly pass@k of many samples', 'arXiv:2402.03300 (figure 7), arXiv:2504.13837',
        ('pass@1 after GRPO - before > 0', 'a third of that gain - the gain in pass@256 > 0'),
        'configs/studies/pass_at_k.py', f'{RL_STUDIES}/S6b/results.json', module='pass_at_k',
    ),
    'S5': Entry(
        'GRPO lengthens wrong answers, Dr. GRPO does not', 'arXiv:2503.20783',
        ('slope of E[length | wrong], GRPO - Dr. GRPO > 0', 'the same of E[length | wrong] - E[length | right]',
         'accuracy, GRPO - Dr. GRPO > -2 points', 'accuracy, Dr. GRPO - GRPO > -2 points'),
        'configs/studies/length_bias.py', f'{RL_STUDIES}/S5/results.json', module='length_bias',
    ),
    'estimators': Entry(
        'Every preset of policy-gradient RL from one start', 'arXiv:2402.14740, arXiv:2503.14476, arXiv:2507.18071',
        ('mean of RLOO, GRPO and Dr. GRPO - REINFORCE > 0', 'DAPO - GRPO > 0', 'RLOO - PPO > 0',
         'mean of GSPO, CISPO and SAPO - GRPO > 0'),
        'configs/studies/estimators.py', f'{RL_STUDIES}/estimators/results.json', module='estimators',
    ),
    'S8': Entry(
        'RL with a length in its reward follows the length that is asked for (LCPO)', 'arXiv:2503.04697',
        ('Exact: correlation of tokens and budget - .9 > 0', 'Exact: 1.5 tokens - the mean miss > 0',
         'Exact: accuracy - that of the start > -3 points', 'Max: mean length from Exact - from the start > 0'),
        'configs/studies/length_control.py', f'{RL_STUDIES}/S8/results.json', module='length_control',
    ),
    'S10': Entry(
        'LoRA of rank 8 at ten times the rate matches all weights in RL', 'arXiv:2504.15777',
        ('accuracy, rank 8 - all weights within 5 points', 'accuracy, rank 8 - rank 2 > -1 point'),
        'configs/studies/lora_rl.py', f'{RL_STUDIES}/S10/results.json', module='lora_rl',
    ),
    'S11': Entry(
        'From easy to hard beats all alike on the hardest problems', 'arXiv:2505.24760',
        ('accuracy at 8 digits, from easy to hard - uniform > 5 points',),
        'configs/studies/curriculum.py', f'{RL_STUDIES}/S11/results.json', module='curriculum',
    ),
}


def recorded(entry: Entry) -> list[dict] | None:
  """The verdicts of the recorded run, in the order of `expected`; None where there is none."""
  path = ROOT / entry.results
  found = json.loads(path.read_text()) if path.exists() else {}
  section = found.get(pathlib.Path(entry.config).stem)
  if section is None:
    return None
  return [one for one in section['verdicts'] if one['claim'].startswith(entry.claims)]


def outcome(verdict: dict) -> str:
  """'supported: +0.031 [0.012, 0.050] over 5 seeds', an interval a task; accuracies are fractions."""
  said = {
      task: f'{tables.evidence(one, "")} over {len(one["by_seed"])} seeds' for task, one in verdict['evidence'].items()
  }
  seen = '; '.join(f'{task} {one}' for task, one in said.items()) if len(said) > 1 else ''.join(said.values())
  return f'{verdict["verdict"]}: {seen}'


def describe(identifier: str, entry: Entry) -> str:
  """What --list prints of a study."""
  run = f'python -m experiments.reproduce --run={identifier} --workdir=runs/{identifier}'
  lines = [f'{identifier:<9} {entry.title}', f'{"":<9} {entry.paper}', f'{"":<9} {entry.config}   {run}']
  if entry.published:
    lines.append(f'{"":<9} published models: {entry.published}')
  verdicts = recorded(entry)
  said = [NOT_RUN] * len(entry.expected) if verdicts is None else [outcome(one) for one in verdicts]
  for claim, seen in zip(entry.expected, said, strict=True):
    lines += textwrap.wrap(f'{claim}  ->  {seen}', 118, initial_indent=f'{"":<9} - ', subsequent_indent=f'{"":<11} ')
  return '\n'.join(lines)


def run(identifier: str, workdir: str, *, smoke: bool, seeds_text: str, record: bool):
  """Runs a study, or continues it, and prints its verdicts.

  Raises:
    ConfigError: no such study, or one to record that is not whole: a smoke run, or other seeds than its rule is about.
  """
  from srm_jax import schema

  entry = schema.choose('study', identifier, ENTRIES)
  chosen = seeds(seeds_text or ('1' if smoke else entry.seeds))
  if record and (smoke or chosen != seeds(entry.seeds)):
    raise schema.ConfigError(
        f'what is recorded of {identifier} is its full size with --seeds={entry.seeds}; '
        'fix: --record without --smoke and --seeds'
    )
  if entry.script:
    out = pathlib.Path(entry.results).parent if record else f'{workdir}/report'
    arguments = [f'--workdir={workdir}', f'--out={out}', f'--seeds={",".join(map(str, chosen))},']
    try:
      subprocess.run(['bash', str(ROOT / entry.script), *arguments, *(['--smoke'] if smoke else [])], check=True)
    except subprocess.CalledProcessError as error:
      sys.exit(error.returncode)  # the script has said why
    return
  from experiments.study import running

  study = importlib.import_module(entry.place).STUDY
  say = lambda seed, stage: print(f'{identifier}, seed {seed}: {stage.name}, {stage.seconds:.0f} s', flush=True)
  results = running.run(study, workdir, size='smoke' if smoke else 'full', seeds=chosen, report=say)
  print(running.markdown(results))
  if record:
    running.record(results, identifier, workdir, (ROOT / entry.results).parent)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}')
  if _LIST.value:
    print('\n\n'.join(describe(*item) for item in ENTRIES.items()))
    return
  if not _RUN.value or not _WORKDIR.value:
    sys.exit('error: give --list, or --run=ID with --workdir=DIR')
  command.show_progress_of_library()
  runtime.prepare()
  command.guarded(lambda: run(
      _RUN.value, _WORKDIR.value, smoke=_SMOKE.value, record=_RECORD.value, seeds_text=_SEEDS.value,
  ))


if __name__ == '__main__':
  _LIST = flags.DEFINE_bool('list', False, 'Prints all studies, what they expect and what came out.')
  _RUN = flags.DEFINE_string('run', None, 'Which study to run: an ID of --list.')
  _WORKDIR = flags.DEFINE_string('workdir', None, 'Where stages and results go; the same command continues.')
  _SMOKE = flags.DEFINE_bool('smoke', False, 'The smallest form: it shows that everything runs, and nothing else.')
  _SEEDS = flags.DEFINE_string('seeds', '', 'How many seeds from 1 on, or the seeds themselves: 7,8,9; all by default.')
  _RECORD = flags.DEFINE_bool('record', False, 'Puts results, figures and tables where the repository has them.')
  app.run(main)
