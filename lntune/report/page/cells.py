"""The columns of a page's tables of cases: what a cell says, and which screens have room for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from lntune.compare.comparison import Comparison
from lntune.compare.differences import differences
from lntune.report.page.facts import CaseFacts
from lntune.report.tables import micros, number, percent

TIMES, DASH = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
Item = TypeVar("Item")

From = Literal["phone", "tablet", "desk"]
"""The narrowest screen on which a column is shown."""


class Cell(NamedTuple):
    """A cell's text, the class of its colour, and notes behind it."""

    text: str
    style: str = ""
    notes: tuple[str, ...] = ()


class Column(NamedTuple, Generic[Item]):
    """A column: its heading, what it holds of a case, and whether that is a figure."""

    name: str
    cell: Callable[[Item], str | Cell]
    shown: From = "phone"
    figure: bool = True


class Table(NamedTuple):
    """A table of cases as a page has it, whose first row is of case `first`. `choices` are the
    columns that can be filtered, by their place, with the values that they have.
    """

    columns: list[Column[Any]]
    rows: list[list[Cell]]
    choices: dict[int, list[str]]
    first: int


def ratio(value: float | None) -> Cell:
    """How many times faster; 2 % either way is a draw."""
    style = "" if value is None or 0.98 <= value <= 1.02 else "up" if value > 1 else "down"  # noqa: PLR2004
    return Cell(number(value, 2, TIMES), style)


def _schedule(c: CaseFacts) -> Cell:
    served = f"eager, not {c.row.schedule}" if c.eager_serves else c.row.schedule
    notes = (("stale",) if c.row.stale else ()) + (("disturbed",) if c.row.disturbed else ())
    return Cell(served, "", notes)


_REPORT: list[Column[CaseFacts]] = [
    Column("operator", lambda c: c.row.op, figure=False),
    Column("dtype", lambda c: c.row.dtype, figure=False),
    Column("hidden", lambda c: str(c.row.hidden)),
    Column("rows", lambda c: str(c.row.rows)),
    Column("eager µs", lambda c: micros(c.row.eager_us), "tablet"),
    Column("compile µs", lambda c: micros(c.row.compile_us), "desk"),
    Column("tuned µs", lambda c: micros(c.row.tuned_us)),
    Column("over eager", lambda c: ratio(c.row.speedup)),
    Column("over compile", lambda c: ratio(c.row.over_compile), "tablet"),
    Column("over default", lambda c: ratio(c.row.over_default), "tablet"),
    Column("GB/s", lambda c: number(c.row.gbps, 1), "desk"),
    Column("of copy", lambda c: percent(c.row.of_copy), "tablet"),
    Column("error / allowed", lambda c: number(c.row.of_allowed, 2), "desk"),
    Column("spread", lambda c: percent(c.row.spread), "desk"),
    Column("schedule", _schedule, "tablet", figure=False),
]
_COMPILED = {"compile µs", "over compile"}
"""Columns that are there only where something was measured."""


def report(cases: Sequence[CaseFacts], first: int) -> Table:
    """The cases of a device; `first` is the number of its first case on the page."""
    measured = any(c.row.compile_us for c in cases)
    columns = [c for c in _REPORT if measured or c.name not in _COMPILED]
    return _table(columns, cases, (0, 1), first)


def _differs(c: Comparison) -> str:
    return "; ".join(differences(c.a, c.b)) or "-"


_VERDICT = {"FASTER": "up", "SLOWER": "down", "SAME": "", "UNSURE": "soft"}


def compare(cases: Sequence[Comparison], first: int = 0) -> Table:
    """The cases of a comparison; `first` is the number of the first on the page."""
    several = len({c.device for c in cases}) > 1
    columns: list[Column[Comparison]] = [
        Column("operator", lambda c: c.case.op, figure=False),
        Column("dtype", lambda c: c.case.dtype, figure=False),
        Column("hidden", lambda c: str(c.case.hidden)),
        Column("rows", lambda c: str(c.case.rows)),
        Column("verdict", lambda c: Cell(c.verdict, _VERDICT[c.verdict]), figure=False),
        Column("A µs", lambda c: micros(c.a.us), "tablet"),
        Column("B µs", lambda c: micros(c.b.us), "tablet"),
        Column("A / B", lambda c: number(c.ratio, 3, TIMES)),
        Column("95 % interval", lambda c: f"{c.low:.3f}{DASH}{c.high:.3f}", "tablet"),
        Column("of copy", lambda c: f"{percent(c.a.of_copy)} {percent(c.b.of_copy)}", "desk"),
        Column("p", lambda c: f"{c.p:.2g}", "desk"),
        Column("compared", lambda c: c.method, "desk", figure=False),
    ]
    if any(c.reason for c in cases):
        columns.append(Column("doubts", lambda c: c.reason or "-", "desk", figure=False))
    if any(differences(c.a, c.b) for c in cases):
        columns.append(Column("differs in", _differs, "desk", figure=False))
    if several:
        columns.insert(0, Column("device", lambda c: c.device, "desk", figure=False))
    verdict = next(i for i, c in enumerate(columns) if c.name == "verdict")
    return _table(columns, cases, (verdict - 4, verdict - 3, verdict), first)


def _table(
    columns: list[Column[Item]], cases: Iterable[Item], choices: Iterable[int], first: int
) -> Table:
    rows = [[_cell(column, case) for column in columns] for case in cases]
    values = {i: list(dict.fromkeys(row[i].text for row in rows)) for i in choices}
    return Table(list(columns), rows, values, first)


def _cell(column: Column[Item], case: Item) -> Cell:
    said = column.cell(case)
    return Cell(said) if isinstance(said, str) else said
