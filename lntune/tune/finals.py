"""Which candidates of a case are measured once more, against each other: what serves the case is
chosen among them, and by them the log can tell its schedules apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from lntune.measure.jobs import Candidate

FASTEST = 3


def choose(costs: Mapping[Candidate, float], default: Candidate | None) -> list[Candidate]:
    """The fastest, the best of each other schedule, `default` where it was tried, and the next of
    the FASTEST: in this order, so that what comes last is what to leave out where time is short.
    `costs` are infinite for what failed.
    """
    working = sorted((c for c, cost in costs.items() if cost < math.inf), key=lambda c: costs[c])
    best: dict[str, Candidate] = {}
    for candidate in working:
        best.setdefault(candidate.schedule, candidate)
    defaults = [default] if default is not None and default in costs else []
    return list(dict.fromkeys((*best.values(), *defaults, *working[:FASTEST])))


def most(trials: int, schedules: int) -> int:
    """How many there are at most after so many trials of so many schedules."""
    return min(trials, FASTEST + schedules - 1) + 1
