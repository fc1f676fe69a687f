"""Figures as geometry: where marks, axes and labels stand, and which colour a value has. Templates
write them as SVG; sizes are in the units of a chart's viewBox.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from lntune.case import bucket_label
from lntune.report.page.cells import DASH, TIMES
from lntune.report.page.facts import CaseFacts, DeviceFacts


class Level(NamedTuple):
    """A class of a heat map: ratios up to `end`, with the colours of cell and text in the light and
    in the dark scheme.
    """

    end: float
    light: str
    light_text: str
    dark: str
    dark_text: str


LEVELS = (
    Level(0.5, "#9a3d00", "#ffffff", "#ffb066", "#1d1206"),
    Level(0.8, "#e58a3c", "#1d1206", "#c2691f", "#0d0500"),
    Level(0.98, "#fbd3a6", "#1d1206", "#643d17", "#ffe9d1"),
    Level(1.02, "#efefee", "#202124", "#34383f", "#f1f3f4"),
    Level(1.25, "#dcebf7", "#0c1a28", "#1f3a52", "#e4f1fd"),
    Level(1.5, "#bfdaef", "#0c1a28", "#1f4a6d", "#eaf5ff"),
    Level(2.0, "#98c5e6", "#0c1a28", "#1d5d8c", "#f5faff"),
    Level(3.0, "#6aacdb", "#05101a", "#3d88c0", "#03101b"),
    Level(5.0, "#2a78b8", "#ffffff", "#62aae0", "#03101b"),
    Level(10.0, "#155596", "#ffffff", "#93c9f3", "#03101b"),
    Level(math.inf, "#08305c", "#ffffff", "#c9e6fc", "#03101b"),
)
"""From orange (slower) over grey (a draw) to blue (faster): told apart with any colour vision."""


def level(ratio: float | None) -> int:
    """The place of a ratio's class in LEVELS; -1 of none."""
    return -1 if ratio is None else next(i for i, one in enumerate(LEVELS) if ratio <= one.end)


def legend() -> list[tuple[int, str]]:
    """Each class with the ratios that it holds."""
    ends = [one.end for one in LEVELS]
    spans = [f"{a:g}{DASH}{b:g}" for a, b in itertools.pairwise(ends[:-1])]
    return list(enumerate([f"below {ends[0]:g}", *spans, f"above {ends[-2]:g}"]))


class HeatCell(NamedTuple):
    """A cell of a heat map: the number of its case, its class, its text, and what serves it."""

    case: int
    level: int
    text: str
    schedule: str


class HeatMap(NamedTuple):
    """Hidden sizes by row buckets, of one operator and dtype; None where nothing was measured."""

    op: str
    dtype: str
    buckets: list[str]
    rows: list[tuple[int, list[HeatCell | None]]]


def heat_maps(facts: DeviceFacts, first: int) -> list[HeatMap]:
    """The speedup over eager of each operator and dtype; `first` is the number of the device's
    first case on the page.
    """
    groups: dict[tuple[str, str], dict[tuple[int, int], HeatCell]] = {}
    for number, c in enumerate(facts.cases, first):
        r = c.row
        groups.setdefault((r.op, r.dtype), {})[r.hidden, c.record.case.bucket] = HeatCell(
            number,
            level(r.speedup),
            DASH if r.speedup is None else f"{r.speedup:.2f}",
            "eager" if c.eager_serves else r.schedule.split("_")[0],
        )
    maps = []
    for (op, dtype), cells in groups.items():
        buckets = sorted({bucket for _, bucket in cells})
        rows = [(h, [cells.get((h, b)) for b in buckets]) for h in sorted({h for h, _ in cells})]
        maps.append(HeatMap(op, dtype, [bucket_label(b) for b in buckets], rows))
    return maps


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
    """A text in a chart, which begins at `x`, or ends there ("start", "end")."""

    x: float
    y: float
    anchor: str
    text: str


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


WIDTH, HEIGHT = 460, 320
LEFT, RIGHT, TOP, BOTTOM = 42, 24, 28, 40
"""Room for labels around the area of a chart."""
_LABEL, _LINE = 170, 14
"""The longest label beside a line, and the height of a text."""


def _axes(
    xs: tuple[float, float], ys: tuple[float, float], height: int, log_x: bool = True
) -> tuple[Axis, Axis]:
    return (
        Axis(*xs, LEFT, WIDTH - RIGHT, log_x),
        Axis(*ys, height - BOTTOM, TOP),
    )


def _around(values: Sequence[float], base: float) -> tuple[float, float]:
    """The powers of a base between which positive values lie, at least one apart."""
    low = base ** math.floor(math.log(min(values), base) + 1e-9)
    high = base ** math.ceil(math.log(max(values), base) - 1e-9)
    return low, high if high > low else low * base


def _powers(base: float, low: float, high: float) -> list[float]:
    first, last = (round(math.log(v, base)) for v in (low, high))
    return [base**i for i in range(first, last + 1)]


def _round_ends(values: Sequence[float]) -> tuple[float, float]:
    """The next of 1, 2, 5, 10, 20 ... below and above positive values."""
    low = max(v for v in _ROUND if v <= min(values))
    return low, min(v for v in _ROUND if v >= max(values) and v > low)


def _round_values(low: float, high: float) -> list[float]:
    """Values for labels between two ends: 1, 2, 5, 10 ... where there is room, else 1, 10, 100."""
    values = [v for v in _ROUND if low <= v <= high]
    return values if len(values) <= 7 else [v for v in values if f"{v:e}"[0] == "1"]  # noqa: PLR2004


_ROUND = [float(f"{m}e{e}") for e in range(-9, 16) for m in (1, 2, 5)]


_SHAPES = {"float32": "round", "bfloat16": "square", "float16": "ring"}


def _dot(axes: tuple[Axis, Axis], x: float, y: float, style: str, case: int) -> Mark:
    """A point: a stroke without length, whose ends make its shape."""
    return Mark(f"M{axes[0].at(x):g} {axes[1].at(y):g}h0", style, case)


def style_of(c: CaseFacts, operators: Sequence[str]) -> str:
    """Classes of a case's point: colour by operator, shape by dtype."""
    return f"dot o{operators.index(c.row.op) % 6} {_SHAPES[c.row.dtype]}"


def operators(facts: DeviceFacts) -> list[str]:
    """The operators that a device has cases of."""
    return list(dict.fromkeys(c.row.op for c in facts.cases))


def roofline(facts: DeviceFacts, first: int) -> Plot | None:
    """Operations a second against operations per byte; the roofs are what plain copies reached: the
    one that moved most bytes, which went to memory if any did, and the quickest.
    """
    points = [
        (c.intensity, c.gflops, c, n)
        for n, c in enumerate(facts.cases, first)
        if c.intensity and c.gflops
    ]
    copies = [(c.copied, gbps) for c in facts.cases if c.copied and (gbps := c.copy_gbps)]
    if not points:
        return None
    xs = _around([x for x, *_ in points], 2)
    quickest = max((gbps for _, gbps in copies), default=0.0)
    ys = _round_ends([y for _, y, *_ in points])
    axes = _axes(xs, ys, HEIGHT)
    marks, labels = [], []
    if copies:
        size, large = max(copies)
        for gbps, name in {large: f"copy of {bytes_text(size)}", quickest: "quickest copy"}.items():
            marks.append(_roof(axes, gbps))
            labels.append(_beside_roof(axes, gbps, f"{name}, {gbps:.0f} GB/s"))
    names = operators(facts)
    marks += [_dot(axes, x, y, style_of(c, names), n) for x, y, c, n in points]
    return Plot(
        "Roofline",
        "operations per byte",
        "GFLOP/s",
        HEIGHT,
        axes[0].ticks(_powers(2, *xs), _plain),
        axes[1].ticks(_round_values(*ys), _plain),
        marks,
        labels,
    )


def _roof(axes: tuple[Axis, Axis], gbps: float) -> Mark:
    """The line on which as many bytes a second are moved."""
    x, y = axes
    start, end = max(x.low, y.low / gbps), min(x.high, y.high / gbps)
    path = f"M{x.at(start):g} {y.at(start * gbps):g}L{x.at(end):g} {y.at(end * gbps):g}"
    return Mark(path, "roof")


def _beside_roof(axes: tuple[Axis, Axis], gbps: float, text: str) -> Label:
    """A roof's name: behind its upper end where there is room, else above it."""
    x, y = axes
    end = min(x.high, y.high / gbps)
    at = x.at(end), y.at(end * gbps)
    if at[0] + _LABEL < WIDTH:
        return Label(at[0] + 6, at[1] + 12, "start", text)
    above = at[1] - 8 > TOP + _LINE
    return Label(at[0], at[1] - 8, "end", text) if above else Label(at[0] - 44, 11, "end", text)


def bandwidth(facts: DeviceFacts, first: int) -> Plot | None:
    """Bytes a second against the bytes that a case moves, and the same of plain copies: the median
    of those that moved as much.
    """
    points = [
        (float(c.bytes), c.row.gbps, c, n)
        for n, c in enumerate(facts.cases, first)
        if c.bytes and c.row.gbps
    ]
    if not points:
        return None
    sizes: dict[int, list[float]] = {}
    for c in facts.cases:
        if c.copied and (gbps := c.copy_gbps):
            sizes.setdefault(round(2 * math.log2(c.copied)), []).append(gbps)
    copies = [(2 ** (half / 2), sorted(v)[len(v) // 2]) for half, v in sorted(sizes.items())]
    xs = _around([x for x, *_ in points] + [x for x, _ in copies], 16)
    ys = _round_ends([y for _, y, *_ in points] + [y for _, y in copies])
    axes = _axes(xs, ys, HEIGHT)
    line = "L".join(f"{axes[0].at(x):g} {axes[1].at(y):g}" for x, y in copies)
    names = operators(facts)
    return Plot(
        "Bandwidth by size",
        "bytes moved",
        "GB/s",
        HEIGHT,
        axes[0].ticks(_powers(16, *xs), bytes_text),
        axes[1].ticks(_round_values(*ys), _plain),
        [
            *([Mark(f"M{line}", "roof")] if copies else []),
            *(_dot(axes, x, y, style_of(c, names), n) for x, y, c, n in points),
        ],
        [],
    )


CURVE_HEIGHT = 230
_TOPS = (1.25, 1.5, 2.0, 3.0, 4.0)
"""What a tuning curve's chart may end at, as a multiple of the best time."""
SLOWEST = _TOPS[-1]


def curves(facts: DeviceFacts, first: int) -> list[Plot]:
    """How searches went, a chart for each operator: the best time so far against the trials made,
    as a multiple of the search's best.
    """
    plots = []
    for op in operators(facts):
        own = [
            (c.curve, n)
            for n, c in enumerate(facts.cases, first)
            if c.row.op == op and c.curve and c.curve.best
        ]
        if not own:
            continue
        longest = max(curve.trials for curve, _ in own)
        step = next(s for s in _STEPS if longest / s <= 6)  # noqa: PLR2004 (labels without crowding)
        xs = (0.0, float(math.ceil(longest / step) * step))
        slowest = max(curve.best[0][1] / curve.best[-1][1] for curve, _ in own)
        top = next((t for t in _TOPS if t >= slowest), SLOWEST)
        axes = _axes(xs, (1.0, top), CURVE_HEIGHT, log_x=False)
        marks = []
        for curve, number in own:
            best = curve.best[-1][1]
            path, height = "", 0.0
            for trial, us in curve.best:
                y = axes[1].at(min(us / best, top))
                if path and y == height:  # what cannot be seen need not be drawn
                    continue
                x = axes[0].at(trial)
                path += f"H{x:g}V{y:g}" if path else f"M{x:g} {y:g}"
                height = y
            marks.append(Mark(f"{path}H{axes[0].at(curve.trials):g}", "curve", number))
        plots.append(
            Plot(
                op,
                "trials",
                "best so far / best",
                CURVE_HEIGHT,
                axes[0].ticks([i * step for i in range(1, 7)], _plain),
                axes[1].ticks((1, 1.1, *_TOPS), lambda v: f"{v:g}{TIMES}"),
                marks,
                [],
            )
        )
    return plots


_STEPS = [m * 10**e for e in range(9) for m in (1, 2, 5)]


def _plain(value: float) -> str:
    return f"{value:g}" if value < 1e5 else f"{value:.0e}"  # noqa: PLR2004


def bytes_text(size: float) -> str:
    """Bytes with the unit that suits them: "16 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:  # noqa: PLR2004
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"
