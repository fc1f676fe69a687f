"""Processes that build kernels for a GPU into the cache before they are needed, on all cores but
those that measure.

Each is a Worker of its own, driven by a thread, so a candidate that crashes the compiler costs its
builder's process and nothing else. What is built lies in the cache of kernels, where the process
that measures finds it; what its code tells comes back as an Outcome.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lntune.case import Case
from lntune.device import Device, usable_cores
from lntune.errors import BuildError
from lntune.measure.jobs import Build, Candidate, Check, Outcome
from lntune.measure.worker import Worker, end_driven

if TYPE_CHECKING:
    from typing_extensions import Self

MOST = 32
"""Builders at most, whatever the cores: each holds a compiler of some hundred MB."""
FREE = 2
"""Cores left to others, where there are more: the process that measures, and the one it runs in."""

Key = tuple[Case, Candidate]
"""What is built, and for what."""


def default_count() -> int:
    """How many builders there are where nobody says."""
    return max(1, min(MOST, usable_cores() - FREE))


class Builders:
    """Builds what is `wanted`, in that order, each as a `job`. Use as a context manager; the
    methods are for one thread.

    What fails is an outcome, too. Processes end when nothing is left to build.
    """

    def __init__(
        self,
        device: Device,
        timeout: float,
        job: type[Build] | type[Check] = Build,
        count: int | None = None,
        wanted: Sequence[Key] = (),
    ) -> None:
        self._device, self._timeout, self._job = device, timeout, job
        self._queue: deque[Key] = deque(wanted)
        self._flying: set[Key] = set()
        self._outcomes: dict[Key, Outcome] = {}
        self._changed = threading.Condition()
        self._closed, self._failure = False, ""
        self.seconds: list[float] = []
        """What each job took, once its process was there."""
        self.starts: list[float] = []
        """What the start of each process took."""
        self.count = default_count() if count is None else count
        self._workers = [Worker(1) for _ in range(self.count)]
        self._threads = [
            threading.Thread(target=self._work, args=(worker,), daemon=True)
            for worker in self._workers
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the builders at once and forget what they were doing; what is built stays in the
        cache, and known.
        """
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        for worker, thread in zip(self._workers, self._threads, strict=True):
            end_driven(worker, thread)

    def wait(self, case: Case, candidate: Candidate, seconds: float) -> None:
        """Wait until it is built or has failed, nobody is left to build it, or time is over."""
        end = time.monotonic() + seconds
        with self._changed:
            while (
                (case, candidate) not in self._outcomes
                and self._alive()
                and (left := end - time.monotonic()) > 0
            ):
                self._changed.wait(min(left, 1.0))

    def _alive(self) -> bool:
        """True while somebody is there to build."""
        return not self._closed and any(thread.is_alive() for thread in self._threads)

    def _work(self, worker: Worker) -> None:
        """A builder's thread."""
        try:
            while (key := self._next()) is not None and self._build(worker, key):
                pass
        finally:
            worker.stop()
            with self._changed:
                self._changed.notify_all()

    def _build(self, worker: Worker, key: Key) -> bool:
        """Build one; False where no child comes up to do it."""
        case, candidate = key
        try:
            if worker.pid is None:
                start = time.monotonic()
                worker.start()
                self.starts.append(time.monotonic() - start)
            start = time.monotonic()
            outcome = worker.run(self._job(case, self._device, candidate), self._timeout)
        except Exception as e:
            with self._changed:
                self._flying.discard(key)
                self._queue.appendleft(key)
                self._failure = str(e) or type(e).__name__
            return False
        with self._changed:
            self._flying.discard(key)
            if not self._closed:  # else it was killed
                self.seconds.append(time.monotonic() - start)
                self._keep(key, outcome)
            self._changed.notify_all()
        return True

    def _next(self) -> Key | None:
        """The next to build, once `_ready`; None at the end."""
        with self._changed:
            self._changed.wait_for(self._ready)
            if not self._queue:
                return None
            key = self._queue.popleft()
            self._flying.add(key)
            return key

    def _ready(self) -> bool:
        """Whether a builder without work is to look for some, or to end where there is none."""
        return True

    def _keep(self, key: Key, outcome: Outcome) -> None:
        """Note what came of one; the lock is held."""
        self._outcomes[key] = outcome

    def _wait_for(self, keys: Sequence[Key]) -> None:
        """Until one of them is built. Holds the lock, and gives it up while it waits.

        Raises:
            BuildError: nobody is left to build it.
        """
        while not any(k in self._outcomes for k in keys):
            if not self._alive():
                reason = self._failure or "the builders were stopped"
                raise BuildError(f"candidates are not built any more: {reason}")
            self._changed.wait(1.0)
