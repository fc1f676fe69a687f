"""Interrupts that arrive when they can be dealt with: Ctrl-C that waits for the end of a block, SIGTERM that is as Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_Handler = Callable[[int, FrameType | None], Any]


@contextlib.contextmanager
def _handled(handlers: dict[signal.Signals, _Handler]) -> Iterator[None]:
    """Signals have other handlers in the block; elsewhere than in the main thread, which no signal of Python's reaches, nothing changes."""
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
    """SIGINT and SIGTERM that have a handler of Python's arrive when the block is over.

    For short blocks that put one fact in several places (a log on disk, the counts in memory): an interrupt in the middle would leave
    a trial that is logged and not known to the search, and a case that was measured without a winner.
    """
    came: list[tuple[_Handler, int, FrameType | None]] = []

    def later(handler: _Handler) -> _Handler:
        return lambda number, frame: came.append((handler, number, frame))

    ours = {number: handler for number in (signal.SIGINT, signal.SIGTERM) if callable(handler := signal.getsignal(number))}
    try:
        with _handled({number: later(handler) for number, handler in ours.items()}):
            yield
    finally:
        for handler, number, frame in came:
            handler(number, frame)


@contextlib.contextmanager
def by_sigterm() -> Iterator[None]:
    """SIGTERM is a KeyboardInterrupt in the block, so that `timeout` and a machine that goes away leave what Ctrl-C leaves."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with _handled({signal.SIGTERM: interrupt}):
        yield
