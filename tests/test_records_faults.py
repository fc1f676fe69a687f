"""The tuning log under stress: torn lines, no room, several writers, killed writers. Nothing whole
is ever lost.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import msgspec
import pytest

from lntune.case import Case
from lntune.device import Device
from lntune.errors import LogError
from lntune.log import records
from lntune.log.records import LogWarning, Record, Timing
from lntune.system import locks

ROOT = Path(records.__file__).parents[2]
DEVICE = Device("cpu", "Test CPU", "x86-64-v3", 2)


def a_record(index: int = 0, run: str = "", samples: int = 3) -> Record:
    """A plausible record; `index`, kept in its message, tells it from others, `samples` makes it
    long.
    """
    return Record(
        case=Case("layer_norm", 1024, "float32", 64),
        device=DEVICE,
        threads=2,
        schedule="cached_rows",
        knobs={"lanes": 4, "parallel": True},
        status="ok",
        timings={"tuned": Timing(tuple(float(i) for i in range(1, samples + 1)), 1.0)},
        message=f"record {index}",
        run=run,
    )


def log_of(folder: Path) -> Path:
    """The one log file in the folder."""
    (path,) = folder.glob("*/*.jsonl")
    return path


def test_a_torn_last_line_costs_only_itself(tmp_path: Path) -> None:
    """Cut at any byte of the last record, a log still gives all earlier records, and the next
    append is readable.
    """
    for index in range(3):
        records.append(tmp_path, a_record(index))
    path = log_of(tmp_path)
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        complete = cut == len(whole) - 1  # only the newline is missing: the record is all there
        survivors = ["record 0", "record 1", *(["record 2"] if complete else [])]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LogWarning)
            assert [r.message for r in records.read([tmp_path])] == survivors, cut
            records.append(tmp_path, a_record(9))
            assert [r.message for r in records.read([tmp_path])] == [*survivors, "record 9"], cut


def test_a_torn_last_line_is_reported(tmp_path: Path) -> None:
    """Half a record is skipped with a warning that names file and line."""
    records.append(tmp_path, a_record(0))
    records.append(tmp_path, a_record(1))
    path = log_of(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(LogWarning, match=rf"{path.name}:2: skipped, not a usable record"):
        assert [r.message for r in records.read([tmp_path])] == ["record 0"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """Where the log folder cannot exist the error is a LogError that names it, the reason and the
    remedy.
    """
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "logs"
    with pytest.raises(
        LogError,
        match=(
            rf"cannot append to the tuning log {folder}.*(Not a directory|File exists).*--log-dir"
            r" or LNTUNE_LOG_DIR"
        ),
    ):
        records.append(folder, a_record())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    """A log folder without write permission is a LogError that names it, the reason and the
    remedy.
    """
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(LogError, match=r"Permission denied.*--log-dir or LNTUNE_LOG_DIR"):
            records.append(tmp_path, a_record())
    finally:
        tmp_path.chmod(0o700)


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Within, a write that takes a file of this process beyond `size` bytes is cut there and then
    fails, as on a full disk.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("room", [0, 1, 2, 50, 300])
def test_no_room_for_the_record(tmp_path: Path, room: int, torn: bool) -> None:
    """Where only a part of a record still fits, the log stays as it was to the byte, LogError is
    raised, and the log can be appended to again when there is room.
    """
    records.append(tmp_path, a_record(0))
    path = log_of(tmp_path)
    if torn:
        with path.open("ab") as file:
            file.write(b'{"schema": 1, "ca')
    before = path.read_bytes()
    with (
        files_end_at(len(before) + room),
        pytest.raises(LogError, match="cannot append to the tuning log"),
    ):
        records.append(tmp_path, a_record(1))
    assert path.read_bytes() == before
    records.append(tmp_path, a_record(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LogWarning)
        assert [r.message for r in records.read([tmp_path])] == ["record 0", "record 2"]


def test_a_disk_found_full_when_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that reports a full disk only on fsync leaves the log as it was, too."""
    records.append(tmp_path, a_record(0))
    before = log_of(tmp_path).read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(LogError, match=r"No space left on device.*--log-dir"):
            records.append(tmp_path, a_record(1))
    assert log_of(tmp_path).read_bytes() == before


WRITER = """
import sys, time
from pathlib import Path
import msgspec
from lntune.log import records
from lntune.system import locks
folder, count, who = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
record = msgspec.json.decode(sys.stdin.buffer.read(), type=records.Record)
print("ready", flush=True)
for i in range(count):
    records.append(folder, msgspec.structs.replace(record, run=who, message=f"{i}"))
"""


def start_writer(folder: Path, count: int, who: str, record: Record) -> subprocess.Popen[bytes]:
    """A process that appends the record `count` times, numbered in `message`, signed in `run`."""
    command = [sys.executable, "-c", WRITER, str(folder), str(count), who]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(record))
    process.stdin.close()
    return process


@pytest.mark.parametrize("count", [25, pytest.param(1250, marks=pytest.mark.exhaustive)])
def test_several_processes_append_at_once(tmp_path: Path, count: int) -> None:
    """Eight processes that append to one log lose no record and tear none, and each one's records
    keep their order: of 200, and of 10,000.
    """
    long = a_record(samples=500)
    writers = [start_writer(tmp_path, count, str(who), long) for who in range(8)]
    for writer in writers:
        assert writer.wait(timeout=600) == 0
        assert writer.stdout is not None
        writer.stdout.close()
    back = records.read([tmp_path])
    assert len(back) == 8 * count
    for who in range(8):
        assert [r.message for r in back if r.run == str(who)] == [str(i) for i in range(count)]


def test_appending_waits_for_the_lock(tmp_path: Path) -> None:
    """While another process holds the log's lock nothing is written; once it lets go, the record
    is.
    """
    path = records.log_path(tmp_path, DEVICE, "layer_norm")
    path.parent.mkdir(parents=True)
    with filelock.FileLock(f"{path}.lock"):
        writer = start_writer(tmp_path, 1, "patient", a_record())
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(timeout=0.3)
        assert not path.exists() or path.read_bytes() == b""
    assert writer.wait(timeout=60) == 0
    writer.stdout.close()
    assert [r.run for r in records.read([tmp_path])] == ["patient"]


@pytest.mark.filterwarnings("ignore::lntune.system.locks.LockWarning")
def test_a_lock_that_is_never_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the log's lock is not to be had the record is refused with a LogError that names the
    log, the lock and what to do.
    """
    path = records.log_path(tmp_path, DEVICE, "layer_norm")
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(locks, "LIMIT", 0.0)
    with (
        filelock.FileLock(f"{path}.lock"),
        pytest.raises(
            LogError, match=r"layer_norm\.jsonl: another process has held .*\.lock .*--log-dir"
        ),
    ):
        records.append(tmp_path, a_record())
    assert not path.exists()


def test_a_killed_writer_loses_at_most_one_record(tmp_path: Path) -> None:
    """A writer killed in the middle of its work leaves a log whose whole lines are all records,
    without a gap; the next writer neither waits for a lock nor loses its own record.
    """
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        long = a_record(samples=2000)
        writer = start_writer(folder, 1_000_000, "victim", long)
        assert writer.stdout is not None
        path = records.log_path(folder, DEVICE, "layer_norm")
        while not (path.exists() and path.stat().st_size):
            assert writer.poll() is None
            time.sleep(0.005)
        time.sleep(0.03 + 0.037 * attempt)  # somewhere else in its work each time
        writer.kill()
        writer.wait()
        writer.stdout.close()
        records.append(folder, a_record(run="heir"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            back = records.read([folder])
        assert len(caught) <= 1
        assert back[-1].run == "heir"
        assert len(back) > 1
        assert [r.message for r in back[:-1]] == [str(i) for i in range(len(back) - 1)]
