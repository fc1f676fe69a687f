"""What is drawn into one panel of a plot: ratios over hidden sizes, bandwidth below a copy's.

Numbers of rows have colours of an even scale and marks of their own, dtypes colours that everybody
tells apart and marks, so that colours are needed by nobody.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from lntune.case import Case
from lntune.device import Device
from lntune.report.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKS = "os^Dv*Ph"
"""Of numbers of rows, the second cue beside colours."""
BLACK, ORANGE, BLUE, GREEN, GREY = "#000000", "#E69F00", "#0072B2", "#009E73", "#8a8a8a"
"""Of Okabe and Ito's colours, which people tell apart whatever colours they see."""
DTYPE_LOOKS = {"float32": (BLUE, "o"), "bfloat16": (ORANGE, "s"), "float16": (GREEN, "^")}
LABELS = 9
"""So many hidden sizes have room below an axis."""
SIZES = 5
"""So many numbers of bytes do."""
SMALL = 7
"""Points of what is written small."""


class Point(msgspec.Struct, frozen=True):
    """A case of a plot of ratios: how many times as fast, and the 95 % interval of that; not `sure`
    where it cannot be told from 1.
    """

    case: Case
    ratio: float
    low: float
    high: float
    sure: bool = True


def ratios(axes: Axes, points: Sequence[Point], counts: Sequence[int], smallest: float) -> None:
    """Ratios over hidden sizes, a line for each number of rows."""
    from matplotlib.ticker import NullFormatter

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.axhline(1, color=BLACK, linewidth=0.8)
    if smallest:
        axes.axhspan(1 / (1 + smallest), 1 + smallest, color=GREY, alpha=0.25, linewidth=0)
    for place, rows in enumerate(counts):
        some = sorted((p for p in points if p.case.rows == rows), key=lambda p: p.case.hidden)
        if not some:
            continue
        # side by side, so that no interval hides another
        aside = 2 ** (0.05 * (place - (len(counts) - 1) / 2))
        x, y = [p.case.hidden * aside for p in some], [p.ratio for p in some]
        look = appearance(place, len(counts))
        axes.plot(x, y, color=look["color"], linewidth=1, alpha=0.7)
        axes.errorbar(
            x,
            y,
            yerr=[[p.ratio - p.low for p in some], [p.high - p.ratio for p in some]],
            label=f"{rows:,}",
            linestyle="",
            elinewidth=0.9,
            **look,
        )
        unsure = [(at, p.ratio) for at, p in zip(x, some, strict=True) if not p.sure]
        if unsure:
            axes.plot(*zip(*unsure, strict=True), linestyle="", **look, mfc="white", zorder=3)
    sizes = sorted({p.case.hidden for p in points})
    axes.set_xticks([float(size) for size in sizes], minor=True)
    shown = _spread(sizes)
    axes.set_xticks([float(size) for size in shown], [str(size) for size in shown])
    axes.xaxis.set_minor_formatter(NullFormatter())


def appearance(place: int, count: int) -> dict[str, Any]:
    """Colour and mark of one of an ordered number of lines."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    share = place / max(1, count - 1)
    return {
        "color": to_hex(colormaps["viridis"](0.85 * share)),
        "marker": MARKS[place % len(MARKS)],
    }


def _spread(sizes: Sequence[int]) -> list[int]:
    """Of hidden sizes in order, those that have room below an axis; powers of two before others."""
    apart = math.log2(sizes[-1] / sizes[0]) / LABELS
    kept: list[int] = []
    for size in sorted(sizes, key=lambda s: (s & (s - 1) != 0, s)):
        if all(abs(math.log2(size / other)) >= apart for other in kept):
            kept.append(size)
    return sorted(kept)


STEPS = (
    *(1, 2, 0.5, 5, 0.2, 10, 0.1, 20, 50, 100, 3, 30, 0.3, 1.5, 0.7, 4, 7, 15, 40, 70),
    *(1.2, 2.5, 0.8, 1.1, 0.9, 1.3, 1.7, 0.6, 0.4, 1.05, 0.95, 1.02, 0.98),
)
"""Ratios that may be written beside a panel, the roundest first."""


TICKS = 7
"""So many ratios are written beside a panel, at most."""
BEYOND = 1.3
"""How far a panel reaches beyond the ratios in it, at most."""


def level(panels: Sequence[Axes], points: Sequence[Point]) -> None:
    """One range of ratios for panels that stand side by side. What is uncertain without end reaches
    beyond it, so that the others can be told apart.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    least, most = min(p.ratio for p in points), max(p.ratio for p in points)
    low = min(0.95, max(least / BEYOND, min(p.low for p in points) / 1.05))
    high = max(1.1, min(most * BEYOND, max(p.high for p in points) * 1.05))
    apart, ticks = math.log(high / low) / TICKS, list[float]()
    for step in STEPS:
        if low <= step <= high and all(abs(math.log(step / t)) >= apart for t in ticks):
            ticks.append(step)
    for axes in panels:
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))


def roof(axes: Axes, rows: Sequence[Row], device: Device) -> None:
    """Bandwidth over the bytes that a call moves, below that of a plain copy in the same rounds."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for dtype, (color, mark) in DTYPE_LOOKS.items():
        some = sorted(
            (r.bytes, r.gbps, r.copy_gbps)
            for r in rows
            if r.dtype == dtype and r.bytes and r.gbps and r.copy_gbps
        )
        if some:
            x, ours, copys = zip(*some, strict=True)
            axes.vlines(x, ours, copys, color=color, linewidth=0.7, alpha=0.5)
            axes.plot(x, copys, "_", color=color, markersize=8, markeredgewidth=1.8)
            axes.plot(x, ours, mark, color=color, label=dtype)
    axes.plot([], [], "_", color=BLACK, markersize=8, markeredgewidth=1.8, label="a copy")
    low, high = axes.get_xlim()
    caches = {"L1": device.l1, "L2": device.l2, "L3": device.l3}
    for name, size in caches.items():
        if low < size < high:
            axes.axvline(size, color=GREY, linestyle=":", linewidth=0.9)
            at_top = axes.get_xaxis_transform()
            axes.text(size, 1, f" {name}", transform=at_top, va="top", fontsize=SMALL)
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    sizes = [2**power for power in powers[:: math.ceil(len(powers) / SIZES)]]
    axes.set_xticks([float(size) for size in sizes], [_bytes_text(size) for size in sizes])
    plain_numbers(axes)
    axes.set(title=f"{rows[0].op}, bandwidth", ylabel="GB/s")
    axes.legend(fontsize=SMALL, loc="lower right", framealpha=0.8)


def plain_numbers(axes: Axes) -> None:
    """The upright axis, logarithmic, with 1, 2, 5, 10 in the place of powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _bytes_text(size: int) -> str:
    """A number of bytes as people say it."""
    power = min(3, int(math.log2(size) // 10))
    return f"{size / 1024**power:g} {('B', 'KiB', 'MiB', 'GiB')[power]}"
