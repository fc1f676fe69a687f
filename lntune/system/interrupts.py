"""When a process is told to end: Ctrl-C that waits for the end of a block, SIGTERM and SIGHUP that
are treated as Ctrl-C.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_Handler = Callable[[int, FrameType | None], Any]

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""What ends a process from outside: a batch system, `timeout`, a machine that goes away; a terminal
that is closed.
"""
ONE_MESSAGE = 1.0
"""Seconds in which several of these are one: `timeout` sends SIGTERM to the process and to its
group, a closed terminal SIGHUP twice.
"""

_pending: list[int] = []
"""Signals that wait for the end of a block."""


@contextlib.contextmanager
def _handled(handlers: dict[signal.Signals, _Handler]) -> Iterator[None]:
    """Signals have other handlers in the block; elsewhere than in the main thread, which no signal
    of Python's reaches, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in handlers}
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP that have a handler of Python's arrive when the block is over.

    For short blocks that put one fact in several places (a log on disk, the counts in memory): an
    interrupt in the middle would leave a trial that is logged and not known to the search, and a
    case that was measured without a winner.
    """
    deliveries: list[tuple[_Handler, int, FrameType | None]] = []

    def later(handler: _Handler) -> _Handler:
        def note(number: int, frame: FrameType | None) -> None:
            deliveries.append((handler, number, frame))
            _pending.append(number)

        return note

    ours = {
        number: handler
        for number in (signal.SIGINT, *ENDING)
        if callable(handler := signal.getsignal(number))
    }
    try:
        with _handled({number: later(handler) for number, handler in ours.items()}):
            yield
    finally:
        del _pending[len(_pending) - len(deliveries) :]
        for handler, number, frame in deliveries:
            handler(number, frame)


def waiting() -> bool:
    """True while a signal waits for the end of a block; what takes long there is cut short."""
    return bool(_pending)


@contextlib.contextmanager
def as_ctrl_c() -> Iterator[list[int]]:
    """SIGTERM and SIGHUP are KeyboardInterrupts in the block, so that they leave what Ctrl-C
    leaves; the signals that came.

    A signal that this process was started to ignore (nohup) stays ignored.
    """
    received: list[int] = []
    last = -math.inf

    def interrupt(number: int, _: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        received.append(number)
        if last - before >= ONE_MESSAGE:
            raise KeyboardInterrupt

    heeded = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    with _handled(dict.fromkeys(heeded, interrupt)):
        yield received
