"""What a kernel leaves behind in its process: memory, threads, children, timers, arithmetic that
flushes denormal numbers to zero.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import msgspec

HELD, GROWTH = 6 << 20, 32 << 20
"""Bytes that a process may have taken from the C library and not given back over repeated calls,
and by which it may grow: what an allocator has had before it gives out again, and it keeps some.
"""
KEEPS = "keeps memory"
AT_ONCE = 512 << 20
"""Bytes that a kernel may take and keep in its first calls, for scratch memory."""
SETTLED = 2
"""Calls after which nothing has to be made any more: pools of threads, scratch memory."""


class _Allocated(ctypes.Structure):
    """glibc's struct mallinfo2: ten sizes, of which MAPPED are blocks of their own, and USED the
    others that are in use.
    """

    MAPPED, USED = 4, 7
    _fields_: ClassVar = [("sizes", ctypes.c_size_t * 10)]


def allocated() -> int:
    """Bytes that this process has from the C library's allocator; 0 where that does not say."""
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is None:
        return 0
    function.restype = _Allocated
    sizes = function().sizes
    return int(sizes[_Allocated.MAPPED] + sizes[_Allocated.USED])


class State(msgspec.Struct, frozen=True):
    """What can be seen of a process: resident bytes, those from the C library's allocator, threads,
    children, timers that run.
    """

    bytes: int
    held: int
    threads: int
    children: frozenset[int]
    timers: tuple[bool, ...]


def resident() -> int:
    """Bytes of this process that are in memory; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


class Growth:
    """How much memory is kept of what was called, in all."""

    def __init__(self) -> None:
        self._bytes = 0

    def call(self, function: Callable[..., Any], *arguments: Any) -> str:
        """Call a function; what is wrong when too much is kept by now, else an empty string."""
        before = resident()
        function(*arguments)
        self._bytes += max(0, resident() - before)
        return f"{KEEPS}: {self._bytes >> 20} MB by now" if self._bytes > AT_ONCE else ""


def state() -> State:
    """What can be seen of this process now."""
    status = Path("/proc/self/status")
    fields = (
        dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if status.exists()
        else {}
    )
    children: set[int] = set()
    for task in Path("/proc/self/task").glob("*/children"):
        try:
            children.update(map(int, task.read_text().split()))
        except OSError:  # the thread is gone
            continue
    timers = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
    return State(
        resident(),
        allocated(),
        int(fields.get("Threads", "0")),
        frozenset(children),
        tuple(signal.getitimer(timer)[0] > 0 for timer in timers),
    )


def flushes() -> bool:
    """Whether arithmetic of this thread, or of PyTorch's others, makes denormal numbers zero."""
    import torch

    if torch.full((1,), 1e-310, dtype=torch.float64).item() / 2 == 0:
        return True
    # so many that all threads have some
    return bool((torch.full((1 << 17,), 1e-40) * 0.5 == 0).any())


def restored_denormals() -> bool:
    """Whether denormal numbers are flushed, which then ends: what comes next is not to suffer from
    it.
    """
    import torch

    if not flushes():
        return False
    torch.set_flush_denormal(False)
    return True


def rounds_otherwise() -> bool:
    """Whether arithmetic of this thread, or of PyTorch's others, rounds to other than the nearest
    number: upwards, downwards or to zero.
    """
    import torch

    ones = torch.ones(1 << 17)  # so many that all threads have some
    return bool(((ones + 2.0**-26 != 1) | (ones - 2.0**-26 != 1)).any())


def left(before: State, now: State) -> str:
    """What goes on in a process that did not before; empty where nothing does. Threads do not
    count.
    """
    if more := now.children - before.children:
        return f"left {len(more)} processes behind" if len(more) > 1 else "left a process behind"
    return "left a timer running" if now.timers > before.timers else ""


def watch(call: Callable[[], str], calls: int, before: State) -> str:
    """Call a kernel so often, and say what is wrong: what `call` says, or what the process has that
    it had not `before`, or after the first calls; empty where nothing is.
    """
    settled: State | None = None
    for number in range(calls):
        if message := call():
            return message
        now = state()
        if message := left(before, now):
            return message
        if number == SETTLED:
            settled = now
        elif settled is not None:
            if now.threads > settled.threads + 1:
                return "starts threads at every call"
            held, grown = now.held - settled.held, now.bytes - settled.bytes
            if held > HELD or grown > GROWTH:
                megabytes = max(held, grown) >> 20
                return f"{KEEPS}: {megabytes} MB more after {number - SETTLED} calls"
    return ""
