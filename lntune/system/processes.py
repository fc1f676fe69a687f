"""What a child process has started, wherever it went: found by the temporary folder that all of it
was started with, and ended with it.

Process groups reach what stays in them; what made a session of its own, or lost its parent, is
found by its environment alone, which Linux shows.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")
_SHARED = Path("/dev/shm")
_IN_SHARED = f" {_SHARED}/"
PATIENCE = 10.0
"""Seconds after which processes that cannot be ended are left alone."""


def marked(folder: str) -> list[int]:
    """The processes, but this one, whose temporary folder (TMPDIR) is this or lies in it; those
    that have ended are none. Empty off Linux.
    """
    entry, found = os.fsencode(f"TMPDIR={folder}"), []
    for process in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            environment = (process / "environ").read_bytes()
            if entry in environment and any(
                one == entry or one.startswith(entry + b"/") for one in environment.split(b"\0")
            ):
                found.append(int(process.name))
    return [pid for pid in found if pid != os.getpid()]


def end_marked(folder: str) -> None:
    """End all these processes, and those that they start meanwhile."""
    until = time.monotonic() + PATIENCE
    while folder and (pids := marked(folder)) and time.monotonic() < until:
        # first they start no more, then they end
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                with contextlib.suppress(OSError):
                    os.kill(pid, number)
        time.sleep(0.002)  # they are there until the system has taken them apart


def stopped(pid: int) -> bool:
    """True when a child of this process has stopped (SIGSTOP), or has ended; also where the system
    does not say.
    """
    if not hasattr(os, "waitid"):
        return True
    try:
        states = os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, pid, states) is not None
    except ChildProcessError:
        return True


def tasks(pids: list[int]) -> int:
    """How many threads these processes have."""
    count = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            count += len(list((_PROC / str(pid) / "task").iterdir()))
    return count


class Memory(NamedTuple):
    """Bytes of memory that processes hold and that are in no file of a disk; what several share
    counts once for each.
    """

    own: int
    shared: int


def memory(pids: Iterable[int]) -> Memory:
    """What processes hold now; of those that have ended nothing."""
    counts = {"RssAnon": 0, "RssShmem": 0}
    for pid in pids:
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in (_PROC / str(pid) / "status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in counts:
                    counts[name] += int(value.split()[0]) << 10
    return Memory(counts["RssAnon"], counts["RssShmem"])


def shared_files(pids: Iterable[int]) -> set[str]:
    """The files in shared memory, by name, that processes have open or mapped."""
    names: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for link in (_PROC / str(pid) / "fd").iterdir():
                with contextlib.suppress(OSError):
                    names.add(str(link.readlink()))
            maps = (_PROC / str(pid) / "maps").read_text(errors="replace")
            names |= {line.split(None, 5)[5] for line in maps.splitlines() if _IN_SHARED in line}
    return {Path(n).name for n in names if Path(n).parent == _SHARED}


def remove_shared(pid: int, held: Iterable[str], since: float) -> None:
    """Remove the files of shared memory that a process which has ended has left, ours and not older
    than `since` (as time.time): those that it `held`, unless another process holds them too, and
    those with its number in their names, as libraries give them (torch_PID_...,
    cuda.shm.UID.HEX..., __KMP_REGISTERED_LIB_PID_...). Others may be somebody's.
    """
    others: set[str] | None = None
    with contextlib.suppress(OSError, AttributeError):
        for file in _SHARED.iterdir():
            words = re.split(r"[^0-9A-Za-z]+", file.name)
            if not (file.name in held or str(pid) in words or f"{pid:x}" in words):
                continue
            status = file.lstat()
            if status.st_uid != os.getuid() or status.st_ctime < since:
                continue
            if others is None:
                others = shared_files(int(p.name) for p in _PROC.glob("[0-9]*"))
            if file.name not in others:
                file.unlink()
