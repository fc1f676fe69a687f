"""Rows on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lntune import knobs
from lntune.report.rows import Row, summary

ROW_STRIDED = ", row-strided"


def console(stderr: bool = False) -> Console:
    """A console that keeps tables whole when its output is not a terminal."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=200)


def plan_text(schedule: str, setting: Mapping[str, knobs.Value], strided: bool = False) -> str:
    """A schedule and its knobs; `strided`: in the form that takes rows that lie apart."""
    return f"{schedule} {knobs.describe(setting)}{ROW_STRIDED if strided else ''}"


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """A figure, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def micros(value: float | None) -> str:
    """Microseconds with three significant digits or so."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"  # noqa: PLR2004


def percent(value: float | None) -> str:
    """A share in percent."""
    return "-" if value is None else f"{100 * value:.0f}%"


def ratio_text(value: float | None) -> Text:
    """A speedup, coloured by which side of 1 it is on; 2 % either way is a draw."""
    style = "" if value is None or 0.98 <= value <= 1.02 else "green" if value > 1 else "red"  # noqa: PLR2004
    return Text(number(value, 2, "x"), style=style)


def cases_table(rows: Sequence[Row], title: str, details: bool = False, bandwidth: float | None = None) -> Table:
    """Per case: eager and torch.compile where measured, tuned, the ratios, bandwidth, share of a copy, error.

    Where `bandwidth` is known, that of a large plain copy on the device in bytes a second, also the share of it.
    """
    compiled, eager = any(r.compile_us for r in rows), any(r.eager_us for r in rows)
    default = any(r.default_us for r in rows)
    table = Table(title=title, title_justify="left")
    for name in ("op", "dtype"):
        table.add_column(name)
    names = ["hidden", "rows", *(["eager us"] if eager else []), *(["compile us"] if compiled else []), "tuned us"]
    names += [*(["over eager"] if eager else []), *(["over better"] if compiled else []), "GB/s", "of copy"]
    names += [*([f"of {bandwidth / 1e9:.0f} GB/s"] if bandwidth else []), "error/eager's"]
    for name in names:
        table.add_column(name, justify="right")
    if details:
        if default:
            table.add_column("over default", justify="right")
        table.add_column("spread", justify="right")
        table.add_column("schedule and knobs")
    for r in rows:
        cells: list[Any] = [r.op, r.dtype, str(r.hidden), str(r.rows)]
        cells += [micros(r.eager_us)] if eager else []
        cells += [micros(r.compile_us)] if compiled else []
        cells += [micros(r.tuned_us) + ("*" if r.busy else "")]
        cells += [ratio_text(r.speedup)] if eager else []
        cells += [ratio_text(r.over_better)] if compiled else []
        cells += [number(r.gbps, 1), percent(r.of_copy)]
        cells += [*([percent(r.gbps * 1e9 / bandwidth if r.gbps else None)] if bandwidth else []), number(r.error, 2)]
        if details:
            cells += [*([ratio_text(r.over_default)] if default else []), percent(r.spread), f"{r.schedule} {r.knobs}"]
        table.add_row(*cells)
    return table


def summary_lines(rows: Sequence[Row]) -> list[str]:
    """What the table comes to, in sentences."""
    facts = summary(list(rows))
    lines = ["1 case" if facts["cases"] == 1 else f"{facts['cases']} cases"]
    if facts["geomean_over_eager"]:
        lines[0] += f", geomean {facts['geomean_over_eager']:.2f}x over eager"
    if facts["geomean_over_better_of_eager_and_compile"]:
        lines.append(f"geomean {facts['geomean_over_better_of_eager_and_compile']:.2f}x over the better of eager and torch.compile")
    if facts["geomean_over_default"]:
        lines.append(f"geomean {facts['geomean_over_default']:.2f}x over the default knobs")
    slower = facts["slower_than_eager"]
    if facts["geomean_over_eager"]:
        lines.append("slower than eager nowhere" if not slower else f"slower than eager in {len(slower)}: {'; '.join(slower)}")
    elif facts["geomean_of_copy"]:
        lines.append(f"bandwidth of a copy: geomean {percent(facts['geomean_of_copy'])}, smallest {percent(facts['smallest_of_copy'])}")
    if facts["measured_on_a_busy_machine"]:
        lines.append(f"* {facts['measured_on_a_busy_machine']} measured while others used the machine: ratios hold, absolute times may not")
    return lines
