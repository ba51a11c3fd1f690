"""Strategies turn one `Generate` into another, so they nest; costs add up in `Completion.spent`.

  STRATEGIES['self_consistency'](STRATEGIES['chain_of_thought'](generate, temperature=0.7), extract=..., samples=8)
"""

from collections.abc import Callable

from srm_jax.inference.strategies.prompting import chain_of_thought, direct
from srm_jax.inference.strategies.replay import replay as replay
from srm_jax.inference.strategies.selection import best_of_n, self_consistency, weighted_vote
from srm_jax.types import Generate

STRATEGIES: dict[str, Callable[..., Generate]] = {
    'direct': direct,
    'chain_of_thought': chain_of_thought,
    'self_consistency': self_consistency,
    'best_of_n': best_of_n,
    'weighted_vote': weighted_vote,
}
