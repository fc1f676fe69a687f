"""How long a search may go on: seconds, trials, or both."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from lntune.errors import InputError, got_expected

Evaluate = Callable[[Any], float]
"""Takes a candidate, returns its cost in microseconds, `math.inf` when it failed. It counts its own
trial in the budget.
"""


class Budget:
    """A limit in seconds from now, in trials, in both (whichever ends first), or none.

    Args:
        seconds: wall time from the moment the budget is made; None for no limit.
        trials: number of candidates to try; None for no limit.
        reserve: seconds at the end of `seconds` that are kept for something else, as things stand
            when it is called; infinitely less than none for as long as time is no limit yet.
        clock: seconds that never run backwards; tests pass their own.

    Raises:
        InputError: a negative limit, or one that is not a number.
    """

    def __init__(
        self,
        seconds: float | None = None,
        trials: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        reserve: Callable[[], float] = lambda: 0.0,
    ) -> None:
        for name, limit in (("seconds", seconds), ("trials", trials)):
            if limit is not None and not limit >= 0:  # so written, NaN is refused too
                raise InputError(
                    got_expected(name, limit, "0 or more", "Leave it out for no limit.")
                )
        self._seconds = seconds
        self._trials = trials
        self._clock = clock
        self._reserve = reserve
        self._start = clock()
        self.trials_done = 0
        """Trials counted so far."""
        self.part = 1.0
        """The part of it that may be used; less while some is kept for what comes last."""

    def count(self) -> None:
        """Records one trial."""
        self.trials_done += 1

    @property
    def spent(self) -> bool:
        """True when no further trial may start. A trial in flight is not cut short by this."""
        return self.fraction >= self.part

    @property
    def trials_left(self) -> float:
        """Trials that may start, one at least; infinitely many where they are no limit."""
        if self._trials is None:
            return math.inf
        return max(1, math.ceil(self._trials * self.part) - self.trials_done)

    @property
    def seconds_left(self) -> float:
        """Seconds until it is spent; infinite where time is no limit."""
        if self._seconds is None:
            return math.inf
        seconds = self._seconds - self._reserve()
        if not math.isfinite(seconds):
            return self._seconds
        return max(0.0, seconds * self.part - (self._clock() - self._start))

    @property
    def fraction(self) -> float:
        """The part of the budget that is used, 0 to 1: the larger of time and trials; 0 without any
        limit.
        """
        used = [0.0]
        if self._seconds is not None:
            seconds = self._seconds - self._reserve()
            used.append((self._clock() - self._start) / seconds if seconds > 0 else 1.0)
        if self._trials is not None:
            used.append(self.trials_done / self._trials if self._trials else 1.0)
        return min(1.0, max(used))
