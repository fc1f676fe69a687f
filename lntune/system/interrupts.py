"""Interrupts that arrive when they can be dealt with: Ctrl-C that waits for the end of a block,
SIGTERM and SIGHUP that are as Ctrl-C.
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

_held: list[int] = []
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
        for number, was in before.items():
            signal.signal(number, was)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP that have a handler of Python's arrive when the block is over.

    For short blocks that put one fact in several places (a log on disk, the counts in memory): an
    interrupt in the middle would leave a trial that is logged and not known to the search, and a
    case that was measured without a winner.
    """
    came: list[tuple[_Handler, int, FrameType | None]] = []

    def later(handler: _Handler) -> _Handler:
        def note(number: int, frame: FrameType | None) -> None:
            came.append((handler, number, frame))
            _held.append(number)

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
        del _held[len(_held) - len(came) :]
        for handler, number, frame in came:
            handler(number, frame)


def waiting() -> bool:
    """True while a signal waits for the end of a block: what takes long in one is to be cut
    short.
    """
    return bool(_held)


@contextlib.contextmanager
def as_ctrl_c() -> Iterator[list[int]]:
    """SIGTERM and SIGHUP are KeyboardInterrupts in the block, so that they leave what Ctrl-C
    leaves; the signals that came.

    A signal that this process was started to ignore (nohup) stays ignored.
    """
    came: list[int] = []
    last = -math.inf

    def interrupt(number: int, _: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        came.append(number)
        if last - before >= ONE_MESSAGE:
            raise KeyboardInterrupt

    with _handled(
        {number: interrupt for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN}
    ):
        yield came
