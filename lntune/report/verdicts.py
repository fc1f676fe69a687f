"""The table of `lntune check`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from lntune.verification import Result


def verdict_table(results: Sequence[Result]) -> Table:
    """Per kernel: what serves it, its worst error in units of the bar and of eager's own, and the verdict."""
    table = Table(title="error: share of the bar (1 is the limit); vs eager: error divided by eager's own", title_justify="left")
    for name in ("case", "served by"):
        table.add_column(name)
    for name in ("error", "vs eager"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for r in results:
        worst = max(r.errors.values(), default=None)
        versus = max(r.versus_eager.values(), default=None)
        verdict = Text("right", style="green") if r.ok else Text("WRONG", style="red")
        verdict.append(f" {r.message}" if r.message else "")
        cells = ["-" if v is None else f"{v:.2f}" for v in (worst, versus)]
        table.add_row(str(r.case), f"{r.tier}: {r.schedule or 'eager'}", *cells, verdict)
    return table


def verdict_lines(results: Sequence[Result]) -> list[str]:
    """What the table comes to."""
    wrong, eager = sum(not r.ok for r in results), sum(r.tier == "eager" for r in results)
    served = f", eager mode serves {eager} more" if eager else ""
    return [f"{len(results) - eager} kernels checked, {f'{wrong} wrong' if wrong else 'all right'}{served}"]
