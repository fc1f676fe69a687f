"""What the trials of a log tell together: how a search came to its best, which knobs matter, and
how far from the best most candidates are.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from lntune.case import Case
from lntune.knobs import Value
from lntune.log.records import Record, Status
from lntune.report.failures import Failures, Reason

ENOUGH = 30
"""Degrees of freedom (trials, less a knob's values in each search) without which nothing is said of
a knob.
"""
BEYOND = (1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, math.inf)
"""Upper ends of the classes of times, as multiples of the best."""

Searches = dict[tuple[Case, str], list[Record]]
"""Trials by the case and the run they are of, in the order in which they were made."""


class Curve(msgspec.Struct, frozen=True):
    """How the search of a case went in one run: `best` holds each trial that was faster than all
    before it, with its number (from 1) and its time in microseconds; `trials` counts all, those
    that failed included.
    """

    run: str
    trials: int
    best: tuple[tuple[int, float], ...]


class Share(msgspec.Struct, frozen=True):
    """What a knob alone explains of the variance of the logarithm of the time: over all cases, and
    by row bucket where there are trials enough.
    """

    knob: str
    share: float
    buckets: dict[int, float]


class Importance(msgspec.Struct, frozen=True):
    """The knobs of a schedule, the one that matters most first, from so many trials in so many
    searches; a search that timed a single one has nothing to tell.
    """

    op: str
    schedule: str
    trials: int
    searches: int
    knobs: list[Share]


class Distribution(msgspec.Struct, frozen=True):
    """The trials of an operator: how many there were, how many of those that were timed fall into
    each class of BEYOND, and why the others failed.
    """

    op: str
    trials: int
    classes: tuple[int, ...]
    failed: dict[Status, int]
    reasons: list[Reason]


def searches(trials: Iterable[Record]) -> Searches:
    """Trials by case and run, in the order given."""
    found: Searches = {}
    for trial in trials:
        found.setdefault((trial.case, trial.run), []).append(trial)
    return found


def curve(run: str, trials: Sequence[Record]) -> Curve:
    """How one search went."""
    best: list[tuple[int, float]] = []
    for number, trial in enumerate(trials, 1):
        us = _us(trial)
        if us is not None and (not best or us < best[-1][1]):
            best.append((number, us))
    return Curve(run, len(trials), tuple(best))


def distributions(found: Searches) -> list[Distribution]:
    """The trials of each operator, in the order in which the operators appear. Times are compared
    with the best of their own search.
    """
    total: Counter[str] = Counter()
    classes: dict[str, list[int]] = {}
    failed: dict[str, Counter[Status]] = defaultdict(Counter)
    failures: dict[str, Failures] = defaultdict(Failures)
    for (case, _), trials in found.items():
        total[case.op] += len(trials)
        counts = classes.setdefault(case.op, [0] * len(BEYOND))
        times = [us for trial in trials if (us := _us(trial)) is not None]
        for us in times:
            counts[next(i for i, end in enumerate(BEYOND) if us <= end * min(times))] += 1
        for trial in trials:
            if trial.status != "ok":
                failed[case.op][trial.status] += 1
                failures[case.op].add(trial.status, trial.message)
    return [
        Distribution(op, total[op], tuple(counts), dict(failed[op]), failures[op].reasons())
        for op, counts in classes.items()
    ]


def importances(found: Searches) -> list[Importance]:
    """How much each knob of a schedule matters, where there are trials enough.

    Of the variance of the logarithm of the time within a search, the share between the values of
    the knob, all other knobs left as they came (a main effect, the first order of a functional
    analysis of variance), less what chance alone would give: epsilon squared (Kelley 1935), the
    sums of squares added over searches.
    """
    groups: dict[tuple[str, str], list[list[tuple[dict[str, Value], float]]]] = {}
    buckets: dict[tuple[str, str], list[int]] = {}
    for (case, _), trials in found.items():
        timed: dict[str, list[tuple[dict[str, Value], float]]] = {}
        for trial in trials:
            if us := _us(trial):
                timed.setdefault(trial.schedule, []).append((trial.knobs, math.log(us)))
        for schedule, points in timed.items():
            if len(points) == 1:
                continue
            groups.setdefault((case.op, schedule), []).append(points)
            buckets.setdefault((case.op, schedule), []).append(case.bucket)
    return [
        Importance(op, schedule, sum(map(len, cells)), len(cells), shares)
        for (op, schedule), cells in groups.items()
        if (shares := _shares(cells, buckets[op, schedule]))
    ]


Cell = list[tuple[dict[str, Value], float]]
"""Knobs and the logarithm of the time, of the trials of one schedule in one search."""


def _shares(cells: Sequence[Cell], buckets: Sequence[int]) -> list[Share]:
    """Each knob's share, the largest first; none of too few trials."""
    shares = []
    for knob in dict.fromkeys(name for cell in cells for knobs, _ in cell for name in knobs):
        parts = [_sums(cell, knob) for cell in cells]
        overall = _share(parts)
        if overall is None:
            continue
        by_bucket: dict[int, list[_Sums]] = {}
        for bucket, part in zip(buckets, parts, strict=True):
            by_bucket.setdefault(bucket, []).append(part)
        within = {b: s for b, own in sorted(by_bucket.items()) if (s := _share(own)) is not None}
        shares.append(Share(knob, overall, within))
    return sorted(shares, key=lambda s: -s.share)


class _Sums(NamedTuple):
    """Squares between the values of a knob in a search and in total, and the degrees of freedom
    between the values and within them.
    """

    between: float
    total: float
    freedom: int
    left: int


def _sums(cell: Cell, knob: str) -> _Sums:
    levels: dict[object, list[float]] = {}
    for knobs, log in cell:
        levels.setdefault(knobs.get(knob), []).append(log)
    mean = math.fsum(log for _, log in cell) / len(cell)
    return _Sums(
        math.fsum(len(v) * (math.fsum(v) / len(v) - mean) ** 2 for v in levels.values()),
        math.fsum((log - mean) ** 2 for _, log in cell),
        len(levels) - 1,
        len(cell) - len(levels),
    )


def _share(parts: Iterable[_Sums]) -> float | None:
    """Epsilon squared of a knob; None of too few trials, or where it was not varied."""
    between, total, freedom, left = map(sum, zip(*parts, strict=True))
    if not freedom or left < ENOUGH or not total:
        return None
    return max(0.0, (between - freedom * (total - between) / left) / total)


def _us(trial: Record) -> float | None:
    """The time of a trial that went well, in microseconds."""
    us = trial.median() if trial.status == "ok" else None
    return us if us and us > 0 else None
