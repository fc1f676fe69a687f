"""Measurements as plots, in a file: speedups over hidden sizes with their intervals, bandwidth
under the copy's, one side of a comparison over the other.

Drawn by matplotlib, whose figures are made here and never shown: neither its settings nor the state
of `pyplot` are those of the caller's. The same measurements make the same file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lntune import certainty, ops
from lntune.case import Case
from lntune.compare.comparison import Result
from lntune.device import Device
from lntune.errors import InputError, got_expected
from lntune.log.records import Record, Timing
from lntune.log.select import served
from lntune.log.wanted import Wanted
from lntune.report import panels
from lntune.report.panels import Point
from lntune.report.rows import row_of
from lntune.report.survey import asked_records
from lntune.words import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lntune.schedule import Schedule

ENDINGS = (".png", ".svg")
DPI = 130
"""Of a file of dots."""
LETTERS = 10
"""Of a title, in an inch."""


def check(path: Path) -> None:
    """Find out that a plot can be written, before anything is measured for it.

    Raises:
        InputError: the file's name ends in neither of ENDINGS, its folder is not there, or
            matplotlib is not installed.
    """
    if path.suffix.lower() not in ENDINGS:
        expected = f"a file whose name ends in {' or '.join(ENDINGS)}"
        raise InputError(got_expected("--plot", path, expected))
    if not path.parent.is_dir():
        raise InputError(got_expected("--plot", path, f"a folder {path.parent} that is there"))
    if importlib.util.find_spec("matplotlib") is None:
        expected = "matplotlib to draw it, which is not installed"
        raise InputError(got_expected("--plot", path, expected, "Run: pip install 'lntune[plot]'"))


def of_records(records: Sequence[Record], path: Path, bandwidth: bool = True) -> None:
    """Write a plot of finals or benchmarks of one device: for each operator a panel of speedups for
    each dtype, and one of `bandwidth`. What was disturbed is left out, and counted below.

    Raises:
        InputError: there is nothing to draw, or of several devices; and as `check` has it.
    """
    check(path)
    _one(r.device.slug for r in records)
    sound = [r for r in records if not r.disturbance]
    points = [point for r in sound if (point := speedup(r))]
    if not points:
        got = f"{counted(len(records), 'measurement')}, all of them disturbed or of no rival"
        raise InputError(got_expected("--plot", got, "something that speedups can be drawn of"))
    rows = [row for r in sound if bandwidth and (row := row_of(r)).copy_gbps]

    def beside(axes: Axes, op: str) -> None:
        if some := [row for row in rows if row.op == op]:
            panels.roof(axes, some, records[0].device)
        else:
            axes.set_axis_off()

    with own_style():
        figure = _grid(
            points,
            f"How many times as fast as {_rivals(sound)}",
            beside if rows else None,
        )
        left_out = len(records) - len(sound)
        notes = [
            *provenance(records),
            "bars: 95 % intervals of the median ratio within rounds, hollow where there are too few"
            + (f"; left out: {left_out} disturbed" if left_out else ""),
        ]
        write(figure, path, notes)


def of_logs(
    folders: Sequence[Path],
    schedules: Mapping[str, Schedule],
    path: Path,
    wanted: Wanted,
    owner: Device | None,
) -> None:
    """Write a plot of what serves the cases that are asked for, as the logs in some folders have
    it, of a device, or of the one that there is where `owner` is None.

    Raises:
        InputError: as `of_records` has it.
    """
    groups = asked_records(folders, wanted, owner, ("final",))
    of_records([r for _, group in groups for r in served(group, schedules).values()], path)


def of_comparison(result: Result, path: Path) -> None:
    """Write a plot of a comparison: ratios A / B over hidden sizes, a panel for each operator and
    dtype.

    Raises:
        InputError: there is nothing to draw, or of several devices; and as `check` has it.
    """
    check(path)
    device = _one(c.device for c in result.cases)
    points = [
        _point(c.case, c.ratio, c.low, c.high, c.verdict in ("FASTER", "SLOWER"))
        for c in result.cases
    ]
    with own_style():
        figure = _grid(
            points, f"{result.b}: how many times as fast as {result.a}", None, result.smallest
        )
        dates = sorted({m.time[:10] for c in result.cases for m in (c.a, c.b) if m.time})
        notes = [
            f"{device}; measured {_span(dates)}",
            f"bars: 95 % intervals; filled: FASTER or SLOWER at an error of {certainty.ERROR:.0%}",
            f"for all cases ({result.correction}); grey: within {result.smallest:.0%} of 1",
        ]
        write(figure, path, notes)


def _one(devices: Iterable[str]) -> str:
    """The device that all measurements are of.

    Raises:
        InputError: there is none, or several.
    """
    names = sorted(set(devices))
    if len(names) != 1:
        got = f"measurements of {', '.join(names)}" if names else "no measurements"
        raise InputError(got_expected("--plot", got, "those of one device"))
    return names[0]


def provenance(records: Sequence[Record]) -> list[str]:
    """Which device, versions and days the records are of."""
    one = records[0].device
    silicon = f", {one.model}" if one.model else ""
    threads = ", ".join(map(str, sorted({r.threads for r in records})))
    versions = {name: v for r in records for name, v in r.versions.items() if name != "python"}
    return [
        f"{one.name} ({one.slug}{silicon}), {threads} threads",
        ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; measured {_span(sorted({r.time[:10] for r in records}))}",
    ]


def _span(dates: Sequence[str]) -> str:
    return " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "at a time not known"


def write(figure: Figure, path: Path, notes: Iterable[str]) -> None:
    """Write a figure to a file whose name ends in one of ENDINGS, with notes in small letters below
    it.

    Raises:
        InputError: the file cannot be written.
    """
    figure.supxlabel("\n".join(notes), fontsize=panels.SMALL, color="#555555", x=0.01, ha="left")
    kind = path.suffix.lower().removeprefix(".")
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
    try:
        figure.savefig(path, format=kind, dpi=DPI, metadata=metadata)
    except OSError as e:
        expected, reason = "a file that can be written", e.strerror or str(e)
        raise InputError(got_expected("--plot", path, expected, reason)) from e


@contextlib.contextmanager
def own_style() -> Iterator[None]:
    """Within, matplotlib has its defaults and ours, whatever the user's are."""
    import matplotlib as mpl
    from matplotlib import style

    ours: Any = {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 9,
        "font.size": 8,
        "grid.alpha": 0.25,
        "lines.linewidth": 1.2,
        "lines.markersize": 4.5,
        "svg.hashsalt": "lntune",  # names of elements, which are random without
    }
    with style.context("default"), mpl.rc_context(ours):
        yield


def _grid(
    points: Sequence[Point],
    title: str,
    beside: Callable[[Axes, str], None] | None = None,
    smallest: float = 0.0,
) -> Figure:
    """A row of panels for each operator, a panel for each dtype, and one more that `beside` fills
    for an operator.
    """
    from matplotlib.figure import Figure

    there = {p.case.op for p in points}
    operators = [op for op in ops.OPS if op in there] + sorted(there - ops.OPS.keys())
    dtypes = sorted({p.case.dtype for p in points}, key=list(panels.DTYPE_LOOKS).index)
    columns = len(dtypes) + bool(beside)
    size = (max(6.0, 3.3 * columns), 2.3 * len(operators) + 1.3)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(operators), columns, squeeze=False)
    counts = sorted({p.case.rows for p in points})
    for line, op in zip(grid, operators, strict=True):
        for axes, dtype in zip(line, dtypes, strict=False):
            some = [p for p in points if (p.case.op, p.case.dtype) == (op, dtype)]
            if some:
                panels.ratios(axes, some, counts, smallest)
                axes.set_title(f"{op}, {dtype}")
            else:
                axes.set_axis_off()
        of_op = [p for p in points if p.case.op == op]
        panels.level([axes for axes in line[: len(dtypes)] if axes.axison], of_op)
        if beside:
            beside(line[-1], op)
    for place, axes in enumerate(grid[-1]):
        axes.set_xlabel("hidden size" if place < len(dtypes) else "bytes that a call moves")
    handles = {h.get_label(): h for axes in grid.flat for h in axes.get_legend_handles_labels()[0]}
    figure.suptitle(textwrap.fill(title, int(LETTERS * size[0])), fontsize=10)
    figure.legend(
        [handles[f"{n:,}"] for n in counts],
        [f"{n:,}" for n in counts],
        title="rows",
        loc="outside right upper",
        frameon=False,
    )
    return figure


def speedup(record: Record) -> Point | None:
    """How many times as fast as its rival the tuned kernel is; None where that is not known."""
    tuned, slow = record.timings.get("tuned"), _rival(record)
    if tuned is None or slow is None or not tuned.samples_us or not slow.samples_us:
        return None
    same_rounds = len(tuned.samples_us) == len(slow.samples_us)
    estimate = (certainty.paired if same_rounds else certainty.unpaired)(
        slow.samples_us, tuned.samples_us
    )
    return _point(record.case, estimate.ratio, *estimate.interval())


def _point(case: Case, ratio: float, low: float, high: float, sure: bool = True) -> Point:
    """A ratio with its interval; without one, and not sure, where it has no end."""
    if 0 < low <= high < math.inf:
        return Point(case, ratio, low, high, sure)
    return Point(case, ratio, ratio, ratio, sure=False)


def _rival(record: Record) -> Timing | None:
    """The better of eager mode and torch.compile; a copy where neither was measured."""
    rivals = [record.timings[name] for name in ("eager", "compile") if name in record.timings]
    return min(rivals, key=lambda t: t.median_us, default=record.timings.get("copy"))


def _rivals(records: Sequence[Record]) -> str:
    """What `_rival` gave, in words."""
    names = set(itertools.chain.from_iterable(r.timings for r in records))
    if "compile" in names:
        return "the better of eager mode and torch.compile"
    return "eager mode" if "eager" in names else "a plain copy"
