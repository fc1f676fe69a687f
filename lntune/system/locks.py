"""Locks between processes: who waits says so after a second and gives up after a limit."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lntune.system import callers, interrupts

if TYPE_CHECKING:
    import filelock

WARN_AFTER = 1.0
"""Seconds of waiting after which a warning says so: work under a lock takes milliseconds."""
LIMIT = 60.0
"""Seconds after which waiting ends with an error: the holder was stopped (Ctrl-Z), or hangs on a
file system that is gone.
"""
_PAUSE = 0.02
_NOT_IMPLEMENTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK}
"""What flock says on file systems that have none: some network and FUSE mounts."""


class LockWarning(UserWarning):
    """A lock that is held by another process is waited for."""


class LockedError(OSError):
    """A lock was not given up in time; `strerror` says whose it is and what to do."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """The lock of a file, for as long as the block lasts: "FILE.lock" beside it, which stays there,
    empty, and means nothing by itself.

    Where the file system has no flock the lock is "FILE.lock.held", a file that names its holder's
    process and machine and is there for as long as the lock is held; that of a process that was
    killed is taken over.

    Raises:
        LockedError: another process held it for LIMIT seconds, or an interrupt that is held back
            came while it was waited for.
        OSError: the folder cannot be written.
    """
    lock, name = lock_of(Path(f"{path}.lock"))
    _wait(lock, name)
    try:
        yield
    finally:
        lock.release()


def lock_of(name: Path) -> tuple[filelock.BaseFileLock, Path]:
    """A lock of the name of a file, not taken yet, with the file that it is.

    Raises:
        OSError: the folder cannot be written.
    """
    import filelock  # brings asyncio with it; only writers need it

    if _has_flock(name):
        return filelock.FileLock(name), name
    # Not the same file: an empty one that flock left behind would count as held for ever.
    name = Path(f"{name}.held")
    return filelock.SoftFileLock(name), name


def _wait(lock: filelock.BaseFileLock, name: Path) -> None:
    """Acquire a lock."""
    import filelock

    begun, warned = time.monotonic(), False
    while True:
        try:
            lock.acquire(timeout=0)
            return
        except filelock.Timeout:
            waited = time.monotonic() - begun
        remedy = "End or continue that process (fuser or lsof name it)"
        if name.suffix == ".held":
            remedy = (
                f"End or continue that process, which {name} names,"
                " or delete this file when there is no such process"
            )
        if waited >= LIMIT or (warned and interrupts.waiting()):
            raise LockedError(
                errno.EAGAIN, f"another process has held {name} for {waited:.0f} s. {remedy}"
            )
        if waited >= WARN_AFTER and not warned:
            warned = True
            callers.warn(
                f"waiting for another process that holds {name},"
                f" for {LIMIT:.0f} s at most. {remedy}.",
                LockWarning,
            )
        time.sleep(_PAUSE)


def _has_flock(name: Path) -> bool:
    """True where flock works on a file; it is made where it is not there."""
    try:
        import fcntl
    except ImportError:  # Windows, whose own locks filelock uses
        return True
    descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        return e.errno not in _NOT_IMPLEMENTED
    finally:
        os.close(descriptor)
    return True
