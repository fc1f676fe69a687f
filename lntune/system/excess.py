"""Whether a child process takes more of the machine than it can give: memory, processes, the disk
of its temporary folder.

No fixed limit would do: a case may need gigabytes, and address space says nothing where a GPU's
driver reserves terabytes of it. So what is left of the machine is watched, which is cheap, and only
when little is left is it asked who has it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lntune.system import processes

TICK = 0.1
"""Seconds from one look to the next. A look takes some 0.05 ms."""
MEMORY_SHARE, MEMORY_LEAST = 0.05, 256 << 20
"""Of the machine's memory, or of the container's, this much is to be left, in bytes at least."""
DISK_LEAST, DISK_MOST = 256 << 20, 8 << 30
"""Bytes of the disk that are to be left, and that a job may write to its temporary folder."""
TASKS = 512 + 8 * (os.cpu_count() or 1)
"""A job may start so many processes and threads; torch.compile starts one or two for a core."""

_PROC, _GROUPS, _SHARED = Path("/proc"), Path("/sys/fs/cgroup"), Path("/dev/shm")
_FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_SECOND = ("memory.max", "memory.current", "inactive_file")
_UNLIMITED = 1 << 60
_GIB = 1 << 30


class Excess:
    """Watches what a job takes, from its beginning on: of the process `pid` and what it has started
    with the temporary folder `folder`.
    """

    def __init__(self, pid: int, folder: str) -> None:
        self._pid, self._folder, self._groups = pid, folder, _limits()
        self._memory, self._tasks = available(self._groups), all_tasks()
        self._disk = _free(folder)
        self._held, self._shared = processes.memory([pid]), _used(_SHARED)
        total = min([_meminfo("MemTotal"), *(group.limit for group in self._groups)])
        share = MEMORY_SHARE * total if total < math.inf else 0.0
        self._memory_left = min(max(MEMORY_LEAST, share), self._memory / 2)
        self._disk_left = min(DISK_LEAST, self._disk / 2)

    def found(self) -> str:
        """What it has too much of, as the end of a sentence ("took ..."); empty while that is
        nothing, or others have it.
        """
        return self._too_much_memory() or self._too_many_tasks() or self._too_much_disk()

    def _family(self) -> list[int]:
        return sorted({self._pid, *(processes.marked(self._folder) if self._folder else ())})

    def _too_much_memory(self) -> str:
        now = available(self._groups)
        if now >= self._memory_left:
            return ""
        held = processes.memory(self._family())
        taken = held.own - self._held.own + _size(self._folder)  # which may lie in memory
        # files in memory may be mapped, too, or not
        taken += max(held.shared - self._held.shared, _used(_SHARED) - self._shared)
        if taken < (self._memory - now) / 2:
            return ""
        return f"took {taken / _GIB:.1f} GiB of memory, which left {max(now, 0) / _GIB:.1f} GiB"

    def _too_many_tasks(self) -> str:
        if all_tasks() - self._tasks <= TASKS:
            return ""
        count = processes.tasks(self._family())
        return f"started {count} processes and threads" if count > TASKS else ""

    def _too_much_disk(self) -> str:
        free = _free(self._folder)
        if free >= self._disk_left and self._disk - free <= DISK_MOST:
            return ""
        size = _size(self._folder)
        if size <= min(DISK_MOST, (self._disk - free) / 2):
            return ""
        return f"wrote {size / _GIB:.1f} GiB of temporary files, which left {free / _GIB:.1f} GiB"


class Group(NamedTuple):
    """A control group for memory with a limit, of the first version or the second: a container's,
    or one of a batch system.
    """

    folder: Path
    limit: float
    uses: str
    """The name of the file that says how much it uses."""
    files: str
    """The name, in its statistics, of what lies in files that nobody looks at: it can be had."""

    def room(self) -> float:
        """Bytes that it can have still; infinite where it does not say."""
        with contextlib.suppress(OSError, ValueError):
            statistics = (self.folder / "memory.stat").read_text()
            used = int((self.folder / self.uses).read_text())
            return self.limit - used + _field(statistics, f"{self.files} ")
        return math.inf


def available(groups: Sequence[Group]) -> float:
    """Bytes of memory that can be had: of the machine, and of these control groups. Infinite where
    the system does not say.
    """
    return min([_meminfo("MemAvailable"), *(group.room() for group in groups)])


def room() -> float:
    """Bytes of memory that can be had, see `available`."""
    return available(_limits())


def all_tasks() -> int:
    """How many threads the machine has, or this container; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int((_PROC / "loadavg").read_text().split()[3].split("/")[1])
    return 0


def _meminfo(name: str) -> float:
    """Bytes of /proc/meminfo; infinite where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        return _field((_PROC / "meminfo").read_text(), f"{name}:") * 1024.0
    return math.inf


def _field(text: str, name: str) -> int:
    """The number behind a name that begins a line.

    Raises:
        ValueError: there is none.
    """
    return int(f"\n{text}".partition(f"\n{name}")[2].lstrip().partition("\n")[0].partition(" ")[0])


@functools.cache
def _limits() -> list[Group]:
    """The control groups with a limit that this process is in, or a group above it is."""
    groups = []
    with contextlib.suppress(OSError, ValueError):
        for line in (_PROC / "self" / "cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds and "memory" not in kinds.split(","):
                continue
            most, uses, files = _FIRST if kinds else _SECOND
            root = _GROUPS / "memory" if kinds else _GROUPS
            # within a container the path may be one of the machine's, and the root is its own
            inner = root / path.strip("/")
            for folder in (root, *(f for f in (inner, *inner.parents) if root in f.parents)):
                with contextlib.suppress(OSError, ValueError):  # no group, or "max"
                    limit = int((folder / most).read_text())
                    if limit < _UNLIMITED:
                        groups.append(Group(folder, float(limit), uses, files))
    return groups


def _free(folder: str) -> float:
    """Bytes that can be written to a folder's disk; infinite where the system does not say."""
    with contextlib.suppress(OSError, ValueError):
        return float(shutil.disk_usage(folder or ".").free) if folder else math.inf
    return math.inf


def _used(folder: Path) -> int:
    """Bytes that are in use of what a folder lies on, 0 where there is none."""
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).used
    return 0


def _size(folder: str) -> int:
    """Bytes of the files in a folder."""
    size = 0
    with contextlib.suppress(OSError):
        for path in Path(folder).rglob("*") if folder else ():
            with contextlib.suppress(OSError):
                size += path.lstat().st_blocks * 512
    return size
