"""Searches: ways to decide which candidate a tuning run tries next. A new one is a file here and a
line below; it knows nothing of kernels, TVM or PyTorch.

A search calls `evaluate` on distinct candidates, the default (`space.candidates[0]`) first, until
`budget.spent` or the space is used up. It keeps no result: whoever passed `evaluate` has seen every
cost.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from lntune.errors import unknown
from lntune.search import exhaustive, local, random_order, ranked
from lntune.search.budget import Budget, Evaluate
from lntune.search.space import Space

Search = Callable[[Space, Evaluate, Budget, random.Random], None]

SEARCHES: dict[str, Search] = {
    "exhaustive": exhaustive.search,
    "random": random_order.search,
    "local": local.search,
    "ranked": ranked.search,
}


def get(name: str) -> Search:
    """The search `name`; UnknownNameError with the near miss when there is none."""
    if name not in SEARCHES:
        raise unknown("search", name, SEARCHES)
    return SEARCHES[name]


__all__ = ["SEARCHES", "Budget", "Evaluate", "Search", "Space", "get"]
