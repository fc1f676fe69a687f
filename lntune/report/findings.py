"""What `lntune doctor` found, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from lntune.report.output import Line

if TYPE_CHECKING:
    from lntune.commands.doctor import Finding

MARKS = {
    "ok": Text("ok  ", style="green"),
    "warn": Text("warn", style="yellow"),
    "fail": Text("FAIL", style="red"),
}


def lines(findings: Sequence[Finding]) -> list[Line]:
    """A line for each finding: a mark, the topic, what was found and the remedy."""
    width = max((len(finding.topic) for finding in findings), default=0)
    found: list[Line] = []
    for finding in findings:
        remedy = ""
        if finding.remedy and finding.status != "ok":
            remedy = f" -> {finding.remedy}"
        lead = Text.assemble(MARKS[finding.status], f" {finding.topic:{width}} ")
        found.append((lead, f"{finding.detail}{remedy}"))
    return found
