"""The tuning log: JSON Lines, append-only, one self-describing record per measurement.

"Best" is never stored, only computed on reading. A log is data: reading one never executes anything.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from lntune.case import Case
from lntune.device import Device
from lntune.errors import LogError

SCHEMA = 1
"""Raised when a field changes its meaning; readers skip records of a newer schema and say so."""

STATUSES = ("ok", "invalid", "compile", "run", "wrong", "timeout")
"""ok; knobs that do not fit; failed to build; crashed or raised; answered wrongly; took too long."""


class LogWarning(UserWarning):
    """A line of a tuning log was skipped."""


class Timing(msgspec.Struct, frozen=True):
    """Samples of one contender in microseconds per call, taken interleaved with the others of its record."""

    samples_us: tuple[float, ...]
    median_us: float


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement of one candidate.

    `role` is "trial" (one candidate of a search, timed with its output given) or "final" (the finalist measured again,
    interleaved, on fresh samples, everyone allocating their output as a caller sees it), or "bench" (what serves the case, against everyone).
    `timings` has the key "tuned", and in a final also "default" (the schedule's default knobs), "eager" and "copy".
    `errors` holds, per output, the largest error against float64 in units of the bar (1 is the limit); `versus_eager` the
    largest error on plain random inputs divided by eager's own. `clocks` are a GPU's in MHz before, in and after the
    measurement.
    """

    schema: int = SCHEMA
    role: str = "trial"
    case: Case
    device: Device
    threads: int
    schedule: str
    source: str
    knobs: dict[str, int | bool | str]
    status: str
    message: str = ""
    timings: dict[str, Timing] = {}
    errors: dict[str, float] = {}
    versus_eager: dict[str, float] = {}
    busy: bool = False
    clocks: tuple[int, ...] = ()
    versions: dict[str, str] = {}
    run: str = ""
    time: str = ""

    def __post_init__(self) -> None:
        # What JSON cannot hold would make the line unreadable: infinite errors, and half characters in a foreign message.
        for name in ("errors", "versus_eager"):
            errors: dict[str, float] = getattr(self, name)
            if not all(map(math.isfinite, errors.values())):
                errors = {output: error if math.isfinite(error) else sys.float_info.max for output, error in errors.items()}
                msgspec.structs.force_setattr(self, name, errors)
        if not self.message.isascii():
            msgspec.structs.force_setattr(self, "message", self.message.encode("utf-8", "replace").decode())

    def median(self, contender: str = "tuned") -> float | None:
        """Median of one contender in microseconds, None when it was not measured."""
        timing = self.timings.get(contender)
        return timing.median_us if timing else None


def log_path(folder: Path, device: Device, op: str) -> Path:
    """The file that holds the records of one operator on one device."""
    return folder / device.slug / f"{op}.jsonl"


def append(folder: Path, record: Record) -> None:
    """Add one record to its log: one locked write of one whole line, on disk when this returns.

    A line left unfinished by a process that was killed is closed first, so it spoils nothing but itself.

    Raises:
        LogError: the folder cannot be written, or the disk is full; what was in the log stays as it was.
    """
    import filelock  # brings asyncio with it; only writers need it

    path = log_path(folder, record.device, record.case.op)
    line = msgspec.json.encode(record) + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{path}.lock"), path.open("ab", buffering=0) as file:
            start = file.tell()
            rest = memoryview(b"\n" + line if start and _last_byte(path) != b"\n" else line)
            try:
                while rest:  # unbuffered: a buffer would write its remains once more on closing, behind the truncation
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), start)  # half a record on a full disk is worth nothing
                raise
    except OSError as e:
        remedy = "Choose a writable folder with --log-dir or LNTUNE_LOG_DIR."
        raise LogError(f"cannot append to the tuning log {path}: {e.strerror or e}. {remedy}") from e


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)


def read_file(path: Path, role: str | None = None) -> Iterator[Record]:
    """The records of one file, oldest first; only those of a role where given, which is several times faster.

    A line that cannot be used is skipped with a LogWarning naming it.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        raise LogError(f"cannot read the tuning log {path}: {e.strerror or e}.") from e
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            head = _head(line)
            if head.schema > SCHEMA:
                newer = f"written by a newer lntune (schema {head.schema}, this one reads up to {SCHEMA})"
                warnings.warn(f"{path}:{number}: skipped, {newer}.", LogWarning, stacklevel=2)
                continue
            if role not in (None, head.role):
                continue
            yield msgspec.json.decode(line, type=Record)
        except Exception as e:  # msgspec's errors, and ours from a Case that makes no sense
            warnings.warn(f"{path}:{number}: skipped, not a usable record: {e}", LogWarning, stacklevel=2)


class _Head(msgspec.Struct):
    schema: int
    role: str = "trial"


# How append begins a line. A first call must not wait for a thousand trials to be parsed that it does not look at.
_BEGINNING = re.compile(rb'\{"schema":(\d+),"role":"([^"\\]*)"')


def _head(line: bytes) -> _Head:
    """Schema and role of a line, without parsing the rest where it begins as append writes it."""
    if match := _BEGINNING.match(line):
        return _Head(int(match[1]), match[2].decode())
    return msgspec.json.decode(line, type=_Head)


def read(folders: Iterable[Path], op: str | None = None, device: Device | None = None, role: str | None = None) -> list[Record]:
    """All records of the folders, in the order of the folders; of one operator, one device's folder or one role where given."""
    records: list[Record] = []
    for folder in folders:
        if not folder.is_dir():
            continue
        for path in sorted(folder.glob(f"{device.slug if device else '*'}/{op or '*'}.jsonl")):
            records.extend(read_file(path, role))
    return records


def finals(records: Iterable[Record]) -> dict[tuple[str, int, str, int], Record]:
    """The latest final measurement of each (op, hidden, dtype, row bucket).

    The latest, not the fastest: each final was re-measured against its rivals, and keeping the luckiest of many would
    drift towards outliers.
    """
    latest: dict[tuple[str, int, str, int], Record] = {}
    for record in sorted((r for r in records if r.role == "final" and r.status == "ok" and r.median() is not None), key=lambda r: r.time):
        latest[record.case.op, record.case.hidden, record.case.dtype, record.case.bucket] = record
    return latest
