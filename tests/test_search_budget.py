"""Budgets: when a search has to end, on a clock that only the tests move."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lntune.errors import InputError
from lntune.search import Budget


class FakeClock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Now."""
        return self.now


def test_budget_counts_trials() -> None:
    """A budget in trials is used up by counting, and fraction says how far it is."""
    budget = Budget(trials=4)
    assert (budget.spent, budget.fraction) == (False, 0.0)
    budget.count()
    assert (budget.spent, budget.fraction, budget.trials_done) == (False, 0.25, 1)
    for _ in range(5):
        budget.count()
    assert (budget.spent, budget.fraction, budget.trials_done) == (True, 1.0, 6)


def test_budget_takes_the_limit_that_is_nearer() -> None:
    """With both limits the fraction is the larger of the two, and either ends the search."""
    clock = FakeClock()
    budget = Budget(seconds=10.0, trials=4, clock=clock)
    clock.now += 6.0
    budget.count()
    assert (budget.fraction, budget.spent) == (0.6, False)
    budget.count()
    budget.count()
    assert budget.fraction == 0.75
    clock.now += 5.0
    assert (budget.fraction, budget.spent) == (1.0, True)


def test_budget_without_limit_is_never_spent() -> None:
    """No limit means no end: fraction stays at 0."""
    clock = FakeClock()
    budget = Budget(clock=clock)
    budget.count()
    clock.now += 1e9
    assert (budget.spent, budget.fraction, budget.trials_done) == (False, 0.0, 1)


def test_budget_keeps_a_reserve() -> None:
    """The end of the time is kept for something else, as much as that is thought to take at the
    moment; infinitely little: no end yet.
    """
    clock = FakeClock()
    reserved = [-math.inf]
    budget = Budget(seconds=10.0, clock=clock, reserve=lambda: reserved[0])
    clock.now += 20.0
    assert not budget.spent
    clock.now -= 14.0
    reserved[0] = 2.0
    assert (budget.fraction, budget.spent) == (0.75, False)
    reserved[0] = 5.0
    assert (budget.fraction, budget.spent) == (1.0, True)
    reserved[0] = 11.0
    assert budget.spent


@pytest.mark.parametrize("limits", [{"seconds": 0.0}, {"trials": 0}])
def test_budget_of_nothing_is_spent(limits: dict[str, Any]) -> None:
    """A limit of 0 is a budget that is used up from the start."""
    assert Budget(**limits).spent
    assert Budget(**limits).fraction == 1.0


@pytest.mark.parametrize("limits", [{"seconds": -1.0}, {"seconds": math.nan}, {"trials": -3}])
def test_budget_refuses_nonsense(limits: dict[str, Any]) -> None:
    """A negative limit, or none that can be reached, is an InputError naming the argument."""
    (name,) = limits
    with pytest.raises(InputError, match=rf"^{name}: got .* expected 0 or more"):
        Budget(**limits)
