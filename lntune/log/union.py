"""The union of tuning logs: every record once, in an order that nothing but the records decides.

Which log comes first, and how often, makes no difference, so logs can be merged in any order and
again, and the same bytes come of it. Lines stay as they were written. Two lines are one record
where all of their fields are the same; which of two spellings stays is decided by the bytes alone.

Within a file a later line is later, whatever clocks said, so a record's place is the latest time
of the lines up to its own (of several files the earliest such). Where two have one place, the one
whose own time that is comes first, then time, run and content decide. Read again, the lines have
the same places.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from lntune import bounds
from lntune.device import Device
from lntune.log import lines, records


class Line(NamedTuple):
    """A record of a log, as it was written. `content` tells it from others; records of one run that
    have the same `identity` are of one measurement, and it is empty where a record does not say.
    """

    raw: bytes
    content: bytes
    device: Device
    op: str
    role: str
    time: str
    run: str
    identity: bytes
    newer: bool

    @property
    def place(self) -> tuple[str, str]:
        """The folder and the file that it belongs to."""
        path = records.log_path(Path(), self.device, self.op)
        return path.parts[0], path.parts[1]


class Fault(msgspec.Struct, frozen=True):
    """A line that cannot be used, and why."""

    file: str
    line: int
    why: str


class Conflict(msgspec.Struct, frozen=True, order=True):
    """Records that say they are of one measurement, and differ."""

    run: str
    time: str
    what: str
    files: tuple[str, ...]


class _Op(msgspec.Struct):
    op: bounds.Identifier


class _Loose(msgspec.Struct):
    """What there is to know of a record of any schema."""

    case: _Op
    device: Device
    role: bounds.Name = "trial"
    time: bounds.Moment = ""
    run: bounds.Name = ""


_LOOSE = msgspec.json.Decoder(_Loose)


def parsed(raw: bytes) -> Line:
    """What a line holds.

    Raises:
        Exception: it is no record that can be used; one of a newer schema is, as long as it says
            of what it is and of which device.
    """
    newer = False
    try:
        record = records.of_line(raw)
    except records.NewerError as e:
        newer, identity = True, b""
        try:
            loose = _LOOSE.decode(raw)
        except msgspec.ValidationError as wrong:
            raise records.NewerError(f"{e}; {wrong}") from wrong
        device, op = loose.device, loose.case.op
        role, time, run = loose.role, loose.time, loose.run
    else:
        device, op, role = record.device, record.case.op, record.role
        time, run = record.time, record.run
        same = (run, time, role, record.case, device, record.schedule, record.knobs)
        identity = _digest(same) if run and time else b""
    content = _digest(msgspec.json.decode(raw))
    return Line(raw, content, device, op, role, time, run, identity, newer)


def _digest(value: object) -> bytes:
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).digest()


class _Placed(NamedTuple):
    at: str
    line: Line
    files: frozenset[Path]

    @property
    def order(self) -> tuple[str, bool, str, str, bytes]:
        line = self.line
        return self.at, line.time != self.at, line.time, line.run, line.content


class Union:
    """Logs put together, a file at a time. `latest` is the time beyond which a clock was wrong, by
    default a day from now.
    """

    def __init__(self, latest: str = "") -> None:
        self._latest = latest or records.horizon()
        self._placed: dict[bytes, _Placed] = {}
        self._counts: dict[Path, int] = {}
        self.faults: list[Fault] = []

    @property
    def read(self) -> int:
        """Records read, the same ones as often as they came."""
        return sum(self._counts.values())

    def count(self, files: Iterable[Path]) -> int:
        """Records of some files."""
        return sum(self._counts[file] for file in set(files))

    def add(self, file: Path) -> None:
        """Put in the records of a file, once.

        Raises:
            LogError: it cannot be read.
        """
        if file in self._counts:
            return
        found = list(self._usable(file))
        self._counts[file] = len(found)
        moments = records.placed_at((line.time for line in found), self._latest)
        for at, line in zip(moments, found, strict=True):
            before = self._placed.get(line.content)
            if before is None:
                self._placed[line.content] = _Placed(at, line, frozenset({file}))
                continue
            kept = before.line if before.line.raw <= line.raw else line
            self._placed[line.content] = _Placed(min(at, before.at), kept, before.files | {file})

    def _usable(self, file: Path) -> Iterator[Line]:
        for number, raw, fault in lines.of_file(file):
            if fault:
                self.faults.append(Fault(str(file), number, fault))
            elif raw.strip():
                try:
                    yield parsed(raw.strip())
                except Exception as e:
                    why = f"{e}" if isinstance(e, records.NewerError) else f"no usable record: {e}"
                    self.faults.append(Fault(str(file), number, why))

    def lines(self) -> list[Line]:
        """All records, oldest first."""
        return [p.line for p in sorted(self._placed.values(), key=lambda p: p.order)]

    def only_in(self, files: Iterable[Path]) -> int:
        """How many records no other file has."""
        own = set(files)
        return sum(own.issuperset(placed.files) for placed in self._placed.values())

    def conflicts(self) -> list[Conflict]:
        """Records of one measurement that differ; all of them are among `lines`."""
        groups: dict[bytes, list[_Placed]] = {}
        for placed in self._placed.values():
            if placed.line.identity:
                groups.setdefault(placed.line.identity, []).append(placed)
        return sorted(_conflict(group) for group in groups.values() if len(group) > 1)


def _conflict(group: list[_Placed]) -> Conflict:
    record = records.of_line(group[0].line.raw)
    files = tuple(sorted({str(file) for placed in group for file in placed.files}))
    what = f"{record.role} of {record.case}, {record.schedule}"
    return Conflict(record.run, record.time, what, files)


def joined(of: Iterable[Line]) -> bytes:
    """A file's content."""
    return b"".join(line.raw + b"\n" for line in of)
