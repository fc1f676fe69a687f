"""Building ahead: in which order, what comes of crashes, and that it ends; with workers of the
tests' own in place of processes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from lntune.backends import device_of
from lntune.backends.cuda import Inspection, Occupancy, Resources
from lntune.backends.cuda.code import Code, Work
from lntune.backends.cuda.model import Part
from lntune.case import Case
from lntune.errors import BuildError
from lntune.kernels.candidate_facts import Facts
from lntune.measure.jobs import Build, Candidate, Outcome
from lntune.tune import builders
from lntune.tune.ahead import Ahead
from lntune.tune.builders import Builders

DEVICE = device_of("cuda:sm_90")
CASE, OTHER = Case("layer_norm", 1024, "float32", 4096), Case("layer_norm", 768, "float32", 4096)


def candidate(number: int) -> Candidate:
    """A candidate that is told by its number."""
    return Candidate("some", (("number", number),))


def number(of: Candidate) -> int:
    """Its number."""
    return int(of.knobs["number"])


def facts(registers: int = 32, spills: int = 0) -> Facts:
    """A kernel that takes so many registers."""
    code = Code(
        "main", "PTX", False, 10, 0, {128: 2}, {128: 1}, {}, {}, 0, 0, 0, 0, 0, 0, 0, 0, {}, {}
    )
    blocks = 65536 // (registers * 128)
    room = Occupancy(blocks, 4 * blocks, 64, ("registers",))
    return Facts(
        (
            Inspection(
                "main",
                "sm_90",
                128,
                0,
                "nvcc",
                Resources("main", "sm_90", registers, 0, spills, spills),
                code,
                room,
            ),
        ),
        (Part(128, blocks, 4096, 1, Work(), Work(200.0, 21, 4, 8, 128), 1 << 25),),
    )


class FakeWorker:
    """Builds by `answer` in place of a process."""

    answer: Callable[[Build], Outcome] = staticmethod(lambda job: Outcome("ok", facts=facts()))
    instances: list[FakeWorker]

    def __init__(self, threads: int | None = None) -> None:
        self.killed = threading.Event()
        self.stopped = False
        self.pid: int | None = None
        type(self).instances.append(self)

    def start(self) -> None:
        """It comes up at once."""
        self.pid = 1

    def run(self, job: Build, timeout: float) -> Outcome:
        """What `answer` says."""
        return type(self).answer(job)

    def kill(self) -> None:
        """End what it does."""
        self.killed.set()

    def stop(self) -> None:
        """The end."""
        self.stopped = True


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeWorker]]:
    """The workers of the test."""
    fake = type("Fake", (FakeWorker,), {"instances": []})
    monkeypatch.setattr(builders, "Worker", fake)
    yield fake
    assert all(w.stopped for w in fake.instances)


def test_built_in_order(worker: type[FakeWorker]) -> None:
    """A builder takes the candidates as they were given: the ones that are hurried, the first of
    the case, the first of the next, the others.
    """
    order: list[tuple[Case, int]] = []
    go = threading.Event()

    def answer(job: Build) -> Outcome:
        go.wait(10)
        order.append((job.case, number(job.candidate)))
        assert (job.device, type(job)) == (DEVICE, Build)
        return Outcome("ok", facts=facts())

    worker.answer = staticmethod(answer)
    with Ahead(DEVICE, 10.0, count=1) as ahead:
        ahead.begin(CASE, map(candidate, range(9)), (OTHER, [candidate(i) for i in range(5)]))
        while ahead._queue and ahead._queue[0] == (CASE, candidate(0)):
            time.sleep(0.001)  # the builder has taken the first
        ahead.hurry(CASE, [candidate(8), candidate(7)])
        go.set()
        while len(order) < 11:
            time.sleep(0.001)
    assert order == [
        *((CASE, n) for n in (0, 7, 8, 1, 2, 3)),
        (OTHER, 0),
        (OTHER, 1),
        *((CASE, n) for n in (4, 5, 6)),
    ]


@pytest.mark.parametrize(("count", "own", "after"), [(1, 4, 2), (15, 22, 15), (32, 48, 32)])
def test_the_next_case_does_not_begin_by_waiting(
    count: int, own: int, after: int, worker: type[FakeWorker]
) -> None:
    """However many candidates a case has, those of the next come early enough for all builders to
    have one.
    """
    ahead = Ahead(DEVICE, 10.0, count=count)  # not entered: nobody takes from the queue
    ahead.begin(CASE, map(candidate, range(1000)), (OTHER, [candidate(i) for i in range(1000)]))
    queue = [(case, number(c)) for case, c in ahead._queue]
    assert queue == [
        *((CASE, n) for n in range(own)),
        *((OTHER, n) for n in range(after)),
        *((CASE, n) for n in range(own, 1000)),
    ]
    for builder in worker.instances:
        builder.stop()


def test_the_next_case_is_known_already(worker: type[FakeWorker]) -> None:
    """What was built ahead of the next case is not built again when its turn comes; what is of no
    more use is forgotten.
    """
    built: list[int] = []

    def answer(job: Build) -> Outcome:
        built.append(number(job.candidate))
        return Outcome("ok", facts=facts())

    worker.answer = staticmethod(answer)
    with Ahead(DEVICE, 10.0, count=1) as ahead:
        ahead.begin(CASE, [candidate(1)], (OTHER, [candidate(2), candidate(3)]))
        ahead.outcome(OTHER, candidate(3))
        ahead.outcome(OTHER, candidate(2))
        ahead.begin(OTHER, [candidate(2), candidate(3), candidate(4)])
        ahead.outcome(OTHER, candidate(4))
        assert set(ahead.built(OTHER)) == {candidate(2), candidate(3), candidate(4)}
        assert ahead.built(CASE) == {}
    assert sorted(built) == [1, 2, 3, 4]


@pytest.mark.parametrize("status", ["run", "timeout", "compile", "invalid"])
def test_what_goes_wrong_is_the_candidates(status: str, worker: type[FakeWorker]) -> None:
    """A builder that dies has met a candidate that does not compile; whatever it is, it is that
    candidate's, and the others are built.
    """
    worker.answer = staticmethod(
        lambda job: (
            Outcome(status, "the worker died (SIGSEGV)")
            if number(job.candidate) == 1
            else Outcome("ok", facts=facts())
        )
    )
    with Ahead(DEVICE, 10.0, count=2) as ahead:
        ahead.begin(CASE, map(candidate, range(3)))
        outcomes = [ahead.outcome(CASE, candidate(i)) for i in range(3)]
    assert [o.status for o in outcomes] == ["ok", "compile" if status == "run" else status, "ok"]
    assert outcomes[1].message == "the worker died (SIGSEGV)"


def test_the_best_of_what_is_built(worker: type[FakeWorker]) -> None:
    """Chosen is the best by rank of the preferred ones that are built, then of the others; what is
    not worth measuring comes first.
    """
    late = threading.Event()

    def answer(job: Build) -> Outcome:
        it = number(job.candidate)
        if it == 9:
            late.wait(10)
        return (
            Outcome("compile", "no")
            if it == 5
            else Outcome(
                "ok",
                facts=facts(registers={0: 128, 1: 32, 2: 255}.get(it, 64), spills=8 * (it == 6)),
            )
        )

    worker.answer = staticmethod(answer)
    with Ahead(DEVICE, 10.0, count=1) as ahead:
        ahead.begin(CASE, map(candidate, range(3)))
        for i in range(3):
            ahead.outcome(CASE, candidate(i))
        scores = [ahead.score(CASE, candidate(i)) for i in range(3)]
        assert 0 < scores[2] < scores[0] < scores[1] <= 1
        ahead.begin(CASE, [candidate(9)])
        assert ahead.choose(CASE, [], [candidate(i) for i in (0, 1, 2, 9)]) == candidate(1)
        assert ahead.choose(CASE, [candidate(2), candidate(0)], [candidate(1)]) == candidate(0)
        # is not waited for
        assert ahead.choose(CASE, [candidate(9)], [candidate(2)]) == candidate(2)
        late.set()
        assert ahead.choose(CASE, [candidate(9)], []) == candidate(9)
        ahead.begin(CASE, [candidate(5), candidate(6)])
        for wrong in (5, 6):
            ahead.outcome(CASE, candidate(wrong))
            assert ahead.choose(CASE, [], [candidate(1), candidate(wrong)]) == candidate(wrong)


def test_the_end_does_not_wait(worker: type[FakeWorker]) -> None:
    """Closing kills what is being built, forgets the rest, and comes back with all threads
    ended.
    """
    started = threading.Barrier(3)

    def run(self: FakeWorker, job: Build, timeout: float) -> Outcome:
        started.wait(10)
        assert self.killed.wait(30)
        return Outcome("run", "the worker died (SIGKILL)")

    worker.run = run  # type: ignore[method-assign]
    ahead = Ahead(DEVICE, 10.0, count=2)
    with ahead:
        ahead.begin(CASE, map(candidate, range(50)))
        started.wait(10)
    assert all(w.killed.is_set() for w in worker.instances)
    assert not any(t.is_alive() for t in ahead._threads)
    assert ahead.built(CASE) == {}
    with pytest.raises(BuildError, match="not built any more"):
        ahead.outcome(CASE, candidate(40))


def test_builders_that_do_not_come_up(worker: type[FakeWorker]) -> None:
    """When no builder's process starts, who waits for a candidate gets the reason instead of
    waiting for ever.
    """

    def answer(job: Build) -> Outcome:
        raise BuildError("the worker process did not start: no memory.")

    worker.answer = staticmethod(answer)
    with Ahead(DEVICE, 10.0, count=2) as ahead:
        ahead.begin(CASE, map(candidate, range(3)))
        with pytest.raises(BuildError, match="no memory"):
            ahead.choose(CASE, [], [candidate(0)])


def test_builders_of_a_list_end_with_it(
    worker: type[FakeWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Builders that were given all there is to build wait for nothing more; who waits for one of
    theirs goes on once it is built, once it failed, and once nobody is left.
    """
    worker.answer = staticmethod(
        lambda job: Outcome("ok" if number(job.candidate) else "compile", facts=None)
    )
    keys = [(CASE, candidate(i)) for i in range(5)]
    with Builders(DEVICE, 10.0, count=2, wanted=keys) as group:
        for key in keys:
            group.wait(*key, 30.0)
            assert key in group._outcomes
        for thread in group._threads:
            thread.join(10)
        assert all(w.stopped for w in worker.instances)
        monkeypatch.setattr(group._changed, "wait", lambda _: pytest.fail("waits for nobody"))
        group.wait(OTHER, candidate(0), 30.0)


def test_waiting_for_builders_that_are_busy_ends(worker: type[FakeWorker]) -> None:
    """Waiting is over when its time is, whatever a builder does."""
    go = threading.Event()

    def answer(job: Build) -> Outcome:
        go.wait(30)
        return Outcome("ok", facts=facts())

    worker.answer = staticmethod(answer)
    with Builders(DEVICE, 10.0, count=1, wanted=[(CASE, candidate(1))]) as group:
        group.wait(CASE, candidate(1), 0.02)
        assert not group._outcomes
        go.set()
        group.wait(CASE, candidate(1), 30.0)
        assert group._outcomes[CASE, candidate(1)].status == "ok"


def test_cores_left_to_those_who_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores stay free where there are more, and there is always a builder."""
    for cores, count in ((1, 1), (2, 1), (3, 1), (4, 2), (16, 14), (128, 32)):
        monkeypatch.setattr(builders, "usable_cores", lambda cores=cores: cores)
        assert builders.default_count() == count
