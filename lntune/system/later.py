"""Retries: when to try again what failed, and which failures may pass, as faults of files do (a
network drive that is away, a full disk).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Later:
    """When something that failed is tried again: after a delay that grows with every failure and
    with the time that trying takes, so that it never costs more than a few per cent.
    """

    FIRST, GROWTH, MOST, COST = 1.0, 4, 3600.0, 20

    def __init__(self) -> None:
        self._at, self._delay = 0.0, self.FIRST / self.GROWTH

    @property
    def due(self) -> bool:
        """True when it is time."""
        return time.monotonic() >= self._at

    def failed(self, seconds: float) -> None:
        """An attempt that took so long has failed."""
        self._delay = min(max(self._delay * self.GROWTH, self.COST * seconds), self.MOST)
        self._at = time.monotonic() + self._delay

    @contextlib.contextmanager
    def trying(self) -> Iterator[None]:
        """The block is an attempt; an exception that leaves it is a failure."""
        begun = time.monotonic()
        try:
            yield
        except BaseException:
            self.failed(time.monotonic() - begun)
            raise


def root(error: BaseException) -> BaseException:
    """What an error goes back to."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    return error


def passes(error: BaseException) -> bool:
    """True for an error that goes back to a fault of files, which may be gone at the next try."""
    return isinstance(root(error), OSError)
