"""Charts of a device's cases: below the limits that copies set, and on the way to their best.
`first` is the number of the device's first case on the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lntune.report.page.axes import (
    HEIGHT,
    LOW_HEIGHT,
    Label,
    Mark,
    Plane,
    Plot,
    around,
    bytes_text,
    drawn,
    plain,
    powers,
    round_ends,
    round_values,
)
from lntune.report.page.cells import TIMES
from lntune.report.page.facts import CaseFacts, DeviceFacts
from lntune.report.page.trials import Curve

_SHAPES = {"float32": "round", "bfloat16": "square", "float16": "ring"}
_COLOURS = 6
_LABEL, _LINE = 160, 13
"""The longest name of a roof, and the height of a text."""
_TOPS = {
    1.25: (1.0, 1.1, 1.25),
    1.5: (1.0, 1.1, 1.25, 1.5),
    2.0: (1.0, 1.25, 1.5, 2.0),
    3.0: (1.0, 1.5, 2.0, 3.0),
    4.0: (1.0, 1.5, 2.0, 3.0, 4.0),
}
"""What a tuning curve's chart may end at, as a multiple of the best time, and the labels then."""
_STEPS = [digit * 10**e for e in range(9) for digit in (1, 2, 5)]
_LINES = 6
"""Labels below a tuning curve, at most."""


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
        if c.intensity and drawn(c.gflops)
    ]
    if not points:
        return None
    roofs = _roofs(facts)
    xs = around([x for x, *_ in points], 2)
    seen = [gbps * x for gbps, x in zip(sorted(roofs.values()), reversed(xs), strict=False)]
    ys = round_ends([y for _, y, *_ in points] + seen)
    plane = Plane.of(xs, ys, HEIGHT)
    names = operators(facts)
    return Plot(
        "Roofline",
        "operations per byte",
        "GFLOP/s",
        HEIGHT,
        plane.x.ticks(powers(2, *xs), plain),
        plane.y.ticks(round_values(*ys), plain),
        [
            *(_roof(plane, gbps) for gbps in roofs.values()),
            *(_dot(plane, x, y, c, names, n) for x, y, c, n in points),
        ],
        _names(plane, roofs),
    )


def _roofs(facts: DeviceFacts) -> dict[str, float]:
    """The bandwidth in GB/s of the copy of most bytes, and of the quickest if that is another."""
    copies = [c.copy for c in facts.cases if c.copy and drawn(c.copy[1])]
    if not copies:
        return {}
    size, large = max(copies)
    quickest = max(gbps for _, gbps in copies)
    return {f"copy of {bytes_text(size)}": large} | (
        {"quickest copy": quickest} if quickest > large else {}
    )


def _end(plane: Plane, gbps: float) -> float:
    """The intensity at which a roof leaves the chart."""
    return min(plane.x.high, plane.y.high / gbps)


def _roof(plane: Plane, gbps: float) -> Mark:
    """The line on which as many bytes a second are moved."""
    start, end = max(plane.x.low, plane.y.low / gbps), _end(plane, gbps)
    path = f"M{plane.point(start, start * gbps)}L{plane.point(end, end * gbps)}"
    return Mark(path, "roof")


def _names(plane: Plane, roofs: dict[str, float]) -> list[Label]:
    """The roofs' names above their upper ends, one above the other where they would meet."""
    ends = [plane.x.at(_end(plane, gbps)) for gbps in roofs.values()]
    crowded = max(ends) - min(ends) < 2 * _LABEL if ends else False
    labels = []
    for place, ((name, gbps), x) in enumerate(zip(roofs.items(), ends, strict=True)):
        y = plane.y.at(_end(plane, gbps) * gbps) - 5 - _LINE * (place and crowded)
        text = f"{name}, {gbps:.0f} GB/s"
        labels.append(Label(x, y, "start" if x < plane.x.end - _LABEL else "end", text))
    return labels


def bandwidth(facts: DeviceFacts, first: int) -> Plot | None:
    """Bytes a second against the bytes that a case moves, and the same of plain copies: the median
    of those that moved as much.
    """
    points = [
        (float(c.row.bytes), c.row.gbps, c, n)
        for n, c in enumerate(facts.cases, first)
        if c.row.bytes and drawn(c.row.gbps)
    ]
    if not points:
        return None
    sizes: dict[int, list[float]] = {}
    for c in facts.cases:
        if c.copy and drawn(c.copy[1]):
            sizes.setdefault(round(2 * math.log2(c.copy[0])), []).append(c.copy[1])
    copies = [(2 ** (half / 2), sorted(v)[len(v) // 2]) for half, v in sorted(sizes.items())]
    xs = around([x for x, *_ in points] + [x for x, _ in copies], 16)
    ys = round_ends([y for _, y, *_ in points] + [y for _, y in copies])
    plane = Plane.of(xs, ys, HEIGHT)
    names = operators(facts)
    roof = "L".join(plane.point(x, y) for x, y in copies)
    return Plot(
        "Bandwidth by size",
        "bytes moved",
        "GB/s",
        HEIGHT,
        plane.x.ticks(powers(16, *xs), bytes_text),
        plane.y.ticks(round_values(*ys), plain),
        [
            *([Mark(f"M{roof}", "roof")] if copies else []),
            *(_dot(plane, x, y, c, names, n) for x, y, c, n in points),
        ],
        [],
    )


def _dot(
    plane: Plane, x: float, y: float, c: CaseFacts, operators: Sequence[str], case: int
) -> Mark:
    """A case's point: a stroke without length, whose ends make its shape, by dtype; its colour is
    that of the operator.
    """
    style = f"dot o{operators.index(c.row.op) % _COLOURS} {_SHAPES[c.row.dtype]}"
    return Mark(f"M{plane.point(x, y)}h0", style, case)


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
        step = next(s for s in _STEPS if longest <= _LINES * s)
        slowest = max(curve.best[0][1] / curve.best[-1][1] for curve, _ in own)
        top = next((t for t in _TOPS if t >= slowest), max(_TOPS))
        xs = (0.0, float(math.ceil(longest / step) * step))
        plane = Plane.of(xs, (1.0, top), LOW_HEIGHT, log_x=False)
        plots.append(
            Plot(
                op,
                "trials",
                "best so far / best",
                LOW_HEIGHT,
                plane.x.ticks([i * step for i in range(1, _LINES + 1)], plain),
                plane.y.ticks(_TOPS[top], lambda v: f"{v:g}{TIMES}"),
                [_steps(plane, curve, n) for curve, n in own],
                [],
            )
        )
    return plots


def _steps(plane: Plane, curve: Curve, case: int) -> Mark:
    """A search's best so far, kept on the chart."""
    best = curve.best[-1][1]
    path, height = "", 0.0
    for trial, us in curve.best:
        y = plane.y.at(min(us / best, plane.y.high))
        if y == height:  # what cannot be seen need not be drawn
            continue
        x = plane.x.at(trial)
        path += f"H{x:g}V{y:g}" if path else f"M{x:g} {y:g}"
        height = y
    return Mark(f"{path}H{plane.x.at(curve.trials):g}", "curve", case)
