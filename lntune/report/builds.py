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


def table(found: Sequence[Built]) -> Table:
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
    made = Table("", columns)
    for one in found:
        case, what = (
            one.case,
            (plan_text(one.schedule, one.knobs, one.strided) if one.schedule else ""),
        )
        size = f"{one.bytes / 1024:.0f}" if one.bytes else "-"
        made.add(
            case.op,
            case.dtype,
            str(case.hidden),
            bucket_label(case.bucket),
            one.arch,
            case.variant,
            one.tier,
            one.status,
            size,
            what,
        )
    return made


def lines(found: Sequence[Built], folder: Path | None) -> list[str]:
    """What the table comes to, and where the files are."""
    count = Counter(one.status for one in found)
    there = f"{count['there']} {'was' if count['there'] == 1 else 'were'} there"
    said = [
        f"{counted(count['built'], 'kernel')} built, {there}"
        + (f", {count['eager']} left to eager mode" if count["eager"] else "")
    ]
    if folder:
        said.append(
            f"in {whole(folder)}: copy it, with LNTUNE_CACHE_DIR for another place, to machines of"
            " these kinds that have no compiler"
        )
    failed = [
        f"{one.case} for {one.arch} failed: {one.message}"
        for one in found
        if one.status == "failed"
    ]
    return [*said, *failed]
