"""One part of a pass, step by step: each work in its time, what came of it kept at once, what is
known already left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from lntune.commands.gpu_pass.book import Book
from lntune.commands.gpu_pass.jobs import Answer, Job

MINUTES = 9.0
"""What a part takes unless it is told otherwise; the steps' times are for this."""
ENDING = 15.0
"""Seconds that are left for ending at the end of a part."""
LEFT = "{seconds}"
"""In a program's words: the seconds that it has, less what it takes to end."""
LEAST = 3.0
"""Seconds below which nothing is begun, unless a work says otherwise."""


class Work(msgspec.Struct, frozen=True):
    """Something to be done for `most` seconds at most: a job, or a program, which is `words`. A
    program that is `resumed` goes on when it is run again, and is unless it came to its end. With
    less than `least` seconds it is not begun.
    """

    key: str
    most: float
    job: Job | None = None
    words: tuple[str, ...] = ()
    resumed: bool = False
    least: float = LEAST


class Step(msgspec.Struct, frozen=True):
    """Works in order, for `seconds` of a part of MINUTES together."""

    name: str
    seconds: float
    works: tuple[Work, ...]


class Stopped(Exception):
    """The rest of a part could not do anything, with the reason."""


class Hands(Protocol):
    """What does the work."""

    def do(self, job: Job, seconds: float) -> Answer:
        """What came of a job."""

    def run(self, words: tuple[str, ...], seconds: float, output: Path) -> Answer:
        """What came of a program, whose output goes to a file."""


Part = Callable[[Book, Hands], Iterable[Step]]
"""The steps of a part; what was found so far decides which come next."""


class Runner:
    """One run of a part, of so many minutes; `archive` is written again after each step."""

    def __init__(
        self,
        book: Book,
        hands: Hands,
        minutes: float,
        archive: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.book, self.hands, self.archive, self.clock = book, hands, archive, clock
        self.end = clock() + max(60 * minutes - ENDING, 0.0)
        self.share = minutes / MINUTES
        self.failed = 0

    def run(self, part: Part) -> bool:
        """Everything that there is time for: each step in its own, then what is left of all. True
        when all is done and nothing failed. The archive is there however this ends.
        """
        try:
            for bounded in (True, False):
                for step in part(self.book, self.hands):
                    self._step(step, bounded)
                    self.book.pack(self.archive)
            left = [work.key for work, _ in self._left(part)]
            self.book.log(
                f"end: {len(left)} left for another run of this part"
                if left
                else "end: all is done"
            )
            return not left and not self.failed
        except Stopped as e:
            self.book.log(f"stopped: {e}")
            return False
        except KeyboardInterrupt:
            self.book.log("stopped by a signal")
            raise
        finally:
            self.book.pack(self.archive)

    def _left(self, part: Part) -> Iterator[tuple[Work, Step]]:
        for step in part(self.book, self.hands):
            for work in step.works:
                if self.book.answer(step.name, work.key) is None:
                    yield work, step

    def _step(self, step: Step, bounded: bool) -> None:
        begun = self.clock()
        until = min(self.end, begun + step.seconds * self.share) if bounded else self.end
        for work in step.works:
            if self.book.answer(step.name, work.key) is not None:
                continue
            started = self.clock()
            seconds = min(work.most, until - started)
            if seconds < min(work.least, work.most):
                continue
            if work.job is not None:
                answer = self.hands.do(work.job, seconds)
            else:
                output = self.book.folder / f"{step.name}-{work.key}.txt"
                left = str(max(1, int(seconds - 2 * ENDING)))
                words = tuple(word.replace(LEFT, left) for word in work.words)
                answer = self.hands.run(words, seconds, output)
            took = self.clock() - started
            if answer.status == "late" and (work.resumed or seconds < work.most):
                # the time was over, which is not the work's fault
                answer = msgspec.structs.replace(answer, status="cut")
            self.failed += answer.status in ("wrong", "failed", "late")
            self.book.add(step.name, work.key, answer, took)
