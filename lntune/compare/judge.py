"""Sides judged against each other: measurements are paired, estimated, and given verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from lntune.case import Case
from lntune.certainty import (
    SMALLEST,
    Drift,
    Estimate,
    Verdict,
    difference,
    holm,
    paired,
    unpaired,
    verdicts,
)
from lntune.compare import doubts, drift, figures, missing
from lntune.compare.comparison import Between, Comparison, Method, Result
from lntune.compare.drift import Moves
from lntune.compare.pairs import Found, Key, Places, choose, find
from lntune.compare.sides import Held, Side
from lntune.log.records import Record, Timing
from lntune.log.wanted import ALL, Wanted


class _Case(NamedTuple):
    """A case that both sides have, as far as it is known by itself."""

    device: str
    case: Case
    a: Held
    b: Held
    estimate: Estimate
    method: Method
    drift: float | None
    doubt: str
    doubtful: Verdict


def compare_records(
    sides: Sequence[Side],
    log: Sequence[Record] = (),
    wanted: Wanted = ALL,
    across_devices: bool = False,
    smallest: float = SMALLEST,
    asked: Sequence[Case] = (),
    options: str = "",
) -> list[Result]:
    """Each side but the first against the first. Contenders are looked up in the `log`, oldest
    first. Rows must be the same: within a bucket, which one kernel serves, times go with them.
    What is missing is told of the cases of either side, and of those `asked` for, with commands to
    which `options` are added.

    With `across_devices` the device does not matter, and each side must be of one.

    Raises:
        InputError: measurements of different devices.
    """
    places = Places(across_devices)
    first, *others = (find(side, log, wanted, places) for side in sides)
    begun = []
    for side, other in zip(sides[1:], others, strict=True):
        places.check(first, other)
        cases, between = _begin(first, other, places)
        lacking, commands = missing.find((sides[0], first), (side, other), asked, options)
        result = Result(
            first.name,
            other.name,
            [],
            missing=lacking,
            smallest=smallest,
            between=between,
            commands=commands,
        )
        begun.append((result, cases))
    family = [case.estimate for _, cases in begun for case in cases if not case.doubt]
    adjusted = iter(holm([estimate.beyond(smallest) for estimate in family]))
    judged = iter(verdicts(family, smallest))
    return [
        msgspec.structs.replace(
            result,
            cases=[
                _finish(c, 1.0, c.doubtful) if c.doubt else _finish(c, next(adjusted), next(judged))
                for c in cases
            ],
        )
        for result, cases in begun
    ]


def _begin(a: Found, b: Found, places: Places) -> tuple[list[_Case], list[Between]]:
    """What can be said of each case by itself, and of what happened between runs."""
    both = sorted(a.held.keys() & b.held.keys())
    chosen = {key: choose(a, b, key) for key in both}
    noises = {key: doubts.noise(*pair) for key, pair in chosen.items()}
    moves = {
        key: Moves(_move(one, other, "eager"), _move(one, other, "copy"))
        for key, (one, other) in chosen.items()
        if one.record != other.record
    }
    between: dict[int, Between] = {}
    for place in {place for place, _ in moves}:
        quiet = [m for key, m in moves.items() if key[0] == place and not noises[key]]
        between[place] = drift.between(places.devices[place].slug, quiet)
    cases = [
        _case(key, *pair, noises[key], moves.get(key), between.get(key[0]))
        for key, pair in chosen.items()
    ]
    return cases, [between[place] for place in sorted(between)]


def _move(a: Held, b: Held, contender: str) -> float | None:
    """The logarithm of A / B of a contender that both records have."""
    one, other = a.record.median(contender), b.record.median(contender)
    return math.log(one / other) if one and other and min(one, other) > 0 else None


def _case(
    key: Key, a: Held, b: Held, noise: str, moves: Moves | None, between: Between | None
) -> _Case:
    """What can be said of one case; `moves` where it was measured in two runs."""
    method: Method = "paired"
    moved = eager = None
    if moves is None or between is None:
        estimate, eager = _paired(a.timing, b.timing), 1.0
    else:
        method, off = drift.of_case(between, moves)
        estimate = _unpaired(a, b, off, by_case=method == "over eager" and between.by_case)
        eager, copy = (None if move is None else math.exp(move) for move in moves)
        moved = copy if eager is None else eager
    obstacle = doubts.obstacle(a, b)
    doubtful: Verdict = "UNSURE"
    if noise and not obstacle:
        doubtful = doubts.beyond_noise(_apart(a.timing, b.timing, Drift()), eager)
    slug = b.record.device.slug
    doubt = obstacle or noise
    return _Case(slug, key[1], a, b, estimate, method, moved, doubt, doubtful)


def _unpaired(a: Held, b: Held, off: Drift, by_case: bool) -> Estimate:
    """A / B of different runs. What is taken off is eager mode's move of the same case: then round
    for round in each run, where that can be had.
    """
    if by_case:
        one, other = (_paired(held.timing, held.record.timings["eager"]) for held in (a, b))
        if math.isfinite(one.error + other.error):
            return difference(one, other, Drift(0.0, off.error, off.freedom))
    return _apart(a.timing, b.timing, off)


def _paired(a: Timing, b: Timing) -> Estimate:
    """A / B of the same rounds; of the medians, and nothing certain, where they do not match."""
    if len(a.samples_us) == len(b.samples_us) and _tell(a) and _tell(b):
        return paired(a.samples_us, b.samples_us)
    return _of_medians(a, b)


def _apart(a: Timing, b: Timing, off: Drift) -> Estimate:
    """A / B of different runs, without a drift."""
    if _tell(a) and _tell(b):
        return unpaired(a.samples_us, b.samples_us, off)
    bare = _of_medians(a, b)
    return Estimate(bare.log - off.log)


def _tell(timing: Timing) -> bool:
    """Whether there are samples, all of which took time."""
    return min(timing.samples_us, default=0.0) > 0


def _of_medians(a: Timing, b: Timing) -> Estimate:
    return Estimate(math.log(a.median_us / b.median_us))


def _finish(c: _Case, p: float, verdict: Verdict) -> Comparison:
    low, high = c.estimate.interval()
    moved, flops = figures.least(c.case)
    return Comparison(
        device=c.device,
        case=c.case,
        a=figures.measurement(c.case, c.a),
        b=figures.measurement(c.case, c.b),
        ratio=c.estimate.ratio,
        low=low,
        high=high,
        p=p,
        verdict=verdict,
        method=c.method,
        drift=c.drift,
        reason=c.doubt,
        bytes=moved,
        flops=flops,
    )
