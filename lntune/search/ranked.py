"""Alternates between the untried candidate that the space ranks best and neighbours of the best
measured one: for spaces that know something of their candidates.

On a GPU candidates are built ahead and ranked by what their code tells; which of those that are
built is next, the space says. A rank that is wrong costs half of the trials at most: the other half
are steps from the best that was measured.
"""

from __future__ import annotations

import math
import random
from typing import Any

from lntune.search.budget import Budget, Evaluate
from lntune.search.space import Space


def search(space: Space, evaluate: Evaluate, budget: Budget, rng: random.Random) -> None:
    """Tries the default, then by turns what the space puts first of all and of the neighbours of
    the best so far. `rng` is not used.
    """
    untried = dict.fromkeys(space.candidates)
    best: Any = None
    lowest = math.inf
    first = near = True
    while untried and not budget.spent:
        around = (
            [c for c in dict.fromkeys(space.neighbours(best)) if c in untried]
            if near and best is not None
            else []
        )
        candidate = next(iter(untried)) if first else space.choose(around, list(untried))
        del untried[candidate]
        first = False
        cost = evaluate(candidate)
        if cost < lowest:
            best, lowest = candidate, cost
        near = not near
