"""The table of `lntune build`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lntune.case import bucket_label
from lntune.report.columns import Column, Table, key, whole
from lntune.report.tables import plan_text
from lntune.words import counted

if TYPE_CHECKING:
    from lntune.commands.build import Built


def table(kernels: Sequence[Built]) -> Table:
    """A row for each kernel."""
    columns = [
        *key("op", "dtype"),
        Column("hidden"),
        Column("rows"),
        *key("arch"),
        Column("variant", 2, False, shared=True),
        Column("served by", 1, False, shared=True),
        *key("status"),
        Column("KiB", 3),
        Column("schedule and knobs", 4, False),
    ]
    rows = Table("", columns)
    for kernel in kernels:
        case = kernel.case
        rows.add(
            case.op,
            case.dtype,
            str(case.hidden),
            bucket_label(case.bucket),
            kernel.arch,
            case.variant,
            kernel.tier,
            kernel.status,
            f"{kernel.bytes / 1024:.0f}" if kernel.bytes else "-",
            plan_text(kernel.schedule, kernel.knobs, kernel.strided) if kernel.schedule else "",
        )
    return rows


def lines(kernels: Sequence[Built], folder: Path | None) -> list[str]:
    """What the table comes to, and where the files are."""
    count = Counter(kernel.status for kernel in kernels)
    before = f"{count['there']} {'was' if count['there'] == 1 else 'were'} there"
    eager = f", {count['eager']} left to eager mode" if count["eager"] else ""
    text = [f"{counted(count['built'], 'kernel')} built, {before}{eager}"]
    there = count["built"] + count["there"]
    if checked := sum(kernel.checked for kernel in kernels):
        which = "all" if checked == there else str(checked)
        text[0] += f"; {which} checked on this machine"
    if there > checked:
        rest = "they" if there - checked > 1 else "it"
        text.append(
            f"{there - checked} not checked: {rest} will be before a first call on each kind of"
            " machine, in some tens of milliseconds"
        )
    if folder:
        text.append(
            f"in {whole(folder)}: copy it, with LNTUNE_CACHE_DIR for another place, to machines of"
            " these kinds that have no compiler"
        )
    for kernel in kernels:
        text += [f"{kernel.case} is served by another: {wrong}" for wrong in kernel.wrong]
    failed = [kernel for kernel in kernels if kernel.status == "failed"]
    return [*text, *(f"{k.case} for {k.arch} failed: {k.message}" for k in failed)]
