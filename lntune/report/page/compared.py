"""What the page of a comparison says beside its table: per operator and dtype who wins, and where
each case's ratio and interval lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from lntune.compare.comparison import Comparison
from lntune.compare.statistics import VERDICTS
from lntune.report.rows import geomean

WIDEST = 8.0
"""A chart of ratios shows no more than this many times faster or slower."""
NARROWEST = 1.1
_TICKS = (1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 8.0)


class Interval(NamedTuple):
    """A case's place in a chart of ratios, in percent of its width: the ratio and the ends of its
    interval; `cut`: some of it lies beyond the chart.
    """

    number: int
    comparison: Comparison
    at: float
    start: float
    width: float
    cut: bool


class Group(NamedTuple):
    """The cases of an operator and a dtype: the geometric mean of A / B, and the number of cases
    with each verdict.
    """

    op: str
    dtype: str
    geomean: float
    counts: dict[str, int]
    intervals: list[Interval]


class Scale(NamedTuple):
    """The axis that all charts of a page share: 1 in the middle, `limit` at either end."""

    limit: float

    def at(self, ratio: float) -> float:
        """The place of a ratio in percent, kept on the chart."""
        share = math.log(max(ratio, 1e-9)) / math.log(self.limit)
        return round(50 + 50 * max(-1.0, min(1.0, share)), 2)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and labels: 1, the end, and one between."""
        inner = [t for t in _TICKS if t < self.limit and 25 < self.at(t) - 50 < 40]  # noqa: PLR2004
        values = [*inner[-1:], self.limit]
        return [(self.at(v), f"{v:.3g}") for v in (*(1 / v for v in values[::-1]), 1.0, *values)]


def scale(cases: Sequence[Comparison]) -> Scale:
    """The narrowest axis that holds all, within reason."""
    far = [abs(math.log(v)) for c in cases for v in (c.low, c.high) if v > 0 and math.isfinite(v)]
    farthest = math.exp(max(far, default=0.0))
    return Scale(next((t for t in _TICKS if t >= max(farthest, NARROWEST)), WIDEST))


def groups(cases: Sequence[Comparison], axis: Scale) -> list[Group]:
    """The cases by operator and dtype, in the order given."""
    found: dict[tuple[str, str], list[Interval]] = {}
    for number, c in enumerate(cases):
        start, end = axis.at(c.low), axis.at(c.high)
        cut = c.low < 1 / axis.limit or c.high > axis.limit
        interval = Interval(number, c, axis.at(c.ratio), start, round(end - start, 2), cut)
        found.setdefault((c.case.op, c.case.dtype), []).append(interval)
    return [
        Group(op, dtype, geomean(i.comparison.ratio for i in own) or 1.0, _counts(own), own)
        for (op, dtype), own in found.items()
    ]


def _counts(intervals: Sequence[Interval]) -> dict[str, int]:
    verdicts = [i.comparison.verdict for i in intervals]
    return {v: verdicts.count(v) for v in VERDICTS if v in verdicts}
