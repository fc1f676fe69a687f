"""How a search has several candidates in hand: the next ones are chosen, and got ready, before it
is known what came of those before them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from lntune.search.budget import Budget, Evaluate
from lntune.search.space import Space

Choose = Callable[[Sequence[Any]], list[Any]]
"""Takes the candidates in hand, the first to be evaluated first; returns one that was not tried, or
none while that depends on them.
"""


def search(
    space: Space,
    evaluate: Evaluate,
    budget: Budget,
    untried: dict[Any, None],
    choose: Choose,
    told: Callable[[Any, float], None] = lambda *_: None,
) -> None:
    """Evaluate what `choose` returns, in that order, until nothing is untried or the budget is
    spent; what is chosen is taken out of `untried`. After each `told(candidate, cost)` is called.

    Of the candidates in hand, `space.at_once` at most, those behind the first are not evaluated
    where the budget is spent before.
    """
    in_hand: deque[Any] = deque()
    while not budget.spent:
        while untried and len(in_hand) < min(space.at_once, budget.trials_left):
            chosen = choose(tuple(in_hand))
            for candidate in chosen:
                del untried[candidate]
                in_hand.append(candidate)
                space.begin(candidate)
            if not chosen:
                break
        if not in_hand:
            return
        candidate = in_hand.popleft()
        told(candidate, evaluate(candidate))
