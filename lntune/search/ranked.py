"""Alternates between the untried candidate that the space ranks best and neighbours of the best
measured one: for spaces that know something of their candidates.

On a GPU candidates are built ahead and ranked by what their code tells; which of those that are
built is next, the space says. Its seeds go before all of that. A rank that is wrong costs half of
the trials at most: the other half are steps from the best that was measured.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence
from typing import Any

from lntune.search import in_hand
from lntune.search.budget import Budget, Evaluate
from lntune.search.space import Space


def search(space: Space, evaluate: Evaluate, budget: Budget, rng: random.Random) -> None:
    """Tries the default and the seeds, then by turns what the space puts first of all and of the
    neighbours of the best so far. `rng` is not used.
    """
    untried = dict.fromkeys(space.candidates)
    first = deque(c for c in dict.fromkeys((*space.candidates[:1], *space.seeds)) if c in untried)
    best: Any = None
    lowest = math.inf
    near = False

    def choose(_: Sequence[Any]) -> list[Any]:
        nonlocal near
        near = not near
        if first:
            return [first.popleft()]
        known = near and best is not None
        around = [c for c in dict.fromkeys(space.neighbours(best)) if c in untried] if known else []
        return [space.choose(around, list(untried))]

    def told(candidate: Any, cost: float) -> None:
        nonlocal best, lowest
        if cost < lowest:
            best, lowest = candidate, cost

    in_hand.search(space, evaluate, budget, untried, choose, told)
