"""What a comparison comes to, as people quote it: means, wins and losses by operator and dtype, the
size from which on the other side wins, and the largest differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import msgspec

from lntune.certainty import VERDICTS, Verdict
from lntune.compare.comparison import Comparison, Result

LISTED = 3
"""Of the largest differences."""
EACH_SIDE = 2
"""Cases that a turn needs below it, and as many from it on."""

Axis = Literal["hidden", "rows"]


class Group(msgspec.Struct, frozen=True):
    """The cases of an operator and dtype: the geometric mean of their ratios A / B, of those that
    are not doubtful (None where all are), and how many have each verdict.
    """

    op: str
    dtype: str
    cases: int
    geomean: float | None
    verdicts: dict[Verdict, int]


class Turn(msgspec.Struct, frozen=True):
    """Where the winner changes: `above` wins from `at` on, `below` before it, in every case that is
    decided of an operator and dtype; of `rows` rows alone, or of one hidden size, where given.
    """

    op: str
    dtype: str
    axis: Axis
    at: int
    above: str
    below: str
    of: int | None = None


class Summary(msgspec.Struct, frozen=True):
    """What a comparison comes to. `gains` are the cases in which B is fastest beside A, and
    `losses` those in which it is slowest, the largest first, of those that are decided; `only` has
    how many cases each side has alone. The mean is of the cases that are not doubtful, None where
    all are.
    """

    geomean: float | None
    groups: list[Group]
    turns: list[Turn]
    gains: list[Comparison]
    losses: list[Comparison]
    only: dict[str, int]


def summarize(result: Result) -> Summary:
    """What a comparison comes to."""
    grouped: dict[tuple[str, str], list[Comparison]] = {}
    for c in result.cases:
        grouped.setdefault((c.case.op, c.case.dtype), []).append(c)
    decided = [c for c in result.cases if c.verdict in ("FASTER", "SLOWER")]
    return Summary(
        geomean=geomean(result.cases),
        groups=[_group(*key, cases) for key, cases in grouped.items()],
        turns=[turn for key, cases in grouped.items() for turn in _turns(result, *key, cases)],
        gains=_largest(c for c in decided if c.verdict == "FASTER"),
        losses=_largest(c for c in decided if c.verdict == "SLOWER"),
        only={
            side: sum(m.side == other for m in result.missing)
            for side, other in ((result.a, result.b), (result.b, result.a))
        },
    )


def geomean(cases: Iterable[Comparison]) -> float | None:
    """The geometric mean of the ratios that are not doubtful; None where all are."""
    logs = [math.log(c.ratio) for c in cases if not c.reason]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _group(op: str, dtype: str, cases: Sequence[Comparison]) -> Group:
    counts = {verdict: sum(c.verdict == verdict for c in cases) for verdict in VERDICTS}
    return Group(op, dtype, len(cases), geomean(cases), counts)


def _largest(cases: Iterable[Comparison]) -> list[Comparison]:
    return sorted(cases, key=lambda c: -abs(math.log(c.ratio)))[:LISTED]


def _turns(result: Result, op: str, dtype: str, cases: Sequence[Comparison]) -> list[Turn]:
    """Where the winner changes among the cases of an operator and dtype: with the hidden size or
    the rows, whatever the other one; failing that with one, for each value of the other.
    """
    decided = [c for c in cases if c.verdict in ("FASTER", "SLOWER")]
    of: dict[Axis, Callable[[Comparison], int]] = {
        "hidden": lambda c: c.case.hidden,
        "rows": lambda c: c.case.rows,
    }
    axes: tuple[tuple[Axis, Axis], ...] = (("hidden", "rows"), ("rows", "hidden"))

    def turn(axis: Axis, among: Sequence[Comparison], other: int | None = None) -> list[Turn]:
        found = _turn([(of[axis](c), c.verdict == "FASTER") for c in among])
        if found is None:
            return []
        at, faster_above = found
        above, below = (result.b, result.a) if faster_above else (result.a, result.b)
        return [Turn(op, dtype, axis, at, above, below, other)]

    for axis, _ in axes:
        if whole := turn(axis, decided):
            return whole
    for axis, other in axes:
        parts = [
            part
            for value in sorted({of[other](c) for c in decided})
            for part in turn(axis, [c for c in decided if of[other](c) == value], value)
        ]
        if parts:
            return parts
    return []


def _turn(cases: Sequence[tuple[int, bool]]) -> tuple[int, bool] | None:
    """(the size, whether B wins from it on) of cases as (size, whether B wins), where one size
    separates all wins from all losses and enough cases lie on either side.
    """
    if not EACH_SIDE <= sum(won for _, won in cases) <= len(cases) - EACH_SIDE:
        return None
    won, lost = ([size for size, wins in cases if wins is side] for side in (True, False))
    if min(won) > max(lost):
        return min(won), True
    return (min(lost), False) if min(lost) > max(won) else None
