"""What is measured in a final: what may serve the case, and what schedules are told apart by."""

from __future__ import annotations

import math

import pytest

from lntune.measure.jobs import Candidate
from lntune.tune import finals

DEFAULT = Candidate("plain", (("first", 1),))


def tried(**costs: list[float]) -> dict[Candidate, float]:
    """Candidates of schedules with what each costs; the knob `first` counts from 1 on."""
    return {
        Candidate(schedule, (("first", i),)): cost
        for schedule, listed in costs.items()
        for i, cost in enumerate(listed, 1)
    }


def test_the_best_of_every_schedule_is_measured_again() -> None:
    """However slow a schedule is, its best candidate is in the final, beside the fastest ones and
    the default.
    """
    costs = tried(plain=[9, 4, 3, 1, 2], slow=[80, 70], slower=[math.inf, 700])
    chosen = finals.choose(costs, DEFAULT)
    assert [(c.schedule, costs[c]) for c in chosen] == [
        ("plain", 1),
        ("slow", 70),
        ("slower", 700),
        ("plain", 9),
        ("plain", 2),
        ("plain", 3),
    ]
    assert len(chosen) == finals.most(trials=9, schedules=3)


@pytest.mark.parametrize("default", [None, DEFAULT, Candidate("other", ())])
def test_nothing_is_measured_twice_or_though_it_failed(default: Candidate | None) -> None:
    """What failed is not in the final, a candidate is so once, and a default that was not tried is
    another matter (it is measured, and cannot win).
    """
    costs = tried(plain=[1, 2, math.inf], broken=[math.inf])
    assert [costs[c] for c in finals.choose(costs, default)] == [1, 2]
    assert finals.choose(tried(broken=[math.inf]), None) == []


def test_the_fastest_is_left_out_last() -> None:
    """The order is that in which candidates are kept where time is short: the fastest, the best of
    other schedules, the default, and then the next fastest.
    """
    costs = tried(plain=[4, 2, 3], slow=[9])
    chosen = finals.choose(costs, DEFAULT)
    assert costs[chosen[0]] == min(costs.values())
    assert [c.schedule for c in chosen[:2]] == ["plain", "slow"]
    assert chosen[2] == DEFAULT
