"""Which candidates of a case are measured once more, against each other: what serves the case is
chosen among them, and by them the log can tell its schedules apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lntune.measure.jobs import Candidate

FASTEST = 3
MOST_IN_HEAT, NEAR = 8, 1.1
"""Candidates that are timed against each other before the final: so many at most, which took this
times what the fastest did at most. Trials are made one after another, and the machine is not as
fast at all times.
"""

BUILDING_SHARE = 0.5
"""The part of the time for a race in which kernels may be built for it."""


def heat(costs: Mapping[Candidate, float]) -> list[Candidate]:
    """Who comes to the final by racing the others, the fastest in its trial first; nobody where all
    that are near come to it anyway.
    """
    best = min(costs.values(), default=math.inf)
    near = [c for c, cost in costs.items() if cost < math.inf and cost <= NEAR * best]
    entrants = sorted(near, key=lambda c: costs[c])[:MOST_IN_HEAT]
    return entrants if len(entrants) > FASTEST else []


def affordable(
    entrants: Sequence[Candidate], kept: Sequence[Candidate], building: float, spare: float
) -> tuple[list[Candidate], float]:
    """(those who race where others than `kept` take `building` seconds first and `spare` are there,
    the slowest left out where that is too little; what building them takes). Nobody where all that
    are left come to the final anyway.
    """
    most = max(0.0, BUILDING_SHARE * spare) / building if building > 0 else math.inf
    others = [c for c in entrants if c not in kept]
    left_out = others[int(most) :] if most < len(others) else []
    racing = [c for c in entrants if c not in left_out]
    if len(racing) <= FASTEST:
        return [], 0.0
    return racing, building * (len(others) - len(left_out))


def raced(
    costs: Mapping[Candidate, float], entrants: Sequence[Candidate], order: Sequence[int]
) -> dict[Candidate, float]:
    """The costs after a race: the same ones, those of the entrants dealt out in the order in which
    they came in.
    """
    dealt = sorted(costs[c] for c in entrants)
    return {**costs, **dict(zip((entrants[i] for i in order), dealt, strict=True))}


def choose(
    costs: Mapping[Candidate, float],
    default: Candidate | None,
    before: Candidate | None = None,
) -> list[Candidate]:
    """The fastest, the best of each other schedule, `default` where it was tried, `before`, which
    has served until now, where it was tried and is near, and the next of the FASTEST: in this
    order, so that what comes last is what to leave out where time is short. `costs` are infinite
    for what failed.
    """
    working = sorted((c for c, cost in costs.items() if cost < math.inf), key=lambda c: costs[c])
    best: dict[str, Candidate] = {}
    for candidate in working:
        best.setdefault(candidate.schedule, candidate)
    if not working:
        return []
    kept = [default] if default is not None and costs.get(default, math.inf) < math.inf else []
    if before is not None and costs.get(before, math.inf) <= NEAR * costs[working[0]]:
        kept.append(before)
    return list(dict.fromkeys((*best.values(), *kept, *working[:FASTEST])))


def most(trials: int, schedules: int) -> int:
    """How many there are at most after so many trials of so many schedules, but for what has served
    until now, which is mostly among the fastest.
    """
    return min(trials, FASTEST + schedules - 1) + 1
