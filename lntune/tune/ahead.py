"""Processes that build the next candidates for a GPU while it measures the current ones.

Each is a Worker of its own, driven by a thread, so a candidate that crashes the compiler costs its
builder's process and nothing else. What is built lies in the cache of kernels, where the process
that measures finds it; what its code tells comes back as an Outcome.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from types import TracebackType

import msgspec

from lntune.case import Case
from lntune.device import Device, usable_cores
from lntune.errors import BuildError
from lntune.measure.jobs import Build, Candidate, Check, Outcome
from lntune.measure.worker import Worker
from lntune.tune import ranking

MOST = 32
"""Builders at most, whatever the cores: each holds a compiler of some hundred MB."""
FIRST, NEXT = 3, 2
"""Candidates for each two builders: of the case in hand, before any of the next one is built; and
of that, before the others in hand are. A case may end long before all its thousands are built, and
the next must not begin by waiting for its first.
"""

_Key = tuple[Case, Candidate]  # what is built, and for what


class Ahead:
    """The builders and what they have built. Use as a context manager; the methods are for one
    thread.

    `job` is what they do with each candidate. `count` is how many builders there are: by default
    the cores but one.
    """

    def __init__(
        self,
        device: Device,
        timeout: float,
        job: type[Build] | type[Check] = Build,
        count: int | None = None,
    ) -> None:
        self._device, self._timeout, self._job = device, timeout, job
        self._queue: deque[_Key] = deque()
        self._flying: set[_Key] = set()
        self._outcomes: dict[_Key, Outcome] = {}
        self._scores: dict[_Key, float] = {}
        self._changed = threading.Condition()
        self._closed, self._failure = False, ""
        self.seconds: list[float] = []
        """What each job took, once its process was there."""
        self.starts: list[float] = []
        """What the start of each process took."""
        self.count = count or max(1, min(MOST, usable_cores() - 1))
        self._workers = [Worker(1) for _ in range(self.count)]
        self._threads = [
            threading.Thread(target=self._work, args=(worker,), daemon=True)
            for worker in self._workers
        ]

    def __enter__(self) -> Ahead:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
            while thread.is_alive():
                worker.kill()
                thread.join(0.05)

    def _work(self, worker: Worker) -> None:
        """A builder's thread."""
        try:
            while (key := self._next()) is not None and self._build(worker, key):
                pass
        finally:
            worker.stop()
            with self._changed:
                self._changed.notify_all()

    def _build(self, worker: Worker, key: _Key) -> bool:
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
                self._failure = str(e)
            return False
        with self._changed:
            self._flying.discard(key)
            if not self._closed:  # else it was killed
                self.seconds.append(time.monotonic() - start)
                self._keep(key, outcome)
            self._changed.notify_all()
        return True

    def _next(self) -> _Key | None:
        """The next to build, as soon as there is one; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if self._closed:
                return None
            key = self._queue.popleft()
            self._flying.add(key)
            return key

    def _keep(self, key: _Key, outcome: Outcome) -> None:
        if self._job is Build and outcome.status == "run":  # nothing was run but the compiler
            outcome = msgspec.structs.replace(outcome, status="compile")
        self._outcomes[key] = outcome
        good = outcome.status == "ok" and outcome.facts is not None and not outcome.facts.problems
        # What failed or is not worth measuring comes first: to note that takes no time.
        self._scores[key] = (
            ranking.score(outcome.facts, key[0], self._device)
            if good and outcome.facts
            else math.inf
        )

    def begin(
        self,
        case: Case,
        candidates: Iterable[Candidate],
        following: tuple[Case, Sequence[Candidate]] | None = None,
    ) -> None:
        """From now on build the candidates of this case, in this order, and after the first of them
        the first of the `following` case's; nothing else.
        """
        own = [(case, c) for c in candidates]
        early = max(4, FIRST * self.count // 2)
        cases, next_ones = [case], list[_Key]()
        if following:
            cases.append(following[0])
            few = following[1][: max(2, NEXT * self.count // 2)]
            next_ones = [(following[0], c) for c in few]
        order = [*own[:early], *next_ones, *own[early:]]
        with self._changed:
            for key in [k for k in self._outcomes if k[0] not in cases]:
                del self._outcomes[key], self._scores[key]
            self._queue = deque(
                k for k in order if k not in self._outcomes and k not in self._flying
            )
            self._changed.notify_all()

    def hurry(self, case: Case, candidates: Iterable[Candidate]) -> None:
        """Build these next."""
        with self._changed:
            first = {(case, c) for c in candidates}
            self._queue = deque(sorted(self._queue, key=lambda k: k not in first))

    def outcome(self, case: Case, candidate: Candidate) -> Outcome:
        """What came of building a candidate of the case that was begun; waits for it.

        Raises:
            BuildError: the builders do not come up.
        """
        self.hurry(case, [candidate])
        with self._changed:
            self._wait([(case, candidate)])
            return self._outcomes[case, candidate]

    def built(self, case: Case) -> dict[Candidate, Outcome]:
        """All that is built of a case so far."""
        with self._changed:
            return {c: outcome for (own, c), outcome in self._outcomes.items() if own == case}

    def score(self, case: Case, candidate: Candidate) -> float:
        """The static score of what is built; infinite for what is not to be measured."""
        return self._scores[case, candidate]

    def choose(
        self, case: Case, preferred: Sequence[Candidate], others: Sequence[Candidate]
    ) -> Candidate:
        """Of what is built the best by rank: among the preferred, and where none of these is built,
        among the others; waits for one.

        Raises:
            BuildError: the builders do not come up.
        """
        self.hurry(case, preferred)
        with self._changed:
            self._wait([(case, c) for c in (*preferred, *others)])
            for candidates in (preferred, others):
                ready = [c for c in candidates if (case, c) in self._outcomes]
                if ready:
                    return max(ready, key=lambda c: self._scores[case, c])
        raise BuildError("no candidate was built.")  # pragma: no cover (_wait has raised)

    def _wait(self, keys: Sequence[_Key]) -> None:
        """Until one of them is built. Holds the lock, and gives it up while it waits."""
        while not any(k in self._outcomes for k in keys):
            if self._closed or not any(t.is_alive() for t in self._threads):
                raise BuildError(
                    "candidates are not built any more:"
                    f" {self._failure or 'the builders were stopped'}"
                )
            self._changed.wait(1.0)
