"""Who builds a file that several processes of a machine want at once, as those of `torchrun` do:
the first, while the others wait for it and then take what it has built.

Nobody waits for ever: a process that dies gives up its turn, and after LIMIT seconds, when the one
that builds hangs or was stopped, everybody builds for themselves, as where there are no locks. What
is built is put in place whole and is the same whoever builds it, so that this costs time alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from lntune.errors import LntuneError
from lntune.system import paths, trust

LIMIT = 120.0
"""Seconds that others are waited for: a kernel takes some 2, the C++ for autograd some 12, all of
it several times as long where every core has a process of its own that computes.
"""
SAID = 1.0
"""Seconds of waiting after which the logger `lntune` says so."""
_PAUSE = 0.05
_log = logging.getLogger("lntune")


@contextlib.contextmanager
def turn(path: Path) -> Iterator[bool]:
    """In the block no other process of this machine builds the file of the cache that is to have
    this path. The answer is whether another one has put a file there while it was waited for.
    """
    before = _which(path)
    file = None
    with contextlib.suppress(OSError, LntuneError):  # a cache that cannot be written
        name = paths.cached("turns", f"{path.name}.lock")
        trust.make(name.parent)
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if file is None:
        yield False
        return
    try:
        held = _taken(file, path)
        try:
            yield _which(path) not in (None, before)
        finally:
            if held:  # said, since a child that was forked meanwhile has the file open, too
                fcntl.flock(file, fcntl.LOCK_UN)
    finally:
        os.close(file)


def _taken(file: int, path: Path) -> bool:
    """Wait for the lock of an open file, LIMIT seconds at most; whether it is ours. Not filelock's:
    imported by a thread while another forks, it leaves the child waiting for ever.
    """
    begun, said = time.monotonic(), False
    while (waited := time.monotonic() - begun) < LIMIT:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if waited >= SAID and not said:
                said = True
                _log.info("waiting for another process that builds %s", path.name)
        except OSError:  # a file system without such locks
            return False
        time.sleep(_PAUSE)
    _log.warning(
        "another process has been building %s for %.0f s; it is built here as well",
        path.name,
        waited,
    )
    return False


def _which(path: Path) -> tuple[int, ...] | None:
    """Which of all files that had a name is there; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns
