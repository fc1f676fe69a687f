"""The table of `lntune check`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from lntune.verification import Result


def verdict_table(results: Iterable[Result]) -> Table:
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
        verdict = "[green]right[/green]" if r.ok else "[red]WRONG[/red]"
        cells = ["-" if v is None else f"{v:.2f}" for v in (worst, versus)]
        table.add_row(str(r.case), f"{r.tier}: {r.schedule or 'eager'}", *cells, f"{verdict} {r.message}".strip())
    return table
