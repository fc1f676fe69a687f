"""Locks between processes: nobody waits in silence or for ever, whatever the file system."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest

from lntune.system import interrupts, locks
from lntune.system.locks import LockedError, LockWarning


class Clock:
    """Seconds that pass while somebody sleeps; `then` is done after so many."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.at = 1e9
        self.then = lambda: None

    def monotonic(self) -> float:
        """Now."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Seconds pass."""
        self.now += seconds
        if self.now >= self.at:
            self.at = 1e9
            self.then()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Nobody really waits."""
    fake = Clock()
    monkeypatch.setattr(locks, "time", fake)
    return fake


@pytest.fixture
def held(tmp_path: Path) -> Iterator[filelock.FileLock]:
    """The lock of tmp_path/"log", held by somebody else."""
    lock = filelock.FileLock(tmp_path / "log.lock")
    with lock:
        yield lock


@pytest.fixture(params=[errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without flock."""

    def flock(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_lock_that_is_free(tmp_path: Path) -> None:
    """It is taken at once and given back; what stays is an empty file."""
    for _ in range(2):
        with locks.locked(tmp_path / "log"), pytest.raises(filelock.Timeout):
            filelock.FileLock(tmp_path / "log.lock").acquire(timeout=0)
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("log.lock", b"")]


def test_waiting_is_announced(tmp_path: Path, clock: Clock, held: filelock.FileLock) -> None:
    """After a second it is said once which lock is waited for and how long, and when it is given up
    the block runs.
    """
    clock.at, clock.then = clock.now + 10, held.release
    with (
        pytest.warns(
            LockWarning, match=r"waiting for .*log\.lock, for 60 s at most.*End or continue"
        ) as caught,
        locks.locked(tmp_path / "log"),
    ):
        assert 10 <= clock.now - 1000 < 11
    assert [w.filename for w in caught] == [__file__]


def test_a_short_wait_is_not_announced(
    tmp_path: Path, clock: Clock, held: filelock.FileLock
) -> None:
    """Other writers that come and go are nobody's business."""
    clock.at, clock.then = clock.now + 0.5, held.release
    with locks.locked(tmp_path / "log"):
        pass  # a LockWarning is an error in tests


@pytest.mark.filterwarnings("ignore::lntune.system.locks.LockWarning")
def test_a_limit(tmp_path: Path, clock: Clock, held: filelock.FileLock) -> None:
    """Who does not get the lock in a minute gets an error that names the file and what to do."""
    with (
        pytest.raises(LockedError, match=r"held .*log\.lock for 60 s\. End or continue"),
        locks.locked(tmp_path / "log"),
    ):
        raise AssertionError("it is held")
    assert 60 <= clock.now - 1000 < 61


@pytest.mark.filterwarnings("ignore::lntune.system.locks.LockWarning")
def test_an_interrupt_that_is_held_back_ends_the_wait(
    tmp_path: Path, clock: Clock, held: filelock.FileLock
) -> None:
    """Ctrl-C in a block that holds it back, while a lock is waited for there, arrives in moments,
    not after the limit.
    """
    clock.at, clock.then = clock.now + 5, lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts.held(), locks.locked(tmp_path / "log"):
        raise AssertionError("it is held")
    assert clock.now - 1000 < 6


def test_a_lock_file_left_behind_where_there_is_no_flock(
    tmp_path: Path, clock: Clock, no_flock: None
) -> None:
    """An empty ".lock" of another time or mount means nothing: the lock is a file of another name,
    which goes with its holder.
    """
    (tmp_path / "log.lock").touch()
    with locks.locked(tmp_path / "log"):
        assert str(os.getpid()) in (tmp_path / "log.lock.held").read_text()
    assert clock.now == 1000
    assert [f.name for f in tmp_path.iterdir()] == ["log.lock"]


def test_two_processes_where_there_is_no_flock(
    tmp_path: Path, clock: Clock, no_flock: None
) -> None:
    """The lock of a process that lives is respected, and the error names the file that says whose
    it is; that of one that was killed is taken over.
    """
    name = tmp_path / "log.lock.held"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        name.write_text(f"{other.pid}\n{socket.gethostname()}\n")
        with (
            pytest.warns(LockWarning),
            pytest.raises(LockedError, match=r"which .*log\.lock\.held names, or delete"),
            locks.locked(tmp_path / "log"),
        ):
            raise AssertionError("it is held")
        other.kill()
    with locks.locked(tmp_path / "log"):
        assert str(os.getpid()) in name.read_text()
    assert not name.exists()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    """Is an OSError as of any file."""
    with pytest.raises(FileNotFoundError), locks.locked(tmp_path / "none" / "log"):
        pass
