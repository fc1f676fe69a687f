"""Axes of charts: where values stand, which of them have labels, and what a chart is made of. Sizes
are in the units of a chart's viewBox; templates/charts.html.j2 draws it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeGuard

WIDTH, HEIGHT, LOW_HEIGHT = 460, 320, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 24, 32, 40
"""Room for labels around the area of a chart."""
_SMALLEST, _LARGEST = 1e-12, 1e15
_MANY = 7
"""Labels beyond which an axis is crowded."""


class Tick(NamedTuple):
    """A line of the grid, and its label."""

    at: float
    label: str


class Mark(NamedTuple):
    """A path of a chart: its classes, and the number of the case that it is of, or -1."""

    path: str
    style: str
    case: int = -1


class Label(NamedTuple):
    """A text in a chart, which begins at `x` ("start") or ends there ("end")."""

    x: float
    y: float
    anchor: str
    text: str


class Axis(NamedTuple):
    """Values from `low` to `high` at places from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = True

    def at(self, value: float) -> float:
        """Where a value stands."""
        scale: Callable[[float], float] = math.log if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, values: Iterable[float], label: Callable[[float], str]) -> list[Tick]:
        """Lines at those of the values that lie on the axis."""
        return [Tick(self.at(v), label(v)) for v in values if self.low <= v <= self.high]


class Plane(NamedTuple):
    """Both axes of a chart."""

    x: Axis
    y: Axis

    @classmethod
    def of(
        cls, xs: tuple[float, float], ys: tuple[float, float], height: int, log_x: bool = True
    ) -> Plane:
        """The axes of a chart of that height, from the lowest and highest value of each."""
        return cls(Axis(*xs, LEFT, WIDTH - RIGHT, log_x), Axis(*ys, height - BOTTOM, TOP))

    def point(self, x: float, y: float) -> str:
        """A place as a path has it."""
        return f"{self.x.at(x):g} {self.y.at(y):g}"


class Plot(NamedTuple):
    """A chart with two axes."""

    title: str
    across: str
    up: str
    height: int
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Mark]
    labels: list[Label]


def drawn(value: float | None) -> TypeGuard[float]:
    """Whether a value has a place on a logarithmic axis; what an edited log may hold has none."""
    return value is not None and _SMALLEST < value < _LARGEST


def around(values: Sequence[float], base: float) -> tuple[float, float]:
    """The powers of a base between which positive values lie, at least one apart."""
    low = base ** math.floor(math.log(min(values), base) + 1e-9)
    high = base ** math.ceil(math.log(max(values), base) - 1e-9)
    return low, high if high > low else low * base


def powers(base: float, low: float, high: float) -> list[float]:
    """The powers of a base from one of them to another."""
    first, last = (round(math.log(v, base)) for v in (low, high))
    return [base**i for i in range(first, last + 1)]


def round_ends(values: Sequence[float]) -> tuple[float, float]:
    """The next of 1, 2, 5, 10, 20 ... below and above positive values."""
    low, high = min(values), max(values)
    first = max(v for v in _round(low, low) if v <= low)
    return first, min(v for v in _round(high, 10 * high) if v >= high and v > first)


def round_values(low: float, high: float) -> list[float]:
    """Values for labels between two ends: 1, 2, 5, 10 ... where there is room, else 1, 10, 100."""
    values = [v for v in _round(low, high) if low <= v <= high]
    return values if len(values) <= _MANY else [v for v in values if f"{v:e}".startswith("1")]


def _round(low: float, high: float) -> list[float]:
    first, last = (math.floor(math.log10(v)) for v in (low, high))
    # one more at the lower end: a logarithm is not exact
    return [float(f"{digit}e{e}") for e in range(first - 1, last + 1) for digit in (1, 2, 5)]


def plain(value: float) -> str:
    """A number as it is; a large one by its power of ten."""
    return f"{value:g}" if value < 1e5 else f"{value:.0e}"  # noqa: PLR2004


def bytes_text(size: float) -> str:
    """Bytes with the unit that suits them: "16 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:  # noqa: PLR2004
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"
