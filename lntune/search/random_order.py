"""The candidates in random order: the yardstick any cleverer search has to beat.

Unlike `exhaustive` it has seen a fair sample of the space whenever the budget ends.
"""

from __future__ import annotations

import random

from lntune.search import in_hand
from lntune.search.budget import Budget, Evaluate
from lntune.search.space import Space


def search(space: Space, evaluate: Evaluate, budget: Budget, rng: random.Random) -> None:
    """Tries the default, then the others in an order drawn from `rng`, until none is left or the
    budget is spent.
    """
    candidates = list(dict.fromkeys(space.candidates))
    others = candidates[1:]
    rng.shuffle(others)
    untried = dict.fromkeys([*candidates[:1], *others])
    in_hand.search(space, evaluate, budget, untried, lambda _: [next(iter(untried))])
