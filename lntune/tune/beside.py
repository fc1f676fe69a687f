"""Workers beside each other: each builds and checks one of the next candidates of a search, and a
candidate is timed alone, while the processes of all other workers are stopped.

A thread drives each worker while it prepares; what times a candidate, or measures finalists, is the
thread that tunes. Candidates are tried in the order in which they were begun, so that the log has
the order of the search.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lntune import backends, ops
from lntune.backends import inputs
from lntune.case import Case
from lntune.device import Device, usable_cores
from lntune.errors import BuildError, LntuneError
from lntune.measure.jobs import Candidate, Final, Heat, Outcome, Prepare, Training, Try
from lntune.measure.worker import Worker, end_driven
from lntune.system import excess, interrupts

if TYPE_CHECKING:
    from typing_extensions import Self

MOST = 4
"""Workers at most: the part of a trial that is done alone, a third of it or more, leaves further
ones without work.
"""
BYTES = 1 << 30
"""What a worker takes of memory, beside the tensors of a case."""
PATIENCE = 1.0
"""Seconds for which a final waits until some worker is done with what nobody waits for any more."""


def count(device: Device, cases: Sequence[Case], trials: int | None = None) -> int:
    """How many workers there are where nobody says: as many as cores, MOST at most, no more than
    half of the memory that is left holds, nor than `trials` of a case; one where candidates are
    built ahead.
    """
    if backends.of(device).builds_ahead:
        return 1
    largest = max((ops.get(case.op).bytes(case) for case in cases), default=0)
    fitting = excess.room() / 2 // (BYTES + inputs.COPIES * largest)
    return max(1, int(min(MOST, usable_cores(), fitting, trials or MOST)))


@dataclass(eq=False)
class _Work:
    """A candidate that is prepared: by which worker, what came of it, in how many seconds; `over`
    when nobody wants it any more.
    """

    case: Case
    candidate: Candidate
    worker: Worker | None = None
    outcome: Outcome | None = None
    seconds: float = 0.0
    over: bool = False


class Beside:
    """Workers that prepare candidates for one device. Use as a context manager; the methods are for
    one thread. `start` has a worker come up, or raises an LntuneError.
    """

    def __init__(
        self,
        device: Device,
        timeout: float,
        workers: Sequence[Worker],
        start: Callable[[Worker], None],
    ) -> None:
        self._device, self._timeout, self._start = device, timeout, start
        self._workers = list(workers)
        self._queue: deque[_Work] = deque()
        self._in_hand: dict[tuple[Case, Candidate], _Work] = {}
        self._idle: list[Worker] = []
        """Those that are there and have nothing to do."""
        self._tried: dict[tuple[Case, Candidate], Worker] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._failures: list[Exception] = []
        self._threads = [
            threading.Thread(target=self._serve, args=(worker,), daemon=True)
            for worker in self._workers
        ]

    @property
    def count(self) -> int:
        """How many workers there are."""
        return len(self._workers)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers at once, whatever they do."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for worker, thread in zip(self._workers, self._threads, strict=True):
            worker.resume()
            end_driven(worker, thread)
            worker.stop()

    def wait(self, some: int = 1) -> None:
        """Until so many workers are there and have nothing to do.

        Raises:
            LntuneError: none comes up, and why.
        """
        with self._changed:
            self._wait_until(lambda: len(self._idle) >= some)

    def begin(self, case: Case, candidate: Candidate) -> None:
        """Prepare a candidate, which is tried after those that were begun before."""
        if (case, candidate) not in self._in_hand:
            work = self._in_hand[case, candidate] = _Work(case, candidate)
            with self._changed:
                self._queue.append(work)
                self._changed.notify_all()

    def tried(self, job: Try, allowed: float) -> tuple[Outcome | None, float]:
        """(what comes of a candidate, seconds of a worker); None where it was not prepared within
        the seconds `allowed`, if these are fewer than the limit of a trial.

        Raises:
            LntuneError: no worker comes up any more.
        """
        key = job.case, job.candidate
        if key not in self._in_hand:
            self.forget()  # whoever is prepared keeps a worker
            self.begin(*key)
        work = self._in_hand[key]
        end = None if allowed >= self._timeout else time.monotonic() + allowed
        try:
            with self._changed:
                if not self._wait_until(lambda: work.outcome is not None, end):
                    return None, 0.0
            assert work.worker is not None and work.outcome is not None
            if work.outcome.status != "ok":
                return work.outcome, work.seconds
            begun = time.monotonic()
            with self._others_stopped(work.worker):
                outcome = work.worker.run(job, allowed)
            self._tried[key] = work.worker
            return outcome, work.seconds + time.monotonic() - begun
        finally:
            self._drop(key)

    def run(self, job: Heat | Final | Training, timeout: float) -> Outcome:
        """Have a job done that measures, with all other workers stopped.

        Raises:
            LntuneError: no worker comes up any more.
        """
        self.forget()
        with self._changed:
            # an interrupt may have ended the process of the one that was measuring
            ready = self._wait_until(
                lambda: any(w.pid is not None for w in self._idle), time.monotonic() + PATIENCE
            )
            if not ready and not self._idle:
                for worker in self._workers:  # what they do nobody waits for
                    worker.kill()
                self._wait_until(lambda: bool(self._idle))
            candidates = job.candidates if isinstance(job, Heat) else ()
            worker = max(
                self._idle,
                key=lambda w: (w.pid is not None, len(self._of(w, job.case, candidates))),
            )
        try:
            with self._changed:
                self._idle.remove(worker)
            with self._others_stopped(worker):
                return worker.run(job, timeout)
        finally:
            with self._changed:
                if worker not in self._idle:
                    self._idle.append(worker)

    def kept(self, case: Case, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those that a race need not build again: the worker that runs it has timed them."""
        return max((self._of(w, case, candidates) for w in self._workers), key=len)

    def notes(self) -> list[str]:
        """What is to be said of it: workers that did not come up."""
        return [f"there was a worker less: {failure}" for failure in self._failures]

    def _of(self, worker: Worker, case: Case, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates of a case that a worker has timed."""
        return [c for c in candidates if self._tried.get((case, c)) is worker]

    def forget(self) -> None:
        """Nothing that is in hand is wanted any more."""
        for key in list(self._in_hand):
            self._drop(key)

    def _drop(self, key: tuple[Case, Candidate]) -> None:
        with interrupts.held(), self._changed:
            work = self._in_hand.pop(key)
            work.over = True
            if work in self._queue:
                self._queue.remove(work)
            self._changed.notify_all()

    @contextlib.contextmanager
    def _others_stopped(self, worker: Worker) -> Iterator[None]:
        others = [other for other in self._workers if other is not worker]
        try:
            for other in others:
                other.pause()
            yield
        finally:
            with interrupts.held():
                for other in others:
                    other.resume()

    def _serve(self, worker: Worker) -> None:
        """A worker's thread."""
        try:
            self._start(worker)
            while (work := self._next(worker)) is not None:
                begun = worker.clock()
                try:
                    job = Prepare(work.case, self._device, work.candidate)
                    outcome = worker.run(job, self._timeout)
                except Exception:
                    with self._changed:
                        if not work.over:
                            self._queue.appendleft(work)
                    raise
                with self._changed:
                    work.outcome, work.seconds = outcome, worker.clock() - begun
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: work.over or self._closed)
        except Exception as e:
            if not self._closed:
                self._failures.append(e)
        finally:
            worker.stop()
            with self._changed:
                if worker in self._idle:
                    self._idle.remove(worker)
                self._changed.notify_all()

    def _next(self, worker: Worker) -> _Work | None:
        """What a worker prepares next; None at the end."""
        with self._changed:
            self._idle.append(worker)
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._closed or (bool(self._queue) and worker in self._idle)
            )
            if self._closed:
                return None
            self._idle.remove(worker)
            work = self._queue.popleft()
            work.worker = worker
            return work

    def _wait_until(self, true: Callable[[], bool], end: float | None = None) -> bool:
        """Wait for something, until `end` on time.monotonic's clock where that is given; whether it
        came. Holds the lock, and gives it up while it waits.

        Raises:
            LntuneError: no worker is left that could bring it about.
        """
        while not true():
            if not any(thread.is_alive() for thread in self._threads):
                failure = self._failures[-1] if self._failures else "they were ended"
                if isinstance(failure, LntuneError):
                    raise failure
                raise BuildError(f"no worker is left: {failure}")
            left = 1.0 if end is None else end - time.monotonic()
            if left <= 0:
                return False
            self._changed.wait(min(left, 1.0))
        return True
