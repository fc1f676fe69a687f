"""What `lntune merge` and `lntune prune` have done, as tables and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lntune.report.columns import Column, Table, key, whole
from lntune.report.output import Line
from lntune.words import counted

if TYPE_CHECKING:
    from lntune.commands.merge import Merged
    from lntune.commands.prune import Pruned
    from lntune.log.union import Fault

NAMED = 20
"""Lines of logs that a sentence each is said about; --json has all."""


def files(merged: Merged) -> Table:
    """A row for each file that came of a merge."""
    columns = [
        *key("device", "operator"),
        Column("records"),
        Column("finals", 1),
        Column("runs", 2),
        Column("file", 3, False),
    ]
    table = Table("", columns)
    for file in merged.files:
        table.add(
            file.device,
            file.op,
            str(file.records),
            str(file.finals),
            str(file.runs),
            file.path,
        )
    return table


def lines(merged: Merged) -> list[Line]:
    """What a merge comes to, what each input brought, and what is wrong."""
    more = [f"{counted(merged.duplicates, 'duplicate')} left out"] if merged.duplicates else []
    if merged.newer:
        more.append(f"{merged.newer} of a newer lntune kept as they are")
    said: list[Line] = [
        ", ".join([f"{counted(merged.records, 'record')} in {whole(merged.output)}", *more])
    ]
    for one in merged.inputs:
        said.append(
            f"{whole(one.path)}: {counted(one.records, 'record')} in {counted(one.files, 'file')},"
            f" {one.only_here} of them nowhere else"
        )
    for conflict in merged.conflicts[:NAMED]:
        where = ", ".join(whole(file) for file in conflict.files)
        said.append(
            (
                "CONFLICT: ",
                f"{conflict.what}, of run {conflict.run} at {conflict.time}, differs ({where});"
                " both are kept",
            )
        )
    if len(merged.conflicts) > NAMED:
        said.append(
            f"and {counted(len(merged.conflicts) - NAMED, 'conflict')} more; --json has them"
        )
    return [*said, *left_out(merged.left_out)]


def left_out(faults: Sequence[Fault]) -> list[Line]:
    """Lines that cannot be used, file and number each."""
    said: list[Line] = [
        ("left out: ", f"{whole(f.file)}:{f.line}, {f.why}") for f in faults[:NAMED]
    ]
    if len(faults) > NAMED:
        said.append(f"and {counted(len(faults) - NAMED, 'line')} more; --json has them")
    return said


def pruned(found: Pruned) -> Table:
    """A row for each reason to keep or to drop lines."""
    verb = ("would stay", "would go") if found.dry_run else ("kept", "dropped")
    table = Table("", [Column(verb[0]), Column(verb[1]), Column("what", right=False)])
    for why, count in found.kept.items():
        table.add(str(count), "", why)
    for why, count in found.dropped.items():
        table.add("", str(count), why)
    return table


def pruned_lines(found: Pruned) -> list[Line]:
    """What it comes to, and which lines are no records."""
    lines, kept = sum(f.lines for f in found.files), sum(f.kept for f in found.files)
    size, left = (sum(getattr(f, n) for f in found.files) for n in ("bytes", "bytes_kept"))
    verb = "would stay" if found.dry_run else "kept"
    return [
        f"{kept} of {counted(lines, 'line')} {verb} in {counted(len(found.files), 'file')},"
        f" {left / 1e6:.1f} of {size / 1e6:.1f} MB",
        *left_out(found.unusable),
    ]
