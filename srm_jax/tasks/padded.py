"""Running sums whose chains end in fillers that say nothing: how long a text is is free, what it answers is not.

  3+8+4+9     154~~~~~~ then '#### 4', with 0 to 16 fillers

How many there are hangs on a hash of the problem, which no model can foresee.
Reference: a filler in the place of a step as in Pfau et al., Let's Think Dot by Dot, arXiv:2404.15758.
"""

from srm_jax.tasks import running_sums, task
from srm_jax.types import Problem

FILLER = '~'
MOST = 16


def padded(problem: Problem) -> str:
  """Sums from the left and fillers: '3+8+4+9' -> '154~~~~~~'."""
  return running_sums.forward(problem) + FILLER * (task.stable_hash(f'filler {problem.question}') % (MOST + 1))
