"""A search on a table of costs, in place of a machine: what it would have tried, and how far from
the best that was after some trials.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lntune.search.budget import Budget, Evaluate
from lntune.search.space import Space

Search = Callable[[Space, Evaluate, Budget, random.Random], None]


def tried(
    search: Search,
    space: Space,
    table: Mapping[Any, float],
    seed: int,
    trials: int | None = None,
    limit: float = math.inf,
) -> list[float]:
    """The costs that a search comes upon, in order, until it has made so many trials and found one
    that costs no more than `limit`; without `trials`, all. A candidate that failed costs infinitely
    much, and a trial.
    """
    found: list[float] = []
    budget = Budget()

    def evaluate(candidate: Any) -> float:
        budget.count()
        found.append(table[candidate])
        if trials is not None and len(found) >= trials and min(found) <= limit:
            budget.part = 0.0  # it is spent
        return found[-1]

    search(space, evaluate, budget, random.Random(seed))
    return found


def regret(costs: Sequence[float], trials: int, best: float) -> float:
    """By what share the best of so many trials is slower than the best of all; infinite where none
    worked. A search that had nothing left to try has found the best.
    """
    return min(costs[:trials], default=math.inf) / best - 1


def trials_to(costs: Sequence[float], limit: float) -> float:
    """The number of the first trial that cost no more; infinite where there is none."""
    return next((n for n, cost in enumerate(costs, 1) if cost <= limit), math.inf)
