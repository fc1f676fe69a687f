"""Where each ratio of a comparison and its interval lie in a chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from lntune.compare.comparison import Comparison
from lntune.compare.summary import geomean

WIDEST = 8.0
"""A chart of ratios shows no more than this many times faster or slower."""
NARROWEST = 1.1
_TICKS = (1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 8.0)


class Interval(NamedTuple):
    """A case's place in a chart of ratios, in percent of its width: the ratio, and its interval;
    `beyond` is "right" or "left" where the ratio lies past that end of the axis.
    """

    number: int
    comparison: Comparison
    at: float
    start: float
    width: float
    beyond: str


class Group(NamedTuple):
    """The cases of an operator and a dtype on a device, and where they stand."""

    device: str
    op: str
    dtype: str
    intervals: list[Interval]

    @property
    def geomean(self) -> float | None:
        """The geometric mean of their ratios, of those that are not doubtful."""
        return geomean(i.comparison for i in self.intervals)


class Scale(NamedTuple):
    """The axis that all charts of a page share: 1 in the middle, `limit` at either end."""

    limit: float

    def at(self, ratio: float) -> float:
        """The place of a ratio in percent, kept on the chart."""
        share = math.log(max(ratio, 1e-9)) / math.log(self.limit)
        return round(50 + 50 * max(-1.0, min(1.0, share)), 2)

    def beyond(self, ratio: float) -> str:
        """Past which end of the chart a ratio lies; empty where it is on it."""
        return "right" if ratio > self.limit else "left" if ratio < 1 / self.limit else ""

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


def groups(cases: Sequence[Comparison], axis: Scale, first: int = 0) -> list[Group]:
    """The cases by device, operator and dtype, in the order given; `first` is the number of the
    first case on the page.
    """
    found: dict[tuple[str, str, str], list[Interval]] = {}
    for number, c in enumerate(cases, first):
        start, end = axis.at(c.low), axis.at(c.high)
        width, beyond = round(end - start, 2), axis.beyond(c.ratio)
        interval = Interval(number, c, axis.at(c.ratio), start, width, beyond)
        found.setdefault((c.device, c.case.op, c.case.dtype), []).append(interval)
    return [Group(*of, own) for of, own in found.items()]
