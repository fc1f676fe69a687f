"""What the system tells of a stretch of time in which something was measured: time that a
hypervisor took, a control group's quota that stopped the process, cores that were slowed for heat,
clocks that changed. Each is a counter or a clock in a file of Linux; where one is not there,
nothing is said of it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

SHORTEST = 0.2
"""Seconds below which nothing is said: counters tick every 10 ms."""
STOLEN = 0.02
"""Share of the cores' time that a hypervisor takes from which on it is said."""
STOPPED = 0.02
"""Share of the time for which a quota stopped the process from which on it disturbs."""
CLOCK_CHANGE = 0.1
"""By how much the quickest core's clock changes, as a share, where that disturbs."""
_STEAL, _FIELDS = 7, 8


class Notice(NamedTuple):
    """Something that happened, in words, and whether what was measured meanwhile holds no more."""

    text: str
    disturbs: bool


class _Reading(NamedTuple):
    """Counters at a moment, None where there are none."""

    at: float
    stolen: tuple[int, int] | None
    """Ticks stolen, and ticks in all."""
    stopped: tuple[int, float] | None
    """How often a quota stopped the process, and for how many seconds."""
    throttled: int | None
    """How often the process's cores were slowed for heat."""
    mhz: float | None


class Surroundings:
    """What the system tells of the time from its creation on; `root` is where its files are."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._groups = _groups(root)
        self._start = self._read()

    def noticed(self) -> list[Notice]:
        """What happened until now; nothing where that was too short to say."""
        start, end = self._start, self._read()
        if end.at - start.at < SHORTEST:
            return []
        return [
            *_stolen(start, end),
            *_stopped(start, end),
            *_throttled(start, end),
            *_clock(start, end),
        ]

    def _read(self) -> _Reading:
        return _Reading(
            time.monotonic(),
            _stolen_ticks(self._root),
            max(filter(None, map(_quota, self._groups)), default=None),
            self._heat(),
            self._mhz(),
        )

    def _heat(self) -> int | None:
        """How often cores of the process, or their packages, were slowed for heat."""
        counts = [
            _number(folder / f"{what}_throttle_count")
            for core in self._cores
            for folder in (self._core(core) / "thermal_throttle",)
            for what in ("core", "package")
        ]
        known = [int(count) for count in counts if count is not None]
        return sum(known) if known else None

    def _mhz(self) -> float | None:
        """The clock of the quickest core: others may have nothing to do."""
        clocks = [_number(self._core(c) / "cpufreq" / "scaling_cur_freq") for c in self._cores]
        return max((khz / 1e3 for khz in clocks if khz), default=None)

    def _core(self, number: int) -> Path:
        return self._root / f"sys/devices/system/cpu/cpu{number}"


def _stolen(start: _Reading, end: _Reading) -> list[Notice]:
    if start.stolen is None or end.stolen is None or end.stolen[1] <= start.stolen[1]:
        return []
    share = (end.stolen[0] - start.stolen[0]) / (end.stolen[1] - start.stolen[1])
    # whether it is too much is reckoned with what others used, see timing.Contention
    return [Notice(f"the hypervisor took {100 * share:.0f} % of the time", False)][
        : share >= STOLEN
    ]


def _stopped(start: _Reading, end: _Reading) -> list[Notice]:
    if start.stopped is None or end.stopped is None:
        return []
    times, seconds = (b - a for a, b in zip(start.stopped, end.stopped, strict=True))
    if times <= 0:
        return []
    text = f"the control group's quota stopped it {times:.0f}x, {seconds:.2f} s"
    return [Notice(text, seconds >= STOPPED * (end.at - start.at))]


def _throttled(start: _Reading, end: _Reading) -> list[Notice]:
    if start.throttled is None or end.throttled is None or end.throttled <= start.throttled:
        return []
    return [Notice(f"cores were slowed for heat {end.throttled - start.throttled}x", True)]


def _clock(start: _Reading, end: _Reading) -> list[Notice]:
    if not start.mhz or not end.mhz:
        return []
    return clock_changed(start.mhz, end.mhz)


def clock_changed(before: float, after: float) -> list[Notice]:
    """What is said of a clock, in MHz, that differs before and after."""
    if abs(after - before) <= CLOCK_CHANGE * max(before, after):
        return []
    return [Notice(f"the clock went from {before:.0f} to {after:.0f} MHz", True)]


def _stolen_ticks(root: Path) -> tuple[int, int] | None:
    try:
        first = (root / "proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
        ticks = [int(tick) for tick in first[1 : 1 + _FIELDS]]
        return ticks[_STEAL], sum(ticks)
    except (OSError, ValueError, IndexError):
        return None


def _groups(root: Path) -> list[Path]:
    """The files that count how often a quota stopped the process: of its control group and those
    above, any of which may have one.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    found = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            found.append(folder / "cpu.stat")
            if folder == top:
                break
    return [file for file in found if file.is_file()]


def _quota(file: Path) -> tuple[int, float] | None:
    """How often and for how many seconds a quota stopped a control group's processes."""
    try:
        words = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
        counts = {name: int(value) for name, value in words}
        # version 2 counts microseconds, version 1 nanoseconds
        seconds = counts["throttled_usec"] / 1e6 if "throttled_usec" in counts else None
        return counts["nr_throttled"], (
            counts["throttled_time"] / 1e9 if seconds is None else seconds
        )
    except (OSError, ValueError, KeyError):
        return None


def _number(file: Path) -> float | None:
    try:
        return float(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
