"""Ctrl-C that waits: a measurement and all that is noted of it are there together, or not at all."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def held() -> Iterator[None]:
    """SIGINT and SIGTERM that have a handler of Python's arrive when the block is over; elsewhere than in the main thread, which they never
    reach, nothing changes.

    For short blocks that put one fact in several places (a log on disk, the counts in memory): an interrupt in the middle would leave
    a trial that is logged and not known to the search, and a case that was measured without a winner.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    before = {number: handler for number in (signal.SIGINT, signal.SIGTERM) if callable(handler := signal.getsignal(number))}
    try:
        for number in before:
            signal.signal(number, lambda *what: came.append(what))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for arrived, frame in came:
            before[signal.Signals(arrived)](arrived, frame)
