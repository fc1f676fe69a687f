"""What happened between two runs, as far as what both measured tells: eager mode and a copy, which
are the same on both sides.

Nobody saw what the kernels would have done in each other's run. But eager mode and a copy were in
both, and how well the moves of one tell those of the other says how well they tell a kernel's. So
the sides are compared by whichever is steadiest for them: as they are, without the median move of
eager mode (or of a copy), or without each case's own move of eager mode. What is left of the other
witness's moves then is what is not known of a kernel's either: it is the drift's error, whose
degrees of freedom are the cases that were seen.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from lntune.certainty import Drift
from lntune.compare.comparison import Between, Method

PRIOR = 0.05
"""So far what eager mode and a copy did lies apart in many cases of two runs on one machine, in the
shipped logs: what is assumed where there are few cases, and counts as much as one of them.
"""
MOST_FREEDOM = 8.0
"""Some cases move much farther than a normal distribution has it, the farthest of 40 three to five
times as far as two thirds of them: Student's distribution with so many degrees of freedom does so.
With it, no kernel that two of the shipped runs have in common is called faster or slower than
itself (`python bench/calibration.py`).
"""
_LEFT_OUT = 10
"""One in so many cases is left out of what the others do, however far it moved."""


class Moves(NamedTuple):
    """The logarithms of A / B of what both runs of a case measured; None of what they did not."""

    eager: float | None
    copy: float | None

    def beyond(self, log: float = 0.0) -> float:
        """How far they lie from a move, or 0 where nothing is known."""
        squares = [(move - log) ** 2 for move in self if move is not None]
        return math.sqrt(sum(squares) / len(squares)) if squares else 0.0

    @property
    def apart(self) -> float:
        """How far they lie from each other, 0 where not both are known."""
        return 0.0 if self.eager is None or self.copy is None else abs(self.eager - self.copy)


def between(device: str, moves: Sequence[Moves]) -> Between:
    """What happened between the runs of these cases, and how sides are compared for that."""
    eager = [m.eager for m in moves if m.eager is not None]
    copy = [m.copy for m in moves if m.copy is not None]
    seen = [m for m in moves if m != Moves(None, None)]
    all_known = len(seen) > 0 and all(None not in m for m in moves)

    def found(method: Method, log: float, by_case: bool, left: Sequence[float]) -> Between:
        error, freedom = _spread(left)
        of_eager, of_copy = (
            math.exp(statistics.median(side)) if side else None for side in (eager, copy)
        )
        return Between(device, method, by_case, len(seen), of_eager, of_copy, log, error, freedom)

    steadiest = found("direct", 0.0, False, [m.beyond() for m in seen])
    others = []
    witnesses: tuple[tuple[Method, list[float]], ...] = (("over eager", eager), ("over copy", copy))
    for method, witness in witnesses:
        if witness:
            log = statistics.median(witness)
            others.append(found(method, log, False, [m.beyond(log) for m in seen]))
    if all_known:
        others.append(found("over eager", 0.0, True, [m.apart for m in moves]))
    for other in others:
        # few cases must show it clearly: the luckiest of several ways is not the steadiest
        if other.error * (1 + 1 / math.sqrt(len(seen) or 1)) < steadiest.error:
            steadiest = other
    return steadiest


def of_case(between: Between, moves: Moves) -> tuple[Method, Drift]:
    """How a case is compared, and the drift to take off; where its own witnesses moved otherwise
    than the others say, so much is uncertain.
    """
    if between.by_case and moves.eager is not None:
        error = max(between.error, moves.apart)
        return between.method, Drift(moves.eager, error, between.freedom)
    # one that eager mode was not measured with has nothing better than everybody's move
    error = max(between.error, moves.beyond(between.log))
    method: Method = "direct" if between.by_case else between.method
    return method, Drift(between.log, error, between.freedom)


def _spread(left: Sequence[float]) -> tuple[float, float]:
    """(standard error, degrees of freedom) of what is left of cases' moves: their root mean square,
    of which those that moved most are left out, and what a normal distribution without them lacks
    is made good.
    """
    kept = sorted(map(abs, left))[: len(left) - len(left) // _LEFT_OUT]
    variance = 1.0
    if len(kept) < len(left):
        share, normal = len(kept) / len(left), statistics.NormalDist()
        end = normal.inv_cdf((1 + share) / 2)
        variance = 1 - 2 * end * normal.pdf(end) / share
    squares = sum(r * r for r in kept) / variance
    count = len(kept) + 1
    return math.sqrt((squares + PRIOR**2) / count), min(count, MOST_FREEDOM)
