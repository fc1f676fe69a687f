"""The table of `lntune check`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from lntune.report.columns import Column, Table, key
from lntune.report.tables import TWICE, number
from lntune.words import counted

if TYPE_CHECKING:
    from lntune.commands.check import Result
    from lntune.log.select import Tier

SERVED: dict[Tier, str] = {
    "exact": "tuned for the case itself",
    "bucket": "tuned for another row bucket",
    "near": "tuned for a nearby hidden size",
    "default": "with default knobs, untuned",
}
"""Tier of a choice -> what its kernels are, in a sentence that counts them."""


def verdict_table(results: Sequence[Result]) -> Table:
    """What serves each case, its worst error as a share of what is allowed and of eager's own, and
    the verdict; variants of which the same is to be said share a row. What is not right comes
    first.
    """
    columns = [
        *key("op", "dtype"),
        Column("hidden"),
        Column("rows"),
        Column("variants", 2, right=False),
        Column("served by", right=False),
        Column("error/allowed"),
        Column("error/eager's", 3),
    ]
    table = Table("", [*columns, Column("verdict", right=False)], grouped=True)

    def alike(r: Result) -> tuple[object, ...]:
        return r.ok, r.case.op, r.case.dtype, r.case.hidden, r.case.rows, r.tier, r.schedule

    ordered = [*(r for r in results if not r.ok), *(r for r in results if r.ok)]
    for _, group in itertools.groupby(ordered, alike):
        rows = list(group)
        r = rows[0]
        wrong = "NONE" if r.missing else "WRONG"
        verdict = Text("right", style="green") if r.ok else Text(wrong, style="red")
        table.add(
            r.case.op,
            r.case.dtype,
            str(r.case.hidden),
            str(r.case.rows),
            " ".join(one.case.variant for one in rows),
            f"{r.tier}: {r.schedule}" if r.schedule else r.tier,
            number(_worst(rows)),
            number(max((v for one in rows for v in one.versus_eager.values()), default=None)),
            verdict,
        )
    return table


def _worst(results: Sequence[Result]) -> float | None:
    """The largest error as a share of what is allowed; None where nothing was measured."""
    return max((error for r in results for error in r.errors.values()), default=None)


def verdict_lines(results: Sequence[Result]) -> list[str]:
    """What the table comes to, what serves how many, and what is wrong with each kernel that is."""
    missing = sum(r.missing for r in results)
    wrong = sum(not r.ok for r in results) - missing
    eager = sum(r.tier == "eager" for r in results) - missing
    served = f", {missing} cannot be had" if missing else ""
    served += f", eager mode serves {eager} more" if eager else ""
    checked = len(results) - eager - missing
    came = f"{wrong} wrong" if wrong else "all right" if checked or not missing else "none right"
    sentences = [f"{counted(checked, 'kernel')} checked, {came}{served}"]
    if checked:
        tiers = Counter(r.tier for r in results)
        kinds = (f"{tiers[tier]} {words} ({tier})" for tier, words in SERVED.items() if tiers[tier])
        sentences.append(f"what serves: {', '.join(kinds)}")
    if beyond := sum(r.ok and max(r.versus_eager.values(), default=0) > TWICE for r in results):
        sentences.append(
            f"error/eager's above {TWICE} in {beyond}: there eager is all but exact; error/allowed"
            " counts, whose limit is 1"
        )
    sentences += [f"WRONG: {r.case}: {r.message}" for r in results if not r.ok and not r.missing]
    # a fault of the machine is that of many cases, whose first is named
    return sentences + list(dict.fromkeys(r.message for r in results if r.missing))
