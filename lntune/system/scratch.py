"""Temporary folders and half-written files that processes leave behind when they are killed, and
how they are removed: at once where the process was somebody's child, else by the next process that
makes such a thing.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import glob
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from lntune.system import trust

SYSTEM = "LNTUNE_SYSTEM_TMPDIR"
"""Environment variable in which a child with a folder of its own finds the system's."""
ABANDONED = 3600.0
"""Seconds after which a half-written file that nobody has written to, and whose process cannot be
looked at (it ran on another machine, or in another container), is thought to be left behind.
"""
_PREFIX = "lntune-scratch-"
_INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"
_ALSO = "also-"
"""Links of this name in a folder lead to files that go with it."""
_UNNAMED = re.compile(r"\..+\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)\.\d+(\.\w+)?")


_TIDIER = """
while read -r group; do [ -z "$group" ] || last=$group; done
[ -z "$last" ] || kill -9 "-$last"
for again in 1 2; do
  for process in $(grep -lsF -- "TMPDIR=$0" /proc/[0-9]*/environ); do
    process=${process#/proc/}
    kill -9 "${process%/environ}"
  done
done
for link in "$0"/also-*; do
  file=$(readlink "$link") && rm -f -- "${file%.*}".*
done
rm -rf -- "$0"
"""
"""Waits until nobody holds the other end of its standard input, on which it is told of process
groups, ends the last of these and what has left it (see `processes`), and removes its folder and
the files that go with it.
"""


class Scratch:
    """A temporary folder for a child process, kept by this one. When this one is killed a shell
    ends the child with all it has started and removes the folder; where that was killed too, the
    next process that makes a folder does: a lock says whether somebody holds it.

    `environment` is what to start the child with; this process's where no folder can be made.
    """

    def __init__(self) -> None:
        self.environment = dict(os.environ)
        self._folder, self._lock = "", -1
        self._tidier: subprocess.Popen[bytes] | None = None
        self._taken: list[Path] = []
        with contextlib.suppress(OSError, KeyError):  # KeyError: of a user without a name
            _sweep()
            self._folder, self._lock = _new_folder()
            self.environment |= {"TMPDIR": self._folder, SYSTEM: system()}
            # what torch.compile has built is to last; it would lie below TMPDIR
            if _INDUCTOR not in os.environ:
                built = Path(system()) / f"torchinductor_{getpass.getuser()}"
                self.environment[_INDUCTOR] = str(built)
            self._tidier = subprocess.Popen(
                ["/bin/sh", "-c", _TIDIER, self._folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # what is sent to this process's group is not for it
            )

    @property
    def folder(self) -> str:
        """The folder, empty where none could be made."""
        return self._folder

    def serves(self, group: int) -> None:
        """The child leads this process group, which is to end when this process is killed."""
        if self._tidier and self._tidier.stdin:
            with contextlib.suppress(OSError):
                self._tidier.stdin.write(b"%d\n" % group)
                self._tidier.stdin.flush()

    def takes(self, path: Path) -> None:
        """A file that the child makes elsewhere goes too when this process is killed, and so do
        those that differ from it in the suffix alone.
        """
        if self._folder:
            self._taken.append(_linked(path, self._folder))

    def remove(self) -> None:
        """Remove the folder with all that is in it, and what the child, which has ended, was making
        in the cache (see `whole`).
        """
        if self._tidier:
            self._tidier.kill()
            self._tidier.communicate()
        for link in self._taken:
            link.unlink(missing_ok=True)
        if self._folder:
            _remove(Path(self._folder))
        if self._lock >= 0:
            os.close(self._lock)
        self._folder, self._lock, self._tidier = "", -1, None


def system() -> str:
    """The system's temporary folder, whichever this process has."""
    return os.environ.get(SYSTEM) or tempfile.gettempdir()


@contextlib.contextmanager
def whole(path: Path, closed: bool = False) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when the block ends well and vanishes when
    it does not. Files beside it that differ in the suffix alone are temporary too. `closed`: others
    cannot write to the file and the folders made for it, unless these are shared, see `trust`.

    Where it cannot take the name because another process has put its own file there in the
    meantime, that one stays: it has the same name because it is made of the same.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    temporary = path.with_name(
        f".{path.name}.{_host()}-{os.getpid()}.{threading.get_ident()}{path.suffix}"
    )
    link = None
    try:
        if closed:
            trust.make(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        before = _which(path)
        _sweep_unnamed(path)
        if SYSTEM in os.environ:  # a child's, whose folder it is to go with
            link = _linked(temporary, os.environ["TMPDIR"])
        temporary.touch()  # what cannot be stored need not be made
        yield temporary
        if closed:
            trust.close(temporary)
        try:
            temporary.replace(path)
        except OSError:
            if _which(path) in (None, before):
                raise
    finally:
        for leftover in filter(None, (temporary, link)):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)


def _linked(path: Path, folder: str) -> Path:
    """A link in a folder to a file that goes with it."""
    link = Path(folder, f"{_ALSO}{path.name}")
    with contextlib.suppress(OSError):
        link.symlink_to(path.absolute())
    return link


def _new_folder() -> tuple[str, int]:
    """A new folder, and the descriptor that holds its lock, -1 where there are no locks."""
    while True:
        folder = tempfile.mkdtemp(prefix=_PREFIX)
        # another process thought it left, and removes it
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            lock = _held(folder)
            if lock < 0 or Path(folder).exists():
                return folder, lock
            os.close(lock)


def _held(folder: str) -> int:
    """A descriptor that holds a folder's lock, -1 where there are no locks.

    Raises:
        BlockingIOError: another process holds it.
        OSError: there is no such folder.
    """
    try:
        import fcntl
    except ImportError:
        return -1
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(descriptor)
        if isinstance(e, BlockingIOError):
            raise
        return -1
    return descriptor


def _sweep() -> None:
    """Remove the folders that killed processes of this user have left."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            own = status.st_uid == os.getuid() and stat.S_ISDIR(status.st_mode)
            if own and (descriptor := _held(str(folder))) >= 0:
                _remove(folder)
                os.close(descriptor)


def _remove(folder: Path) -> None:
    """Remove a folder and the files that go with it."""
    for link in folder.rglob(f"{_ALSO}*"):
        with contextlib.suppress(OSError):
            temporary = link.readlink()
            for leftover in temporary.parent.glob(f"{glob.escape(temporary.stem)}.*"):
                leftover.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _host() -> str:
    """The machine, and on it the container, on which a process id means one process."""
    names = [platform.node()]
    with contextlib.suppress(OSError):
        names.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256(repr(names).encode()).hexdigest()[:8]


def _sweep_unnamed(path: Path) -> None:
    """Remove the temporary files beside `path` that processes which were killed have left."""
    host = _host()
    for other in path.parent.iterdir():
        parts = _UNNAMED.fullmatch(other.name)
        if parts or other.name.startswith(f".{path.name}."):
            with contextlib.suppress(OSError):
                dead = parts is not None and parts["host"] == host and not _alive(int(parts["pid"]))
                if dead or time.time() - other.stat().st_mtime > ABANDONED:
                    other.unlink()


def _alive(pid: int) -> bool:
    """True when there is such a process on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True


def _which(path: Path) -> tuple[int, ...] | None:
    """Which of all files that had a name is there; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns
