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
    before = next(c for c in costs if costs[c] == 1)
    chosen = finals.choose(costs, DEFAULT, before)
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
    """What failed is not in the final, also where it served until now, a candidate is so once, and
    a default that was not tried is another matter (it is measured, and cannot win).
    """
    costs = tried(plain=[1, 2, math.inf], broken=[math.inf])
    for before in (DEFAULT, *(c for c in costs if costs[c] == math.inf)):
        assert [costs[c] for c in finals.choose(costs, default, before)] == [1, 2]
    assert finals.choose(tried(broken=[math.inf]), DEFAULT, DEFAULT) == []


def test_what_served_until_now_is_in_the_final() -> None:
    """The winner of before competes again, unless its trial has shown that it is far behind, or it
    is of a schedule that is not tuned.
    """
    costs = tried(plain=[1.0, 1.01, 1.02, 1.09, 1.3], slow=[2.0])
    near, behind = (next(c for c in costs if costs[c] == us) for us in (1.09, 1.3))
    assert near in finals.choose(costs, DEFAULT, near)
    for before in (behind, Candidate("other", ())):
        assert finals.choose(costs, DEFAULT, before) == finals.choose(costs, DEFAULT)


def test_who_races_before_the_final() -> None:
    """The best eight of those that took little more than the fastest; nobody where these are in the
    final anyway.
    """
    costs = tried(plain=[1.0 + i / 100 for i in range(12)], slow=[1.2, math.inf])
    assert [costs[c] for c in finals.heat(costs)] == pytest.approx([1 + i / 100 for i in range(8)])
    assert finals.heat(tried(plain=[1.0, 1.05, 1.09, 1.2])) == []
    assert finals.heat(tried(broken=[math.inf] * 5)) == finals.heat({}) == []


def test_who_can_be_built_for_a_race() -> None:
    """Half of the spare time may be spent on building those that the process which races does not
    have; the slowest of them stay out, and nobody races where all others are in the final anyway.
    """
    costs = tried(plain=[1.0 + i / 100 for i in range(6)])
    entrants = finals.heat(costs)
    kept = entrants[1::2]
    assert finals.affordable(entrants, kept, 0.2, math.inf) == (entrants, pytest.approx(0.6))
    assert finals.affordable(entrants, kept, 0.2, 1.0) == (
        [c for c in entrants if c != entrants[4]],
        pytest.approx(0.4),
    )
    assert finals.affordable(entrants, kept, 0.2, 0.1) == ([], 0.0)
    assert finals.affordable(entrants, entrants, 0.2, 0.0) == (entrants, 0.0)
    assert finals.affordable(entrants, kept, 0.0, 0.0) == (entrants, 0.0)


def test_what_a_race_says_counts() -> None:
    """The costs of those that raced are dealt out in the order in which they came in; those of the
    others stay.
    """
    costs = tried(plain=[1.0, 1.02, 1.04, 1.06, 3.0])
    entrants = finals.heat(costs)
    raced = finals.raced(costs, entrants, (3, 0, 1, 2))
    assert [raced[c] for c in costs] == [1.02, 1.04, 1.06, 1.0, 3.0]
    assert finals.choose(raced, None)[0] == entrants[3]


def test_the_fastest_is_left_out_last() -> None:
    """The order is that in which candidates are kept where time is short: the fastest, the best of
    other schedules, the default, and then the next fastest.
    """
    costs = tried(plain=[4, 2, 3], slow=[9])
    chosen = finals.choose(costs, DEFAULT)
    assert costs[chosen[0]] == min(costs.values())
    assert [c.schedule for c in chosen[:2]] == ["plain", "slow"]
    assert chosen[2] == DEFAULT
