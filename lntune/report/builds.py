"""The table of `lntune build`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from lntune.case import bucket_label
from lntune.report.tables import plan_text

if TYPE_CHECKING:
    from lntune.prebuild import Built


def table(found: Sequence[Built]) -> Table:
    """A row for each kernel."""
    made = Table()
    for name in ("op", "variant", "dtype"):
        made.add_column(name)
    for name in ("hidden", "rows"):
        made.add_column(name, justify="right")
    for name in ("arch", "served by", "schedule and knobs", "status"):
        made.add_column(name)
    made.add_column("KiB", justify="right")
    for one in found:
        case, what = one.case, plan_text(one.schedule, one.knobs, one.strided) if one.schedule else ""
        facts = (case.op, case.variant, case.dtype, str(case.hidden), bucket_label(case.bucket), one.arch, one.tier, what)
        made.add_row(*facts, one.status, f"{one.bytes / 1024:.0f}" if one.bytes else "-")
    return made


def lines(found: Sequence[Built], folder: Path | None) -> list[str]:
    """What the table comes to, and where the files are."""
    count = Counter(one.status for one in found)
    said = [f"{count['built']} kernels built, {count['there']} were there" + (f", {count['eager']} left to eager mode" if count["eager"] else "")]
    if folder:
        said.append(f"in {folder}: copy it, with LNTUNE_CACHE_DIR for another place, to machines of these kinds that have no compiler")
    failed = [f"{one.case} for {one.arch} failed: {one.message}" for one in found if one.status == "failed"]
    return [*said, *failed]
