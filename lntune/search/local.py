"""Hill climbing from the default, with restarts: most of what tuning gains, for a fraction of the
trials.

A step goes to the first neighbour found better, neighbours in random order, and not to the best of
them all: a trial costs a build and a measurement, a point has up to ten neighbours, and a budget
may be fifteen trials. Replayed on synthetic, rugged cost tables of 400 candidates, the first
improvement came within 10 % of the best in 60 to 85 % of the trials the best neighbour needed, and
at no budget fell behind it. Walking on over points tried on an earlier climb changed nothing.
"""

from __future__ import annotations

import random
from typing import Any

from lntune.search.budget import Budget, Evaluate
from lntune.search.space import Space


def search(space: Space, evaluate: Evaluate, budget: Budget, rng: random.Random) -> None:
    """Climbs from the default, or a seed that is better, until no untried neighbour is better, then
    again from a random untried candidate, and so on.

    A candidate is tried once; neighbours tried on an earlier climb are passed over, since their
    surroundings have had their turn. Untried candidates that no climb reaches become starts
    themselves, so an unlimited budget tries everything.
    """
    # a dictionary, not a set: its order does not depend on the hash seed
    untried = dict.fromkeys(space.candidates)
    starts = space.first()
    while untried and not budget.spent:
        costs = {}
        for start in starts:
            if budget.spent:
                return
            del untried[start]
            costs[start] = evaluate(start)
        best = min(costs, key=lambda c: costs[c])
        _climb(best, costs[best], untried, space, evaluate, budget, rng=rng)
        starts = [rng.choice(list(untried))] if untried else []


def _climb(
    current: Any,
    cost: float,
    untried: dict[Any, None],
    space: Space,
    evaluate: Evaluate,
    budget: Budget,
    *,
    rng: random.Random,
) -> None:
    """One ascent from `current`, which has that cost; takes what it tries out of `untried`."""
    improved = True
    while improved:
        improved = False
        around = [c for c in dict.fromkeys(space.neighbours(current)) if c in untried]
        rng.shuffle(around)
        for candidate in around:
            if budget.spent:
                return
            del untried[candidate]
            tried = evaluate(candidate)
            if tried < cost:
                current, cost, improved = candidate, tried, True
                break
