"""Temporary folders of processes that are killed: everything such a process and its compilers left there goes with the folder."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

SYSTEM = "LNTUNE_SYSTEM_TMPDIR"
"""Environment variable in which a child with a folder of its own finds the system's."""
_PREFIX = "lntune-scratch-"
_YOUNG = 10.0
"""Seconds."""
_INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"


class Scratch:
    """A temporary folder for a child process, kept by this one, which is locked for as long as this process lives: one that was killed
    itself leaves a folder that nobody holds, and the next one that makes one removes it.

    `environment` is what the child is to be started with. Where no folder can be made it is this process's.
    """

    def __init__(self) -> None:
        self.environment = dict(os.environ)
        self._folder, self._lock = "", -1
        with contextlib.suppress(OSError, KeyError):  # KeyError: of a user without a name
            _sweep()
            self._folder = tempfile.mkdtemp(prefix=_PREFIX)
            self._lock = _held(self._folder)
            self.environment |= {"TMPDIR": self._folder, SYSTEM: system()}
            if _INDUCTOR not in os.environ:  # what torch.compile has built is to last; it would lie below TMPDIR
                self.environment[_INDUCTOR] = str(Path(system()) / f"torchinductor_{getpass.getuser()}")

    def remove(self) -> None:
        """Remove the folder with all that is in it; the child has ended."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
        self._folder, self._lock = "", -1


def system() -> str:
    """The system's temporary folder, whichever this process has."""
    return os.environ.get(SYSTEM) or tempfile.gettempdir()


def _held(folder: str) -> int:
    """A descriptor that holds a folder's lock; -1 where somebody else does, or there are no locks."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except (ImportError, OSError):
        return -1
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return -1
    return descriptor


def _sweep() -> None:
    """Remove what killed processes of this user have left; not what was made in the last moments, which is about to be locked."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            found = folder.lstat()
            if found.st_uid != os.getuid() or time.time() - found.st_mtime < _YOUNG or not stat.S_ISDIR(found.st_mode):
                continue
            if (descriptor := _held(str(folder))) >= 0:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(descriptor)
