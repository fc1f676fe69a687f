"""Searches: ways to decide which candidate a tuning run tries next. A new one is a file here and a
line below; it knows nothing of kernels, TVM or PyTorch.

A search calls `evaluate` on distinct candidates, the default (`space.candidates[0]`) first, until
`budget.spent` or the space is used up. It keeps no result: whoever passed `evaluate` has seen every
cost. It may choose further ones before it has seen what came of the last, see `in_hand`.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from lntune.errors import unknown
from lntune.search import bayesian, evolutionary, exhaustive, local, random_order, ranked, tpe
from lntune.search.budget import Budget, Evaluate
from lntune.search.space import Space

Search = Callable[[Space, Evaluate, Budget, random.Random], None]

SEARCHES: dict[str, Search] = {
    "exhaustive": exhaustive.search,
    "random": random_order.search,
    "local": local.search,
    "ranked": ranked.search,
    "evolutionary": evolutionary.search,
    "bayesian": bayesian.search,
    "optuna": tpe.search,
}


def get(name: str) -> Search:
    """The search `name`; UnknownNameError with the near miss when there is none."""
    if name not in SEARCHES:
        raise unknown("search", name, SEARCHES)
    return SEARCHES[name]


def usable() -> list[str]:
    """The searches whose packages are installed."""
    return [name for name in SEARCHES if name != "optuna" or tpe.installed()]


def ensure_usable(name: str) -> None:
    """Complain where a search cannot be used here.

    Raises:
        UnknownNameError: there is none of that name.
        ToolchainError: it needs a package that is not installed.
    """
    get(name)
    if name not in usable():
        tpe.available()


__all__ = ["SEARCHES", "Budget", "Evaluate", "Search", "Space", "ensure_usable", "get", "usable"]
