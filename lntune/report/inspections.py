"""Inspected GPU kernels as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from lntune.report.tables import ROW_STRIDED, percent, plan_text

if TYPE_CHECKING:
    from lntune.inspection import Inspected


def widths(counts: dict[int, int]) -> str:
    """Accesses by their width: "6x128 1x32", in bits."""
    return " ".join(f"{count}x{bits}" for bits, count in sorted(counts.items(), reverse=True)) or "-"


def times(moved: dict[str, float]) -> str:
    """How often matrices are moved: "x 1, dy 1"."""
    return ", ".join(f"{name} {count:.3g}" for name, count in moved.items()) or "-"


def table(found: Sequence[Inspected]) -> Table:
    """A row for each kernel."""
    made = Table(title="compiled, not run on a device", title_justify="left")
    for name in ("op", "dtype", "arch"):
        made.add_column(name)
    for name in ("hidden", "registers", "spill", "stack", "shared", "occupancy"):
        made.add_column(name, justify="right")
    for name in ("loads", "stores", "read", "written"):
        made.add_column(name)
    made.add_column("beyond least", justify="right")
    made.add_column("between", justify="right")
    made.add_column("schedule and knobs")
    for one in found:
        for k in one.kernels:
            r = k.resources
            facts = (
                r.registers,
                r.spill_store_bytes + r.spill_load_bytes,
                r.stack_bytes,
                r.shared_bytes + k.dynamic_shared,
                percent(k.occupancy.share),
            )
            moves = widths(k.code.global_loads), widths(k.code.global_stores), times(one.read), times(one.written)
            shares = f"{100 * one.extra:.1f}%", f"{100 * one.between:.1f}%" if one.between else "-"
            what = plan_text(one.schedule, one.knobs, one.strided)
            made.add_row(one.case.op, one.case.dtype, one.arch, str(one.case.hidden), *map(str, facts), *moves, *shares, what)
    return made


def lines(found: Sequence[Inspected]) -> list[str]:
    """What is wrong, and where the widths come from."""
    origins = {k.code.origin for one in found for k in one.kernels}
    said = [f"widths in bits, counted in the code ({', '.join(sorted(origins))}); reads and writes counted by running 8 rows or so in the emulator"]
    if any(one.between for one in found):
        said.append("between: what the kernels of a program write and read for each other, as a share of the least for the case's rows")
    bad = [f"{one.case} {one.arch}{ROW_STRIDED if one.strided else ''}: {'; '.join(one.problems)}" for one in found if one.problems]
    return [*said, *(bad or [f"{len(found)} kernels, no problems: no spills, no stack, nothing moved twice"])]
