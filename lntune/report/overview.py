"""What cases come to, by operator and dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from lntune import ops
from lntune.case import Case
from lntune.report.bars import bar
from lntune.report.columns import Cell, Column, Table, key
from lntune.report.rows import Row, geomean
from lntune.report.tables import BAR, cases_table, percent, ratio_text, summary_lines


class Overview(msgspec.Struct, frozen=True):
    """The cases of an operator and dtype: how many are `tuned`, `missing` of the default grid,
    `disturbed`, `stale`; geometric means of how many times as fast they are as eager mode,
    torch.compile and the default knobs, and of the share of a copy's bandwidth; `slowest` is the
    smallest of the first, `smallest_of_copy` that of the last. None: not measured.
    """

    op: str
    dtype: str
    tuned: int
    missing: int
    disturbed: int
    stale: int
    over_eager: float | None
    slowest: float | None
    over_compile: float | None
    over_default: float | None
    of_copy: float | None
    smallest_of_copy: float | None


def overviews(rows: Iterable[Row], missing: Iterable[Case] = ()) -> list[Overview]:
    """Cases by operator and dtype, in the operators' order."""
    groups: dict[tuple[str, str], list[Row]] = {}
    lacking: dict[tuple[str, str], int] = {}
    for row in rows:
        groups.setdefault((row.op, row.dtype), []).append(row)
    for case in missing:
        lacking[case.op, case.dtype] = lacking.get((case.op, case.dtype), 0) + 1
    places = {op: place for place, op in enumerate(ops.OPS)}
    keys = sorted({*groups, *lacking}, key=lambda key: (places.get(key[0], len(places)), key))
    return [_overview(*key, groups.get(key, []), lacking.get(key, 0)) for key in keys]


def _overview(op: str, dtype: str, rows: Sequence[Row], missing: int) -> Overview:
    return Overview(
        op=op,
        dtype=dtype,
        tuned=len(rows),
        missing=missing,
        disturbed=sum(bool(row.disturbed) for row in rows),
        stale=sum(row.stale for row in rows),
        over_eager=geomean(row.speedup for row in rows),
        slowest=min((row.speedup for row in rows if row.speedup), default=None),
        over_compile=geomean(row.over_compile for row in rows),
        over_default=geomean(row.over_default for row in rows),
        of_copy=geomean(row.of_copy for row in rows),
        smallest_of_copy=min((row.of_copy for row in rows if row.of_copy), default=None),
    )


def overview_table(overviews: Sequence[Overview], title: str = "") -> Table:
    """A line for each operator and dtype; columns in which nobody has anything are left out."""
    most = max((o.over_eager for o in overviews if o.over_eager), default=1.0)
    figures: list[tuple[Column, Callable[[Overview], Cell]]] = [
        (Column("cases"), lambda o: str(o.tuned)),
        (Column("over eager"), lambda o: ratio_text(o.over_eager)),
        (
            Column(f"up to {most:.3g}x", 3, right=False, drawn=True),
            lambda o: bar(o.over_eager, most, BAR),
        ),
        (Column("slowest", 2), lambda o: ratio_text(o.slowest)),
        (Column("over compile", 5), lambda o: ratio_text(o.over_compile)),
        (Column("over untuned", 4), lambda o: ratio_text(o.over_default)),
        (Column("of copy", 1), lambda o: percent(o.of_copy)),
        (Column("smallest of copy", 6), lambda o: percent(o.smallest_of_copy)),
        (Column("missing"), lambda o: str(o.missing or "-")),
        (Column("stale"), lambda o: str(o.stale or "-")),
        (Column("disturbed", 7), lambda o: str(o.disturbed or "-")),
    ]
    used = [
        (column, cell)
        for column, cell in figures
        if any(str(cell(o)) not in ("", "-") for o in overviews)
    ]
    table = Table(title, [*key("op", "dtype"), *(column for column, _ in used)])
    for o in overviews:
        table.add(o.op, o.dtype, *(cell(o) for _, cell in used))
    return table


def result_tables(rows: Sequence[Row], title: str, bandwidth: float | None = None) -> list[Table]:
    """The tables of a command that measures, none of no cases: what these come to, where that is
    shorter, and all of them.
    """
    if not rows:
        return []
    by_dtype = overviews(rows)
    table = cases_table(rows, title, details=True, bandwidth=bandwidth)
    table.notes = summary_lines(rows)
    several = 1 < len(by_dtype) < len(rows)
    return [overview_table(by_dtype, "geometric means"), table] if several else [table]
