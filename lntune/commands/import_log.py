"""`lntune import`: records that were made elsewhere, into the log."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from lntune import schedule
from lntune.errors import InputError, LntuneError, got_expected
from lntune.log import lines, records, t4
from lntune.log.records import Record
from lntune.log.t4 import Search
from lntune.log.union import Fault, Union, parsed


class Imported(msgspec.Struct, frozen=True):
    """What was added to a log, what was there before, and what was left out, and why."""

    log: str
    added: int
    known: int
    left_out: tuple[Fault, ...]


def from_t4(files: Sequence[Path], log_dir: Path, search: Search | None = None) -> Imported:
    """Add the trials of files in the T4 format, or of folders of them, to a log. `search` is what
    they are of, where they do not say so themselves. A configuration that today's schedule does not
    take is left out.

    Raises:
        InputError: a file is none in that format, or what it is of is not known.
        LogError: a file cannot be read, or the log not be written.
    """
    found, faults = list[Record](), list[Fault]()
    for path in (one for file in files for one in _results(file)):
        read = t4.decoded(_content(path))
        of = read.lntune or search
        if of is None:
            raise InputError(
                got_expected(
                    "file",
                    f"{path}, which does not say what it is of",
                    "one that lntune wrote",
                    "For others give --op, --hidden, --dtype, --rows and --schedule.",
                )
            )
        for number, result in enumerate(read.results, 1):
            try:
                schedule.resolve(of.schedule, of.case.op, result.configuration)
                found.append(t4.trial(result, of))
            except (LntuneError, ValueError) as e:
                faults.append(Fault(str(path), number, str(e)))
    return _told(log_dir, found, faults)


def joined(parts: Sequence[Imported]) -> Imported:
    """What several imports into one log come to."""
    return Imported(
        parts[0].log,
        sum(part.added for part in parts),
        sum(part.known for part in parts),
        tuple(fault for part in parts for fault in part.left_out),
    )


def _told(log_dir: Path, found: Sequence[Record], faults: Sequence[Fault]) -> Imported:
    added = add(log_dir, found)
    return Imported(str(log_dir), added, len(found) - added, tuple(faults))


def add(log_dir: Path, found: Iterable[Record]) -> int:
    """Append records to a log, but for those that it has; how many were new.

    Raises:
        LogError: it cannot be read or written.
    """
    known: dict[Path, set[bytes]] = {}
    added = 0
    for record in found:
        path = records.log_path(log_dir, record.device, record.case.op)
        if path not in known:
            union = Union()
            if path.exists():
                union.add(path)
            there = (records.of_line(line.raw) for line in union.lines() if not line.newer)
            known[path] = {_content_of(one) for one in there}
        content = _content_of(record)
        if content not in known[path]:
            records.append(log_dir, record)
            known[path].add(content)
            added += 1
    return added


def _content_of(record: Record) -> bytes:
    """What tells a record from others, whichever schema it was written in."""
    today = msgspec.structs.replace(record, schema=records.SCHEMA)
    return parsed(msgspec.json.encode(today)).content


def _results(path: Path) -> list[Path]:
    """The files of results of a path."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*.json") if file.name != "metadata.json")


def _content(path: Path) -> bytes:
    with lines.opened(path) as file:
        content = file.read(lines.LARGEST + 1)
    if len(content) > lines.LARGEST:
        raise InputError(
            got_expected("file", f"{path}, which is larger", f"at most {lines.LARGEST:,} bytes")
        )
    return content
