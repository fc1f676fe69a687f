"""The tuning log: files of JSON lines to which each measurement adds one record that says all there
is to know about it.

Nothing is ever changed or removed. "Best" is never stored, only computed on reading. A log is data:
reading one never executes anything.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeAlias, get_args

import msgspec

from lntune import bounds
from lntune.case import Case
from lntune.device import Device
from lntune.errors import InputError, LogError, got_expected
from lntune.knobs import Value
from lntune.log import disturbance, lines
from lntune.log.decision import Decision
from lntune.system import callers, locks
from lntune.versions import Code, of_hash

SCHEMA = 3
"""Raised when a field changes its meaning; readers skip records of a newer schema and say so. Since
2 `busy` may be null; since 3 `code` has versions where `source` was a hash of files.
"""
AHEAD = datetime.timedelta(days=1)
"""How far a record's time may lie in the future before it is thought to be of a wrong clock."""

Status = Literal["ok", "invalid", "compile", "run", "wrong", "timeout"]
"""What came of a measurement: ok; knobs that do not fit; failed to build; crashed or raised;
answered wrongly; took too long.
"""

Role = Literal[
    "trial",
    "final",
    "comparison",
    "bench",
    "bench-given-output",
    "bench-strided",
    "bench-training",
]
"""What a measurement was for: one candidate of a search, timed with its output given; the finalists
measured again, interleaved, on fresh samples, everyone allocating their output as a caller sees it;
the same of what was to be compared, whatever serves the case; what serves the case against
everyone; the same with outputs given, with rows that lie apart, and as steps of training.
"""


class Key(NamedTuple):
    """What a record of a device is of, and what calls are served by: any number of rows of a
    bucket, any variant.
    """

    op: str
    hidden: int
    dtype: str
    bucket: int

    @classmethod
    def of(cls, case: Case) -> Key:
        """The key that a case falls under."""
        return cls(case.op, case.hidden, case.dtype, case.bucket)


class LogWarning(UserWarning):
    """A line of a tuning log was skipped."""


class Timing(msgspec.Struct, frozen=True):
    """Samples of one contender in microseconds per call, taken interleaved with the others of its
    record.
    """

    samples_us: Annotated[tuple[bounds.Microseconds, ...], bounds.SAMPLES]
    median_us: bounds.Microseconds


Knobs: TypeAlias = Annotated[dict[bounds.Name, Value], bounds.FEW]
Errors: TypeAlias = Annotated[dict[bounds.Name, bounds.Error], bounds.FEW]
Timings: TypeAlias = Annotated[dict[bounds.Name, Timing], bounds.FEW]


class Setting(msgspec.Struct, frozen=True):
    """A schedule and its knobs."""

    schedule: bounds.Name
    knobs: Knobs


class Rival(msgspec.Struct, frozen=True):
    """A finalist that did not win; its samples are of the same rounds as those of the record that
    it is in. `errors`, `versus_eager` and `instructions` are like the record's, `cold` and `warm`
    what its mappings of these names would hold of it.
    """

    schedule: bounds.Name
    knobs: Knobs
    timing: Timing
    code: Code = Code()
    errors: Errors = {}
    versus_eager: Errors = {}
    instructions: bounds.Error | None = None
    cold: Timing | None = None
    warm: Timing | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement of one candidate.

    `timings` has the key "tuned", in a final and in a CPU's trial also "default" (what serves the
    case where nothing is tuned: `default`; see pace.py), in a final "eager" and "copy"; `rivals`
    are the other finalists. `errors` holds, per output, the largest error against float64 as a
    share of the tolerance (1 is the limit); `versus_eager` the largest error on plain random inputs
    divided by eager's own. `busy` is True when other work disturbed the measurement, False when it
    did not, None when that is not known. `clocks` are a GPU's in MHz before, in and after the
    measurement. `instructions` are those that threads issue for an element of a row, read off the
    compiled code; None where they are not known (on CPUs, and of kernels that were not built
    ahead).

    A final's `timings` are of a warm cache on CPUs, and `cold` has the same contenders with inputs
    and outputs that no cache holds; on GPUs they are of a cold one, and `warm` has the others. A
    timing there without samples is that of `timings`: the case is beyond the cache. `decision` says
    how certain the winner is. `training`, of a backward's final, has "tuned" and "eager" of a step
    of training, forward and backward as autograd runs them; the kernel of its forward is `forward`.
    `noticed` is what the system told of the time of the measurement: of stolen time, quotas, heat
    and clocks, in words.
    """

    schema: int = SCHEMA
    role: Role = "trial"
    case: Case
    device: Device
    threads: bounds.Count
    schedule: bounds.Name
    code: Code = Code()
    knobs: Knobs
    status: Status
    message: bounds.Sentence = ""
    timings: Timings = {}
    errors: Errors = {}
    versus_eager: Errors = {}
    busy: bool | None = None
    default: Setting | None = None
    rivals: Annotated[tuple[Rival, ...], bounds.FEW] = ()
    clocks: Annotated[tuple[bounds.Count, ...], bounds.FEW] = ()
    instructions: bounds.Error | None = None
    cold: Timings = {}
    warm: Timings = {}
    training: Timings = {}
    forward: Setting | None = None
    decision: Decision | None = None
    noticed: Annotated[tuple[bounds.Sentence, ...], bounds.FEW] = ()
    versions: Annotated[dict[bounds.Name, bounds.Name], bounds.FEW] = {}
    run: bounds.Name = ""
    time: bounds.Moment = ""

    def __post_init__(self) -> None:
        # What JSON cannot hold would make the line unreadable: infinite errors, and half characters
        # in a foreign message.
        for name in ("errors", "versus_eager"):
            errors: dict[str, float] = getattr(self, name)
            if not all(map(math.isfinite, errors.values())):
                errors = {
                    output: error if math.isfinite(error) else sys.float_info.max
                    for output, error in errors.items()
                }
                msgspec.structs.force_setattr(self, name, errors)
        if not self.message.isascii():
            msgspec.structs.force_setattr(
                self, "message", self.message.encode("utf-8", "replace").decode()
            )

    def median(self, contender: str = "tuned") -> float | None:
        """Median of one contender in microseconds, None when it was not measured."""
        timing = self.timings.get(contender)
        return timing.median_us if timing else None

    @property
    def disturbance(self) -> str:
        """What shows that the measurement was disturbed, so that neither its times nor their ratios
        hold; empty when nothing does.
        """
        if self.busy:
            return "; ".join(self.noticed) or "others used the machine"
        return disturbance.why(
            {n: t.samples_us for n, t in self.timings.items()},
            {n: t.median_us for n, t in self.timings.items()},
        )

    @property
    def key(self) -> Key:
        """What the record is of."""
        return Key.of(self.case)


def log_path(folder: Path, device: Device, op: str) -> Path:
    """The file that holds the records of one operator on one device.

    Raises:
        InputError: the operator's is no name.
    """
    if not op.isidentifier():
        raise InputError(got_expected("op", repr(op), "a name of letters, digits and _"))
    return folder / device.slug / f"{op}.jsonl"


def append(folder: Path, record: Record) -> None:
    """Add one record to its log: one locked write of one whole line, on disk when this returns.

    A line left unfinished by a process that was killed is closed first, so it spoils nothing but
    itself.

    Raises:
        LogError: the folder cannot be written, the disk is full, or another process does not give
            up the log's lock; what was in the log stays as it was.
    """
    path = log_path(folder, record.device, record.case.op)
    line = msgspec.json.encode(record) + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locks.locked(path), path.open("ab", buffering=0) as file:
            start = file.tell()
            unwritten = memoryview(b"\n" + line if start and _last_byte(path) != b"\n" else line)
            try:
                # unbuffered: a buffer would write its remains once more on closing, behind the
                # truncation
                while unwritten:
                    unwritten = unwritten[file.write(unwritten) :]
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    # half a record on a full disk is worth nothing
                    os.ftruncate(file.fileno(), start)
                raise
    except locks.LockedError as e:
        raise LogError(
            f"cannot append to the tuning log {path}: {e.strerror}, or choose another folder with"
            " --log-dir."
        ) from e
    except OSError as e:
        remedy = "Choose a writable folder with --log-dir or LNTUNE_LOG_DIR."
        raise LogError(
            f"cannot append to the tuning log {path}: {e.strerror or e}. {remedy}"
        ) from e


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)


def read_file(path: Path, role: Role | tuple[Role, ...] = ()) -> Iterator[Record]:
    """The records of one file, oldest first; only those of a role (or of several) where given,
    which is several times faster.

    A line that cannot be used is skipped with a LogWarning naming it.
    """
    roles = (role,) if isinstance(role, str) else role
    others = _beginnings(r for r in get_args(Role) if roles and r not in roles)
    for number, line, fault in lines.of_file(path):
        if fault:
            callers.warn(f"{path}:{number}: skipped, {fault}.", LogWarning)
            continue
        if line.startswith(others) or not line.strip():
            continue
        try:
            head = _head(line)
            if roles and head.role not in roles and head.schema <= SCHEMA:
                continue
            yield of_line(line)
        except NewerError as e:
            callers.warn(f"{path}:{number}: skipped, {e}.", LogWarning)
        except Exception as e:  # msgspec's errors, and ours from a Case that makes no sense
            callers.warn(f"{path}:{number}: skipped, not a usable record: {e}", LogWarning)


class NewerError(LogError):
    """A record is of a newer schema."""


def of_line(line: bytes) -> Record:
    """The record of a line.

    Raises:
        NewerError: it is of a newer schema.
        ValueError, RecursionError: it is no record, or holds what none may.
    """
    schema = _head(line).schema
    if schema > SCHEMA:
        raise NewerError(
            f"written by a newer lntune (schema {schema}, this one reads up to {SCHEMA})"
        )
    record = _DECODER.decode(line)
    return record if schema >= _VERSIONS else _with_versions(record, line)


_DECODER = msgspec.json.Decoder(Record)
_VERSIONS = 3  # the schema that has them


class _Source(msgspec.Struct):
    source: str = ""


def _with_versions(record: Record, line: bytes) -> Record:
    """A record of an earlier schema with the versions that its hash of source files stood for."""
    return msgspec.structs.replace(
        record, code=of_hash(msgspec.json.decode(line, type=_Source).source)
    )


class _Head(msgspec.Struct):
    schema: int
    role: str = "trial"


def _beginnings(roles: Iterable[str]) -> tuple[bytes, ...]:
    """How append, or that of an earlier schema, begins a line of one of the roles. A first call
    must not wait for a thousand trials to be parsed that it does not look at, nor a report for a
    hundred thousand.
    """
    return tuple(
        b'{"schema":%d,"role":"%s"' % (schema, role.encode())
        for role in roles
        for schema in range(SCHEMA + 1)
    )


_BEGINNING = re.compile(rb'\{"schema":(\d+),"role":"([^"\\]*)"')


def _head(line: bytes) -> _Head:
    """Schema and role of a line, without parsing the rest where it begins as append writes it."""
    if match := _BEGINNING.match(line):
        return _Head(int(match[1]), match[2].decode())
    return msgspec.json.decode(line, type=_Head)


def read(
    folders: Iterable[Path],
    op: str | None = None,
    device: Device | None = None,
    role: Role | tuple[Role, ...] = (),
    now: str | None = None,
) -> list[Record]:
    """All records of the folders as one list, oldest first (see `merged`, also for `now`); of one
    operator or role, or those that may serve a device, where given.
    """
    logs = []
    for folder in folders:
        for name in device.folders if device else ("*",):
            logs += [list(read_file(path, role)) for path in files(folder, name, op or "*")]
    records = merged(logs, now)
    return records if device is None else [r for r in records if not device.differences(r.device)]


def files(folder: Path, device: str = "*", op: str = "*") -> list[Path]:
    """The logs of a folder, of one device's folder or one operator where given; none that is being
    written to take the place of another.
    """
    found = folder.glob(f"{device}/{op}.jsonl")
    return sorted(path for path in found if not path.name.startswith("."))


def merged(logs: Iterable[Sequence[Record]], now: str | None = None) -> list[Record]:
    """The records of several files as one list, oldest first, whatever clocks said when they were
    written.

    Within a file lines are appended: the later one is later. Between files the times decide, but a
    time that lies more than AHEAD after `now` (UTC, ISO 8601; by default this machine's) is that of
    a wrong clock, and its record counts as written right after the one before it.
    """
    latest = horizon(now)
    placed: list[tuple[str, tuple[str, str], int, Record]] = []
    for log in logs:
        moments = placed_at((record.time for record in log), latest)
        for number, (at, record) in enumerate(zip(moments, log, strict=True)):
            # at one time: by file, in whatever order files are read
            placed.append((at, (log[-1].time, log[-1].run), number, record))
    return [record for *_, record in sorted(placed, key=lambda p: p[:3])]


def placed_at(times: Iterable[str], latest: str) -> Iterator[str]:
    """When each line of a file was written, given the times that lines have, first to last: no
    line before the one above it, and none after `latest`.
    """
    at = ""
    for time in times:
        if at < time <= latest:
            at = time
        yield at


def horizon(now: str | None = None) -> str:
    """The latest time that a record may plausibly have."""
    clock = (
        datetime.datetime.now(datetime.timezone.utc)
        if now is None
        else datetime.datetime.fromisoformat(now)
    )
    return (clock + AHEAD).isoformat(timespec="milliseconds")


def by_device(records: Iterable[Record]) -> list[list[Record]]:
    """Records by the device they were measured on, in the order given; old ones may have a folder's
    name in common and differ.
    """
    groups: list[list[Record]] = []
    known: dict[Device, list[Record]] = {}
    for record in records:
        if record.device not in known:
            known[record.device] = _group(groups, record.device)
        known[record.device].append(record)
    return groups


def _group(groups: list[list[Record]], device: Device) -> list[Record]:
    """The group of a device's records; a new one, which is added, where it has none."""
    for group in groups:
        other = group[0].device
        if other.slug == device.slug and not other.differences(device):
            return group
    groups.append([])
    return groups[-1]


def measured(records: Iterable[Record]) -> dict[Key, list[Record]]:
    """The final measurements of each case, in the order given."""
    groups: dict[Key, list[Record]] = {}
    for record in records:
        if record.role == "final" and record.status == "ok" and record.median() is not None:
            groups.setdefault(record.key, []).append(record)
    return groups


def finals(records: Iterable[Record]) -> dict[Key, Record]:
    """The final that counts of each case: the latest that was not disturbed, where all were the
    latest. `records` as `read` gives them, oldest first. Whether today's schedules can use it is
    another question, see `select.served`.

    The latest, not the fastest: each final was re-measured against its rivals, and keeping the
    luckiest of many would drift towards outliers.
    """
    return {key: preferred(group) for key, group in measured(records).items()}


def preferred(records: Sequence[Record]) -> Record:
    """Of several records, oldest first, the latest that was not disturbed; where all were, the
    latest.
    """
    return next(
        (r for r in reversed(records) if len(records) == 1 or not r.disturbance), records[-1]
    )
