"""`lntune prune`: a log without what nobody needs any more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from lntune import schedule
from lntune.commands import merge
from lntune.errors import LogError
from lntune.log import lines, pruning, union
from lntune.log.pruning import Kept
from lntune.log.union import Fault, Line


class File(msgspec.Struct, frozen=True):
    """A log before and after: its lines, and its bytes."""

    path: str
    lines: int
    kept: int
    bytes: int
    bytes_kept: int


class Pruned(msgspec.Struct, frozen=True):
    """What was done, or with `dry_run` would be. `kept` and `dropped` are why -> how many lines;
    `unusable` the lines that are no records.
    """

    dry_run: bool
    files: tuple[File, ...]
    kept: dict[str, int]
    dropped: dict[str, int]
    unusable: tuple[Fault, ...]


def prune(
    logs: Sequence[Path],
    keep: set[Kept],
    dry_run: bool = False,
    on_file: Callable[[Path], None] = lambda _: None,
) -> Pruned:
    """Take from logs, and folders of them, what is not to be kept, see `pruning`. A file is locked
    from when it is read until it has its new content, as a whole: who appends waits. `on_file` is
    told of each file before.

    Raises:
        InputError: there is no log.
        LogError: a file cannot be read, locked or written; it stays as it was, and those after it.
    """
    kept, dropped = Counter[str](), Counter[str]()
    unusable: list[Fault] = []
    files = []
    for path in dict.fromkeys(file for log in logs for file in merge.logs_of(log)):
        on_file(path)
        if dry_run:
            file, verdicts, faults = _looked(path, keep)
        else:
            with merge.locked(path):
                file, verdicts, faults = _looked(path, keep)
                if file.kept < file.lines:
                    _write(path, [verdict.line for verdict in verdicts if verdict.kept])
        files.append(file)
        unusable += faults
        kept.update(verdict.why for verdict in verdicts if verdict.kept)
        dropped.update(verdict.why for verdict in verdicts if not verdict.kept)
    if unusable:
        dropped[pruning.UNUSABLE] = len(unusable)
    return Pruned(
        dry_run,
        tuple(files),
        dict(kept.most_common()),
        dict(dropped.most_common()),
        tuple(unusable),
    )


def _looked(path: Path, keep: set[Kept]) -> tuple[File, list[pruning.Verdict], list[Fault]]:
    """A file as it is to be, and the verdicts on its lines."""
    found: list[Line] = []
    faults: list[Fault] = []
    for number, raw, fault in lines.of_file(path, largest=None):
        if fault:
            faults.append(Fault(str(path), number, fault))
        elif raw.strip():
            try:
                found.append(union.parsed(raw.strip()))
            except Exception as e:
                faults.append(Fault(str(path), number, f"no usable record: {e}"))
    verdicts = pruning.judge(found, keep, schedule.all_schedules())
    left = [verdict.line for verdict in verdicts if verdict.kept]
    file = File(
        str(path),
        len(found) + len(faults),
        len(left),
        path.stat().st_size,
        sum(len(line.raw) + 1 for line in left),
    )
    return file, verdicts, faults


def _write(path: Path, kept: Sequence[Line]) -> None:
    try:
        merge.write(path, kept)
    except OSError as e:
        raise LogError(f"cannot write the tuning log {path}: {e.strerror or e}.") from e
