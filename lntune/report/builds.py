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


def table(built: Sequence[Built]) -> Table:
    """A row for each kernel."""
    columns = [
        *key("op", "dtype"),
        Column("hidden"),
        Column("rows"),
        *key("arch"),
        Column("variant", 2, False, shared=True),
    ]
    columns += [
        Column("served by", 1, False, shared=True),
        *key("status"),
        Column("KiB", 3),
        Column("schedule and knobs", 4, False),
    ]
    listing = Table("", columns)
    for kernel in built:
        case, plan = (
            kernel.case,
            (plan_text(kernel.schedule, kernel.knobs, kernel.strided) if kernel.schedule else ""),
        )
        size = f"{kernel.bytes / 1024:.0f}" if kernel.bytes else "-"
        listing.add(
            case.op,
            case.dtype,
            str(case.hidden),
            bucket_label(case.bucket),
            kernel.arch,
            case.variant,
            kernel.tier,
            kernel.status,
            size,
            plan,
        )
    return listing


def lines(built: Sequence[Built], folder: Path | None) -> list[str]:
    """What the table comes to, and where the files are."""
    count = Counter(kernel.status for kernel in built)
    cached = f"{count['there']} {'was' if count['there'] == 1 else 'were'} there"
    sentences = [
        f"{counted(count['built'], 'kernel')} built, {cached}"
        + (f", {count['eager']} left to eager mode" if count["eager"] else "")
    ]
    if folder:
        sentences.append(
            f"in {whole(folder)}: copy it, with LNTUNE_CACHE_DIR for another place, to machines of"
            " these kinds that have no compiler"
        )
    failed = [
        f"{kernel.case} for {kernel.arch} failed: {kernel.message}"
        for kernel in built
        if kernel.status == "failed"
    ]
    return [*sentences, *failed]
