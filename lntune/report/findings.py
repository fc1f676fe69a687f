"""What `lntune doctor` found, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lntune.report.columns import WIDE

if TYPE_CHECKING:
    from lntune.doctor import Finding

MARKS = {"ok": Text("ok", style="green"), "warn": Text("warn", style="yellow"), "fail": Text("FAIL", style="red")}
TOPIC = 16
NARROW = 60
"""On terminals of fewer columns the details stand below their topics."""


def show(found: Sequence[Finding], out: Console) -> None:
    """A mark, a topic, what was found and the remedy; on a terminal broken between words under each other."""
    for one in found:
        remedy = f" -> {one.remedy}" if one.remedy and one.status != "ok" else ""
        detail = Text(f"{one.detail}{remedy}")
        grid = Table.grid(padding=(0, 1))
        if not out.is_terminal or out.width >= WIDE:
            out.print(Text.assemble(MARKS[one.status], " " * (5 - len(MARKS[one.status])), f"{one.topic:{TOPIC}} ", detail))
        elif out.width < NARROW:
            grid.add_row(MARKS[one.status], Text(one.topic, style="bold"))
            grid.add_row("", detail)
            out.print(grid)
        else:
            grid.add_column(width=4)
            grid.add_column(width=TOPIC)
            grid.add_row(MARKS[one.status], one.topic, detail)
            out.print(grid)
