"""What a tuning run shows while it goes: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lntune.report.columns import say
from lntune.report.tables import micros
from lntune.words import length, trials

if TYPE_CHECKING:
    from typing_extensions import Self

    from lntune.tune import Progress

PLAIN_SECONDS = 5.0
"""Between two plain lines."""
ESTIMATED_AFTER = 2.0
"""Seconds after which steps tell how long the others take."""


class Pace:
    """How many verified trials (built, right and timed) a run does in a second of searching.

    Counted from the end of the first trial, which pays for the compiler's start, and without the
    finalists' second measurement.
    """

    def __init__(self) -> None:
        self._case = -1
        self._tried = self._verified = 0
        self._last: float | None = None
        self._warm = False
        self._seconds = 0.0
        self._count = 0

    def __call__(self, progress: Progress, now: float) -> None:
        """Take in what the run reports at the time `now` in seconds."""
        if progress.index != self._case:
            self._case, self._tried, self._verified = progress.index, 0, 0
        if progress.phase != "search":
            self._last = None
            return
        verified = progress.trials - sum(progress.failures.values())
        if progress.trials > self._tried:
            if self._warm and self._last is not None:
                self._seconds += now - self._last
                self._count += verified - self._verified
            self._warm = True
        self._tried, self._verified, self._last = progress.trials, verified, now

    @property
    def per_second(self) -> float | None:
        """Verified trials a second; None before the second trial."""
        return self._count / self._seconds if self._seconds else None


class _Shown:
    """A line that says how it goes: live on a terminal, elsewhere printed every PLAIN_SECONDS from
    `last` on. A context manager.
    """

    def __init__(self, console: Console, last: float) -> None:
        self._console, self._last = console, last
        self._live: Live | None = None
        if console.is_interactive:
            self._live = Live(console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, sentence: str) -> None:
        """Print a sentence that stays, above the line."""
        say(self._console, sentence)

    def _show(self, line: str) -> None:
        if self._live:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))
        elif time.monotonic() - self._last >= PLAIN_SECONDS:
            self._last = time.monotonic()
            say(self._console, line)


class TuningProgress(_Shown):
    """The observer of a tuning run. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, -math.inf)
        self.pace = Pace()

    def __call__(self, progress: Progress) -> None:
        """Show the state of the run."""
        self.pace(progress, time.monotonic())
        if progress.phase == "done":
            say(self._console, self._finished(progress))
        else:
            self._show(self._line(progress))

    # What matters less comes later: a terminal too narrow for the line cuts off its end.
    def _line(self, p: Progress) -> str:
        failures = "".join(f", {count} {kind}" for kind, count in sorted(p.failures.items()))
        state, best, knobs, left = trials(p.trials, p.earlier), "", "", ""
        if p.phase == "final":
            state = "measuring finalists"
        if p.best_us < math.inf:
            best, knobs = f", best {micros(p.best_us)} us", f" ({p.best})"
        if p.deadline is not None:
            left = f", {max(0.0, p.deadline - time.monotonic()):.0f} s left"
        return f"[{p.index + 1}/{p.cases}] {p.case}: {state}{failures}{best}{left}{knobs}"

    def _finished(self, p: Progress) -> str:
        assert p.final is not None
        tuned, eager, default = p.final.median(), p.final.median("eager"), p.final.median("default")
        parts = [f"[{p.index + 1}/{p.cases}] {p.case}: tuned {micros(tuned)} us"]
        if p.final.disturbance:
            trial = f" (best trial: {micros(p.best_us)} us)" if p.best_us < math.inf else ""
            return (
                f"{parts[0]}{trial}, but other work disturbed this final: neither times nor"
                " ratios hold, and it replaces no quiet measurement"
            )
        if tuned and eager:
            parts.append(f"eager {micros(eager)} us ({eager / tuned:.2f}x)")
        if tuned and default:
            parts.append(f"without tuning {micros(default)} us ({default / tuned:.2f}x)")
        failures = "".join(f", {count} {kind}" for kind, count in sorted(p.failures.items()))
        return ", ".join(parts) + f"; {trials(p.trials, p.earlier)}{failures}"


class StepProgress(_Shown):
    """The same for a known number of steps, each a call with its name; as soon as some are over it
    says what the others take at that pace. Use as a context manager.
    """

    def __init__(self, console: Console, name: str, steps: int) -> None:
        super().__init__(console, time.monotonic())
        self._name, self._steps, self._done = name, steps, 0
        self._begun = self._last

    def __call__(self, what: str) -> None:
        """The next step begins."""
        self._done += 1
        self._show(f"{self._name} [{self._done}/{self._steps}] {self._left()}{what}")

    def _left(self) -> str:
        """What the steps from this one on take, if they are as the ones before."""
        over, seconds = self._done - 1, time.monotonic() - self._begun
        if not over or seconds < ESTIMATED_AFTER:
            return ""
        return f"about {length(seconds / over * (self._steps - over))} left: "
