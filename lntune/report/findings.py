"""What `lntune doctor` found, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from lntune.report.columns import hanging

if TYPE_CHECKING:
    from lntune.commands.doctor import Finding

MARKS = {
    "ok": Text("ok  ", style="green"),
    "warn": Text("warn", style="yellow"),
    "fail": Text("FAIL", style="red"),
}


def show(found: Sequence[Finding], out: Console) -> None:
    """A mark, a topic, what was found and the remedy; on a terminal broken between words under each
    other.
    """
    width = max((len(one.topic) for one in found), default=0)
    for one in found:
        remedy = f" -> {one.remedy}" if one.remedy and one.status != "ok" else ""
        hanging(
            out, Text.assemble(MARKS[one.status], f" {one.topic:{width}} "), f"{one.detail}{remedy}"
        )
