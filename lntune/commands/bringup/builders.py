"""Processes that build a GPU's kernels into the cache on all cores, before a step needs them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType

from lntune import backends
from lntune.case import Case
from lntune.device import Device, usable_cores
from lntune.errors import BuildError
from lntune.measure.jobs import Build, Candidate
from lntune.measure.worker import Worker
from lntune.tune.ahead import MOST


class Builders:
    """Build kernels in the order given. Use as a context manager; for a CPU, whose kernels are
    built in no time, it does nothing.

    Each builder is a Worker driven by a thread, as those of tune.ahead are; what fails to build
    fails again, and is recorded, in its step.
    """

    def __init__(
        self, device: Device, wanted: Sequence[tuple[Case, Candidate]], timeout: float
    ) -> None:
        self._device, self._timeout = device, timeout
        self._queue = deque(wanted)
        self._built: set[tuple[Case, Candidate]] = set()
        self._changed = threading.Condition()
        self._closed = False
        ahead = backends.of(device).builds_ahead
        count = min(MOST, usable_cores(), len(self._queue)) if ahead else 0
        self._workers = [Worker(1) for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._build, args=(worker,), daemon=True)
            for worker in self._workers
        ]

    def __enter__(self) -> Builders:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._closed = True
            self._queue.clear()
        for worker, thread in zip(self._workers, self._threads, strict=True):
            while thread.is_alive():
                worker.kill()
                thread.join(0.05)

    def wait(self, case: Case, candidate: Candidate, seconds: float) -> None:
        """Wait until it is built or has failed, nobody is left to build it, or time is over."""
        end = time.monotonic() + seconds
        with self._changed:
            while (
                (case, candidate) not in self._built
                and any(t.is_alive() for t in self._threads)
                and (left := end - time.monotonic()) > 0
            ):
                self._changed.wait(min(left, 1.0))

    def _build(self, worker: Worker) -> None:
        """A builder's thread."""
        try:
            while (key := self._next()) is not None:
                case, candidate = key
                worker.run(Build(case, self._device, candidate), self._timeout)
                with self._changed:
                    self._built.add(key)
                    self._changed.notify_all()
        except (BuildError, OSError, ValueError):
            pass  # no child comes up, or it was ended while it did: the steps build for themselves
        finally:
            worker.stop()

    def _next(self) -> tuple[Case, Candidate] | None:
        with self._changed:
            return self._queue.popleft() if self._queue and not self._closed else None
