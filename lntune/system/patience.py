"""Whether a child process that has used up its time may have more, because others took its cores.

A time limit is to find what hangs, and on a loaded machine what works takes as long. What hangs
either computes, and then its busiest thread has the time of the limit in CPU time, or sleeps while
cores are idle.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

MOST = 4.0
"""How many times its limit a child may take at most."""
IDLE = 0.5
"""Cores that are idle on average on a machine on which nobody waits for one."""
DONE = 0.9
"""This share of the limit in CPU time is all of it: threads that compute are interrupted too."""

_PROC = Path("/proc")


class Starvation:
    """Looks at a process, what it has started, and the machine, from its creation on."""

    def __init__(self, pid: int, proc: Path = _PROC) -> None:
        self._pid, self._proc = pid, proc
        self._begun = time.monotonic()
        self._idle = self._idle_seconds()
        self._used = self._threads()

    def starved(self, limit: float) -> bool:
        """True when others kept the process from computing for as many seconds as it may take;
        False where the system does not say.
        """
        wall, idle = time.monotonic() - self._begun, self._idle_seconds()
        if idle is None or self._idle is None or wall <= 0 or (idle - self._idle) / wall >= IDLE:
            return False
        used = self._threads()
        busiest = max((s - self._used.get(thread, 0.0) for thread, s in used.items()), default=None)
        return busiest is not None and busiest < DONE * limit

    def _idle_seconds(self) -> float | None:
        """Seconds that cores had nothing to do since the machine started; None off Linux."""
        try:
            ticks = (self._proc / "stat").read_text().split("\n", 1)[0].split()[4]
            return int(ticks) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError):
            return None

    def _threads(self) -> dict[str, float]:
        """CPU seconds of each thread of the process and of those it has started."""
        seconds: dict[str, float] = {}
        processes = [str(self._pid)]
        while processes:
            for thread in (self._proc / processes.pop() / "task").glob("*"):
                with contextlib.suppress(OSError, ValueError, IndexError):  # it may have ended
                    fields = (thread / "stat").read_text().rpartition(")")[2].split()
                    ticks = int(fields[11]) + int(fields[12])
                    seconds[thread.name] = ticks / os.sysconf("SC_CLK_TCK")
                    processes += (thread / "children").read_text().split()
        return seconds
