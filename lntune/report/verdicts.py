"""The table of `lntune check`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from lntune.report.columns import Column, Table, key
from lntune.report.tables import TWICE, number
from lntune.words import counted

if TYPE_CHECKING:
    from lntune.commands.check import Result


def verdict_table(results: Sequence[Result]) -> Table:
    """Per kernel: what serves it, its worst error as a share of what is allowed and of eager's own,
    and the verdict.
    """
    columns = [
        *key("case"),
        Column("served by", 2, right=False),
        Column("error/allowed", 1),
        Column("error/eager's", 3),
    ]
    table = Table("", [*columns, Column("verdict", right=False)])
    for r in results:
        worst = max(r.errors.values(), default=None)
        versus = max(r.versus_eager.values(), default=None)
        wrong = "NONE" if r.missing else "WRONG"
        verdict = Text("right", style="green") if r.ok else Text(wrong, style="red")
        table.add(
            str(r.case),
            f"{r.tier}: {r.schedule}" if r.schedule else r.tier,
            number(worst),
            number(versus),
            verdict,
        )
    return table


def verdict_lines(results: Sequence[Result]) -> list[str]:
    """What the table comes to, and what is wrong with each kernel that is."""
    missing = sum(r.missing for r in results)
    wrong = sum(not r.ok for r in results) - missing
    eager = sum(r.tier == "eager" for r in results) - missing
    served = f", {missing} cannot be had" if missing else ""
    served += f", eager mode serves {eager} more" if eager else ""
    checked = len(results) - eager - missing
    came = f"{wrong} wrong" if wrong else "all right" if checked or not missing else "none right"
    sentences = [f"{counted(checked, 'kernel')} checked, {came}{served}"]
    if beyond := sum(r.ok and max(r.versus_eager.values(), default=0) > TWICE for r in results):
        sentences.append(
            f"error/eager's above {TWICE} in {beyond}: there eager is all but exact; error/allowed"
            " counts, whose limit is 1"
        )
    sentences += [f"WRONG: {r.case}: {r.message}" for r in results if not r.ok and not r.missing]
    # a fault of the machine is that of many cases, whose first is named
    return sentences + list(dict.fromkeys(r.message for r in results if r.missing))
