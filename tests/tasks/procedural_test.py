"""Step oracles by hand and by arithmetic, splits by hash, streams by seed."""

import re
import time

import pytest

from srm_jax.tasks import procedural
from srm_jax.types import Problem

SETTINGS = {
    'chain_sum': {'max_terms': 3, 'max_digits': 2},
    'basic_arithmetic': {'max_terms': 4, 'max_digits': 1, 'allow_negation': True},
    'leg_counting': {'min_animals': 2, 'max_animals': 3},
    'time_intervals': {},
    'ab': {'length': 7},
    'simple_equations': {'max_value': 12},
}


def _task(*families):
  return procedural.procedural_task('mix', {family: SETTINGS[family] for family in families})


@pytest.mark.parametrize('steps, facts, lines, answer', [
    (procedural.expression_steps, {'expression': '12 + 34 - 7'}, ['12+34=46', '46-7=39'], '39'),
    (procedural.expression_steps, {'expression': '2 + 3 * 4'}, ['3*4=12', '2+12=14'], '14'),
    (procedural.expression_steps, {'expression': '9 - 5 - 1'}, ['9-5=4', '4-1=3'], '3'),
    (procedural.expression_steps, {'expression': '( 2 + 3 ) * -4'}, ['2+3=5', '5*-4=-20'], '-20'),
    (procedural.expression_steps, {'expression': '-( 2 - 5 ) + 1'}, ['2-5=-3', '0--3=3', '3+1=4'], '4'),
    (procedural.expression_steps, {'expression': '1 - -( 2 * 3 )'}, ['2*3=6', '0-6=-6', '1--6=7'], '7'),
    (procedural.leg_steps, {'animals': {'deer': 3, 'ant': 1}}, ['3 deers 3*4=12 0+12=12', '1 ant 1*6=6 12+6=18'],
    '18'),
    (procedural.interval_steps, {'start': '02:05', 'end': '08:14'}, ['14-5=9', '8-2=6'], '06:09'),
    (procedural.interval_steps, {'start': '18:54', 'end': '19:29'}, ['29-54=-25', '60-25=35', '19-18-1=0'], '00:35'),
    (procedural.rewriting_steps, {'program': 'A# #A B#'}, ['B#'], 'B#'),
    (procedural.rewriting_steps, {'program': 'A# #B'}, ['#B A#'], '#B A#'),
    (procedural.rewriting_steps, {'program': 'B# A# #B #A'}, ['B# #B A# #A', 'A# #A', ''], ''),
    (procedural.rewriting_steps, {'program': 'A# B# #A B# #B'}, ['A# #A B# B# #B', 'B# B# #B', 'B#'], 'B#'),
    (procedural.rewriting_steps, {'program': '#A B#'}, [], '#A B#'),
    (procedural.equation_steps, {'equation': '3*x + 4 = 19'}, ['19-4=15', '15/3=5'], '5'),
    (procedural.equation_steps, {'equation': '8 - 4*v = -4'}, ['-4-8=-12', '-12/-4=3'], '3'),
    (procedural.equation_steps, {'equation': '-a - 2 = -9'}, ['-9+2=-7', '-7/-1=7'], '7'),
    (procedural.equation_steps, {'equation': 'b + 2 = 9'}, ['9-2=7'], '7'),
    (procedural.equation_steps, {'equation': '6*c = 42'}, ['42/6=7'], '7'),
])
def test_steps_by_hand(steps, facts, lines, answer):
  assert steps(facts) == (lines, answer)


def test_steps_without_a_rule_say_what_to_set():
  with pytest.raises(ValueError, match="no rationale for '/'"):
    procedural.expression_steps({'expression': '6 / 3'})
  with pytest.raises(ValueError, match='linear'):
    procedural.equation_steps({'equation': 'x**2 = 4'})


def test_every_line_of_a_program_is_one_rewrite_of_the_line_before_until_none_is_left():
  rules = {'A# #A': '', 'B# #B': '', 'A# #B': '#B A#', 'B# #A': '#A B#'}  # as the question states them

  def rewrites(line):
    found = ((line[:m.start()] + new + line[m.end():]) for old, new in rules.items() for m in re.finditer(old, line))
    return {' '.join(state.split()) for state in found}

  for problem in _task('ab').problems('train', count=150):
    lines = [problem.metadata['program'], *problem.rationale.splitlines()]
    assert 2 <= len(lines) <= procedural.MOST_REWRITES + 1
    assert all(after in rewrites(before) for before, after in zip(lines, lines[1:]))
    assert lines[-1] == problem.answer and not rewrites(problem.answer)
    assert all(f'{old} ... becomes ... {new or "nothing"}' in problem.question for old, new in rules.items())


@pytest.mark.parametrize('program', ['A# #A', '#A B#', 'A# ' * 4 + '#B ' * 4])
def test_programs_without_an_answer_without_a_step_or_with_too_many_are_left_out(program):
  question = f'{procedural.FAMILIES["ab"].preamble}{program.strip()}\n\nReturn the final state of the program.'
  assert procedural._program_facts({'question': question}) is None


@pytest.mark.parametrize('family', procedural.FAMILIES)
def test_every_equation_of_a_rationale_holds_and_the_verifier_agrees(family):
  this = _task(family)
  for problem in this.problems('train', count=150):
    equations = re.findall(r'([-+*/\d]+)=(-?\d+)', problem.rationale)
    assert equations or not problem.rationale or family == 'ab'
    for left, right in equations:
      assert eval(left) == int(right), problem.rationale
    entry = {'answer': problem.answer, 'metadata': problem.metadata}
    assert procedural._verifier(family)(problem.answer, entry) == 1.0


def test_oracle_agrees_with_reasoning_gym_and_corrects_its_missing_precedence():
  import reasoning_gym

  for family in procedural.FAMILIES:
    arguments = {**procedural.FAMILIES[family].settings, **SETTINGS[family]}
    for entry in reasoning_gym.create_dataset(family, seed=7, size=100, **arguments):
      made = procedural._to_problem(family, entry)
      assert made is None or made[1].answer == entry['answer']
  flat = reasoning_gym.create_dataset('basic_arithmetic', seed=7, size=100, allow_parentheses=False,
      operators=['+', '*'])
  pairs = [(procedural._to_problem('basic_arithmetic', entry)[1].answer, entry) for entry in flat]
  assert all(answer == str(eval(entry['metadata']['expression'])) for answer, entry in pairs)
  assert any(answer != entry['answer'] for answer, entry in pairs)


def test_times_that_reasoning_gym_answers_wrongly_are_dropped():
  entry = {'metadata': {'start_time': '2020-01-01 23:10:00', 'end_time': '2020-01-01 00:00:00', 'task_type': 'time'}}
  assert procedural._interval_facts(entry) is None
  for problem in _task('time_intervals').problems('train', count=300):
    assert problem.metadata['start'] <= problem.metadata['end'] and not problem.answer.startswith('-')
    assert not re.search(r'\d{4}-', str(problem.metadata))  # the day of generation would make problems irreproducible


def test_problems_depend_on_split_seed_and_count_alone():
  this = _task('chain_sum', 'leg_counting')
  first = this.problems('train', count=40, seed=3)
  assert first == _task('chain_sum', 'leg_counting').problems('train', count=40, seed=3)
  assert first == this.problems('train', count=40, seed=3) and first is not this.problems('train', count=40, seed=3)
  assert first[:10] == this.problems('train', count=10, seed=3)
  assert [problem.metadata['family'] for problem in first[:4]] == ['chain_sum', 'leg_counting'] * 2
  assert len({problem.id for problem in first}) == len({problem.question for problem in first}) == 40


def test_neighbouring_seeds_share_little():
  this = _task('leg_counting')
  one, two = ({problem.id for problem in this.problems('train', count=200, seed=seed)} for seed in (0, 1))
  assert len(one & two) < 10


def test_no_computation_crosses_splits_whatever_seed_wording_order_or_family():
  this = _task('chain_sum', 'basic_arithmetic', 'leg_counting', 'time_intervals', 'ab')
  where = {}
  for seed in (0, 1):
    for split in ('train', 'dev', 'test'):
      for problem in this.problems(split, count=300, seed=seed):
        if problem.metadata['family'] == 'leg_counting':
          key = frozenset(problem.metadata['animals'].items())
        else:
          key = problem.rationale
        assert where.setdefault(key, split) == split, problem
  assert len(set(where.values())) == 3


def test_hard_is_harder_and_disjoint_from_train_even_when_settings_overlap():
  this = procedural.procedural_task('t', {'chain_sum': {'max_terms': 3}},
      hard={'chain_sum': {'min_terms': 3, 'max_terms': 5}})
  hard = this.problems('hard', count=80)
  assert max(problem.metadata['steps'] for problem in hard) == 4
  assert not {problem.id for problem in hard} & {problem.id for problem in this.problems('train', count=2000)}
  with pytest.raises(ValueError, match="no split 'hard'"):
    _task('chain_sum').problems('hard')


def test_an_exhausted_space_is_a_clear_error():
  this = procedural.procedural_task('tiny', {'chain_sum': {'min_terms': 2, 'max_terms': 2, 'max_digits': 1}})
  with pytest.raises(ValueError, match=r"'tiny', split 'train'.*'chain_sum'.*about 1\d\d distinct.*500 problems"):
    this.problems('train', count=500)


def test_unknown_families_and_settings_are_named():
  with pytest.raises(ValueError, match="'chain_sums' unknown; choose from chain_sum"):
    procedural.procedural_task('t', {'chain_sums': {}})
  with pytest.raises(ValueError, match='names no family'):
    procedural.procedural_task('t', {})
  with pytest.raises(ValueError, match="'chain_sum' refuses.*max_term"):
    procedural.procedural_task('t', {'chain_sum': {'max_term': 3}}).problems('train', count=1)
  with pytest.raises(ValueError, match='max_terms must be'):
    procedural.procedural_task('t', {'chain_sum': {'max_terms': 1}}).problems('train', count=1)


PROBLEM = Problem('0', '12 + 34 - 7', '39', '12+34=46\n46-7=39', {'family': 'chain_sum', 'steps': 2})


@pytest.mark.parametrize('text, index', [
    ('12+34=46\n46-7=39\n#### 39', None),
    (' 12+34=46\n\n46-7=39 \n#### 39.0', None),
    ('#### 39', None),
    ('12+34=46\n46-7=39\n#### 38', 2),
    ('12+34=47\n47-7=40\n#### 40', 0),
    ('12+34=46\n46-7=38\n#### 38', 1),
    ('34+12=46\n46-7=39\n#### 39', 0),
    ('12+34=46\n46-7=39\n39+0=39\n#### 39', 2),
    ('12+34=46\n46-7=39', 2),
    ('', 0),
])
def test_first_wrong_step(text, index):
  assert procedural.first_wrong_step(PROBLEM, text) == index


@pytest.mark.parametrize('answer, grade', [
    ('39', 1.0), ('39.0', 1.0), ('+39', 1.0), ('390', 0.0), ('3', 0.0), ('39 or 40', 0.0), ('nan', 0.0), ('', 0.0),
    ('٣٩', 0.0),
    ('9' * 1000, 0.0), ('1e999999999', 0.0)])
def test_grade_gives_full_marks_or_none(answer, grade):
  assert procedural.grade(PROBLEM, f'12+34=46\n#### {answer}') == grade


def test_prompt_leaves_the_constant_parts_out():
  chain, legs, program = _task('chain_sum', 'leg_counting', 'ab').problems('train', count=3)
  assert procedural.prompt(program) == program.metadata['program'] + '\n'
  assert re.fullmatch(r'[-+ \d]+ =\n', procedural.prompt(chain))
  assert procedural.prompt(legs).startswith('How many legs are there in total if you have ')


def test_generation_is_linear():
  this = _task('chain_sum', 'leg_counting')
  this.problems('train', count=10)
  start = time.process_time()
  this.problems('train', count=4000)
  assert time.process_time() - start < 4.0
