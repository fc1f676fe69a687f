"""Every candidate, in the order given: the truth, for spaces that can be afforded."""

from __future__ import annotations

import random

from lntune.search import in_hand
from lntune.search.budget import Budget, Evaluate
from lntune.search.space import Space


def search(space: Space, evaluate: Evaluate, budget: Budget, rng: random.Random) -> None:
    """Tries the candidates one after another until none is left or the budget is spent. `rng` is
    not used.
    """
    untried = dict.fromkeys(space.candidates)  # a candidate listed twice is tried once
    in_hand.search(space, evaluate, budget, untried, lambda _: [next(iter(untried))])
